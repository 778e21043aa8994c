"""What does `flora_momentum` cost by itself, against a full-size moving average?

    python benchmarks/momentum.py --model gpt2

One update of the attention and feed-forward matrices of a model, stacked, as `optax.chain` would
ask for it after the base optimizer: updates in, updates out, the state in place.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import florax
from florax_benchmarks import models, results, tables, timing


@dataclasses.dataclass(frozen=True)
class Settings:
    model: models.ModelName = "gpt2"  # whose shapes the matrices have
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the matrices
    rank: int = 256  # of the sketches
    rounds: int = 10  # timed updates of each, after one that is not
    results: Path = results.FOLDER  # folder for the JSON


def measure(s: Settings) -> dict[str, Any]:
    shapes = models.parameter_shapes(models.SHAPES[s.model], jnp.dtype(s.dtype))
    flat, _ = jax.tree_util.tree_flatten_with_path(shapes)
    shapes = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in flat
        if florax.attention_and_feed_forward(path, leaf)
    }
    grads = models.random_parameters(shapes, jax.random.key(0))

    stacked = florax.FloraDimensionNumbers(rows=1, columns=2, batch=0)
    kinds = {
        "gaussian": {"projection": "gaussian"},
        "cosine": {"residual": False},
        "cosine, residual": {},
    }
    transformations = {"optax.ema": optax.ema(0.9, debias=False)} | {
        name: florax.flora_momentum(s.rank, dimension_numbers=lambda *_: stacked, **kind)
        for name, kind in kinds.items()
    }
    updates, states = {}, {}
    for name, tx in transformations.items():
        states[name] = jax.jit(tx.init)(grads)
        updates[name] = jax.jit(tx.update, donate_argnums=1).lower(grads, states[name]).compile()

    def seconds(name: str) -> float:
        start = time.perf_counter()
        new, states[name] = updates[name](grads, states[name])
        jax.block_until_ready((new, states[name]))
        return time.perf_counter() - start

    times = timing.take_turns({n: functools.partial(seconds, n) for n in updates}, s.rounds)
    return times | {"matrices": sum(leaf.shape[0] for leaf in shapes.values())}


def main(s: Settings) -> None:
    settings = {"model": s.model, "dtype": s.dtype, "rank": s.rank}
    row = results.get(s.results, "momentum", settings, lambda: measure(s))
    title = f"{row['matrices']} matrices of {s.model}, {s.dtype}, r = {s.rank}"
    print(f"{title}; milliseconds an update:\n{tables.times([row])}")


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))
