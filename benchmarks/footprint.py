r"""What does a training step of the models in FLORA's paper hold, by its methods?

    python benchmarks/footprint.py --model t5-small --variants none float32 lora-8/float32 8-paper \
        8-both-int8

Figures are those of the compiled step, parameters and state donated; nothing is allocated without
`--run`. ΔM is what a variant's peak adds to that of `none`. FLORA as published
compresses full-size gradients; florax's own are born as sketches. With `--layerwise`, layers are
updated one by one in the backward pass.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

import florax
from florax_benchmarks import baselines, models, results, steps, tables, variants


@dataclasses.dataclass(frozen=True)
class Settings:
    model: models.ModelName = "t5-small"  # whose shape to train
    variants: tuple[str, ...] = ("none", "float32", "64-paper", "64-both-int8")  # to compare
    dtype: Literal["float32", "bfloat16"] = "float32"  # of parameters and activations
    batch: int = 1  # rows or images of a micro-batch
    length: int = 128  # tokens of a row; of T5's target
    source: int = 512  # tokens that T5 reads
    accumulate: int = 16  # micro-batches an update, of the variants that accumulate
    checkpoint: bool = True  # layers keep only what enters them for the backward pass
    layerwise: bool = False  # layers are updated one by one; of variants without accumulator
    run: bool = False  # also make two updates, for the peak that the device reports
    results: Path = results.FOLDER  # folder for the JSON; what it has is not measured again

    def __post_init__(self):
        parsed = [variants.parse(name) for name in self.variants]
        if self.layerwise and any(v.accumulator for v in parsed):
            raise ValueError(f"layerwise is for variants without accumulator, got {self.variants}")

    def identity(self) -> dict[str, Any]:
        names = ("model", "dtype", "batch", "length", "source", "accumulate")
        own = {name: getattr(self, name) for name in names}
        return own | {name: getattr(self, name) for name in ("checkpoint", "layerwise", "run")}


def measure(s: Settings, name: str, known: str | None) -> dict[str, Any] | None:
    v = variants.parse(name)
    shape = models.SHAPES[s.model]._replace(checkpoint=s.checkpoint)
    weights = models.parameter_shapes(shape, jnp.dtype(s.dtype))
    own_loss = functools.partial(models.loss, shape)
    is_stacked, merge = models.is_stacked, None
    matrices, key = florax.attention_and_feed_forward, jax.random.key(0)
    if variants.has_adapters(v.base):
        is_stacked = baselines.are_stacked_too(weights, is_stacked)

    def start(weights: Any) -> tuple[Any, Any]:
        """What is trained and what is frozen."""
        nonlocal merge
        if not variants.has_adapters(v.base):
            return weights, {}
        adapted = baselines.adapt(weights, v.base_rank, matrices, key, baselines.Factored)
        merge = adapted.merge
        return adapted.trained, adapted.frozen

    trained, frozen = jax.eval_shape(start, weights)
    opt = variants.optimizer(v, lambda count: 1e-3, matrices, is_stacked, 1000, key)

    def step(trained: Any, frozen: Any, state: Any, batches: Any) -> Any:
        def loss(trained: Any, batch: Any) -> jax.Array:
            return own_loss(merge(trained, frozen) if merge else trained, batch)

        if s.layerwise:
            update = florax.value_and_update(loss, opt, layerwise=True)
            value, trained, state = update(trained, state, steps.first(batches))
        else:
            value, trained, state = accumulating(loss)[1](trained, state, batches)
        return value, trained, frozen, state

    def accumulating(loss: Any) -> Any:
        is_paper = bool(v.accumulator and v.accumulator.kind == "paper")
        return variants.accumulating(v, loss, opt, s.accumulate, matrices, key, dense=is_paper)

    tx, _ = accumulating(own_loss)
    state = jax.eval_shape(tx.init, trained)
    count = s.accumulate if v.accumulator else 1
    batch = models.batch_shapes(shape, s.batch, s.length, s.source)
    batches = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), batch)
    lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(trained, frozen, state, batches)
    if (program := results.fingerprint(lowered)) == known:
        return None
    compiled = lowered.compile()
    m = compiled.memory_analysis()
    unaliased = m.output_size_in_bytes - m.alias_size_in_bytes
    is_sketched = isinstance(state, florax.FloraAccumulateState)
    row = {
        "program": program,
        "parameter_bytes": tree_bytes(weights),
        "adapter_bytes": tree_bytes((trained, frozen)) - tree_bytes(weights),
        "gradient_bytes": tree_bytes(trained),  # those of all that is trained, at full size
        "accumulator_bytes": tree_bytes(state.sketch) if is_sketched else 0,
        "optimizer_bytes": tree_bytes(state.inner_opt_state if is_sketched else state),
        "argument_bytes": m.argument_size_in_bytes,
        "temporary_bytes": m.temp_size_in_bytes,
        "peak_bytes": m.argument_size_in_bytes + m.temp_size_in_bytes + unaliased,
    }
    if not s.run:
        return row

    def draw(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.random.randint(jax.random.key(1), x.shape, 0, shape.vocabulary).astype(x.dtype)

    arrays = models.random_parameters(weights, jax.random.key(0))
    own = jax.jit(start, donate_argnums=0)(arrays)
    del arrays
    own_state = jax.jit(tx.init)(own[0])
    data, before = jax.tree.map(draw, batches), device_peak()
    for _ in range(2):
        value, *own, own_state = compiled(*own, own_state, data)
        value.block_until_ready()
    after = device_peak()
    return row | {"device_peak_bytes": after if after > before else None}


def device_peak() -> int:
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def tree_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def main(s: Settings) -> None:
    rows = []
    for name in s.variants:
        isolated = functools.partial(results.isolated, measure, s, name)
        settings = s.identity() | {"variant": name}
        rows.append(results.get_of_program(s.results, "footprint", settings, isolated))
    print(f"{s.model}, {s.dtype}, {s.batch} rows, ×{s.accumulate}; MiB:\n{tables.footprint(rows)}")


if __name__ == "__main__":
    main(results.settings(Settings, f"{__doc__}\n{variants.__doc__}"))
