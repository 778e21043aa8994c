"""What does an accumulator cost in quality, for its bytes?

    python benchmarks/frontier.py --data LM_IMDB --variants float32 int8 int4 64-float32 64-int8

A small GPT learns bytes of text, by Adafactor, from micro-batches of one row. A variant is what it
accumulates in: `int4` a full-size accumulator in 4 bits, `64-int8` sketches of rank 64 (of a width
of 256, cosine) in 8 bits, `64-both-int8` sketches of both sides in the same bytes, `none` nothing,
an update a micro-batch. Every one has the best of its
learning rates, by the mean held-out loss of the seeds, which train at once.

`--data` is a folder of texts as the examples read it; the default's are too few to tell small
differences.
"""

import dataclasses
import functools
import math
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import florax
from florax_benchmarks import byte_gpt, results, tables

sys.path.append(str(results.REPOSITORY / "examples"))
from florax_examples import datasets


@dataclasses.dataclass(frozen=True)
class Settings:
    data: str = str(datasets.FOLDER / "tinystories")  # a folder with texts
    variants: tuple[str, ...] = ("none", "float32", "int8", "int4", "64-float32")  # to compare
    accumulate: int = 16  # micro-batches of one row an update
    updates: int = 800  # of the optimizer
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 1.5e-3)  # to choose from
    seeds: int = 2  # of weights, order of the data and projections
    width: int = 256  # of the model
    layers: int = 4  # of the model
    length: int = 128  # bytes of a row
    results: Path = results.FOLDER  # folder for the JSON; what it has is not measured again

    def __post_init__(self):
        for variant in self.variants:
            parse(variant)


VARIANT = re.compile(r"((\d+)-(both-)?)?(float32|bfloat16|int8|int4|int2)")


class Variant(NamedTuple):
    rank: int | None  # None for full size
    side: str
    dtype: str

    def settings(self) -> dict[str, Any]:
        """Those of the examples' accumulator."""
        kind = "full" if self.rank is None else "both" if self.side == "both" else "sketch"
        return {"method": "flora", "accumulator": kind, "accumulator_dtype": self.dtype}


def parse(variant: str) -> Variant | None:
    """What a variant accumulates in; None for nothing."""
    if variant == "none":
        return None
    found = VARIANT.fullmatch(variant)
    if found is None:
        raise ValueError(
            "variants are none, a dtype, or a rank and one as 64-int8 or 64-both-int8, got "
            f"{variant}"
        )
    _, rank, both, dtype = found.groups()
    return Variant(int(rank) if rank else None, "both" if both else "smaller", dtype)


def optimizer(s: Settings, variant: str, learning_rate: Any, key: Any) -> Any:
    adafactor = optax.adafactor(
        learning_rate, min_dim_size_to_factor=64, multiply_by_parameter_scale=False
    )
    base = florax.per_layer(adafactor, byte_gpt.is_stacked)
    parsed = parse(variant)
    if parsed is None:
        return base

    def ranks(path: Any, leaf: Any) -> int | None:
        return parsed.rank if leaf.ndim == 3 else None

    return florax.flora_accumulate(
        base,
        s.accumulate,
        ranks,
        projection="cosine",
        side=parsed.side,
        accumulator_dtype=parsed.dtype,
        key=key,
    )


def share(s: Settings, variant: str) -> float:
    """Bytes of the accumulator, of those of a full-size one in float32."""
    if variant == "none":
        return 0.0
    params = jax.eval_shape(functools.partial(byte_gpt.init, s), jax.random.key(0))
    report = florax.state_report(optimizer(s, variant, 1.0, 0), params)
    full = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    return report.state_bytes / full


def measure(s: Settings, variant: str) -> dict[str, Any]:
    text = "\n".join(datasets.load_texts(s.data, "train")).encode()[:12_000_000]
    text = np.frombuffer(text, np.uint8)
    rows = min(1024, len(text) // 10 // (s.length + 1))  # held out
    split = len(text) - rows * (s.length + 1)
    train, heldout = jnp.asarray(text[:split]), jnp.asarray(text[split:])
    heldout = heldout.reshape(rows, s.length + 1).astype(jnp.int32)

    def one(learning_rate: jax.Array, seed: jax.Array) -> jax.Array:
        key = jax.random.key(seed)
        params = byte_gpt.init(s, key)
        tx = optimizer(s, variant, learning_rate, key)
        loss = functools.partial(byte_gpt.loss, s)

        def update(carry: Any, number: jax.Array) -> tuple[Any, None]:
            count = 1 if variant == "none" else s.accumulate
            own = jax.random.fold_in(key, number)
            starts = jax.random.randint(own, (count,), 0, split - s.length - 1)
            take = functools.partial(jax.lax.dynamic_slice, train, slice_sizes=(s.length + 1,))
            batch = jax.vmap(lambda i: take((i,)))(starts).astype(jnp.int32)
            params, state = carry
            if variant == "none":
                grads = jax.grad(loss)(params, batch)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None
            step = florax.value_and_update(loss, tx)
            _, params, state = step(params, state, batch[:, None])
            return (params, state), None

        (params, _), _ = jax.lax.scan(update, (params, tx.init(params)), jnp.arange(s.updates))
        chunks = heldout[: rows // 16 * 16].reshape(-1, 16, s.length + 1)
        return jax.lax.map(functools.partial(loss, params), chunks).mean()

    start = time.perf_counter()
    each = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
    losses = np.asarray(each(jnp.array(s.learning_rates), jnp.arange(s.seeds)))
    means = np.where(np.isfinite(losses), losses, np.inf).mean(1)
    best = int(means.argmin())
    return {
        "share": share(s, variant),
        "loss": float(means[best]),
        "losses": losses[best].tolist(),
        "learning_rate": s.learning_rates[best],
        "sweep": means.tolist(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(s: Settings) -> None:
    own = {k: v for k, v in dataclasses.asdict(s).items() if k not in ("variants", "results")}
    own |= {"data": Path(s.data).name, "learning_rates": list(s.learning_rates)}
    rows = []
    for variant in s.variants:
        settings = own | {"variant": variant}
        rows.append(
            results.get(s.results, "frontier", settings, functools.partial(measure, s, variant))
        )
        print(f"{variant}: {rows[-1]['loss']:.4f}", flush=True)
    print(f"\n{Path(s.data).name}, ×{s.accumulate}; nats a byte:\n{tables.frontier(rows)}")


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))
