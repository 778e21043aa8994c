"""What does the end of a cycle cost: decompressing and updating, without its micro-batches?

    python benchmarks/finish.py --model gpt2

One `florax.finish` of a model, layer by layer, against Adafactor's own update from mean gradients
of full size.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import florax
from florax_benchmarks import models, results, tables, timing, workload
from florax_benchmarks.methods import LEARNING_RATE, MethodName, accumulation
from florax_benchmarks.methods import __doc__ as METHODS


@dataclasses.dataclass(frozen=True)
class Settings(workload.Workload):
    methods: tuple[MethodName, ...] = ("full", "sketched", "both")  # full, or of florax
    rounds: int = 10  # timed updates of each, after one that is not


def measure(s: Settings) -> dict[str, Any]:
    return timing.take_turns({name: finishing(s, name) for name in s.methods}, s.rounds)


def finishing(s: Settings, name: str) -> Callable[[], float]:
    """What updates once, in place, and says how many seconds it took."""
    shapes = models.parameter_shapes(s.shape, jnp.dtype(s.dtype))
    params = models.random_parameters(shapes, jax.random.key(0))
    if name == "full":
        tx = florax.per_layer(optax.adafactor(LEARNING_RATE), models.is_stacked)
        grads = jax.tree.map(jnp.copy, params)

        def accumulate(params: Any, state: Any) -> Any:
            return state

        def finish(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state
    else:
        tx, grads = accumulation(name, s.accumulate, s.rank, s.side), None

        def accumulate(params: Any, state: Any) -> Any:
            return florax.accumulate(tx, params, state)  # of zeros, updating would be another thing

        def finish(params: Any, state: Any, grads: None) -> tuple[Any, Any]:
            return florax.finish(tx, params, state)

    state = jax.jit(tx.init)(params)
    accumulated = jax.jit(accumulate, donate_argnums=1)
    finished = jax.jit(finish, donate_argnums=(0, 1)).lower(params, state, grads).compile()

    def seconds() -> float:
        nonlocal params, state
        state = jax.block_until_ready(accumulated(params, state))
        start = time.perf_counter()
        params, state = jax.block_until_ready(finished(params, state, grads))
        return time.perf_counter() - start

    return seconds


def main(s: Settings) -> None:
    settings = s.settings() | {"methods": list(s.methods)}
    row = results.get(s.results, "finish", settings, lambda: measure(s))
    print(f"{s.title}; milliseconds an update, without its micro-batches:\n{tables.times([row])}")


if __name__ == "__main__":
    main(results.settings(Settings, f"{__doc__}\n{METHODS}"))
