"""On two CPU cores, is the example's micro-step faster with sketched gradients?

    python benchmarks/main_job.py

The model, the batches and the optimizers of `examples/gpt2.py` at its defaults: `optax.MultiSteps`
and `full`, gradients summed in a scan, both with full-size momentum, against
`florax.value_and_update` with FLORA accumulation and momentum.
"""

import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import florax
from florax_benchmarks import results, tables, timing
from florax_benchmarks.steps import dense, full_size, one_by_one

sys.path.append(str(results.REPOSITORY / "examples"))
import gpt2
from florax_examples import optimizers


@dataclasses.dataclass(frozen=True)
class Settings:
    rounds: int = 30  # timed updates of each method, after two that are not
    results: Path = results.FOLDER  # folder for the JSON


def measure(s: Settings) -> dict[str, Any]:
    example = gpt2.Settings()
    config = gpt2.TINY
    graphdef, params = nnx.split(gpt2.GPT2(config, rngs=nnx.Rngs(0)))
    rows, length = (example.accumulate, example.micro_batch), example.length
    batch = {
        "ids": np.random.default_rng(0).integers(3, config.vocab_size, (*rows, length), np.int32),
        "begin": np.full(rows, length // 2, np.int32),
        "end": np.full(rows, length, np.int32),
    }

    def loss_fn(params: nnx.State, batch: Any) -> jax.Array:
        losses, counts = gpt2.target_losses(nnx.merge(graphdef, params), batch)
        return losses.sum() / counts.sum()

    adafactor = optax.adafactor(2e-3, multiply_by_parameter_scale=False)
    full = optax.chain(adafactor, optax.ema(example.momentum, debias=False))
    multisteps = optimizers.make(example, "naive", 2e-3)
    flora = optimizers.make(example, "flora", 2e-3)
    methods = {
        "full": (full, full_size(loss_fn, full), 1),
        "multisteps": (multisteps, one_by_one(loss_fn, multisteps), example.accumulate),
        "dense": (flora, dense(loss_fn, flora), 1),
        "sketched": (flora, florax.value_and_update(loss_fn, flora), 1),
    }
    jitted = {n: jax.jit(step, donate_argnums=(0, 1)) for n, (_, step, _) in methods.items()}
    copy = functools.partial(jax.tree.map, jax.numpy.copy)  # donated: each needs its own
    kept = {n: (copy(params), tx.init(params)) for n, (tx, *_) in methods.items()}

    def seconds(name: str) -> float:
        start, calls = time.perf_counter(), methods[name][2]
        for _ in range(calls):
            loss, *kept[name] = jitted[name](*kept[name], batch)
        loss.block_until_ready()
        return (time.perf_counter() - start) / example.accumulate

    turns = {name: functools.partial(seconds, name) for name in methods}
    return timing.take_turns(turns, s.rounds, warmup=2)


def main(s: Settings) -> None:
    row = results.get(s.results, "main_job", {}, lambda: measure(s))
    print(f"examples/gpt2.py at its defaults; milliseconds a micro-step:\n{tables.times([row])}")


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))
