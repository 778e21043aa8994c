"""What does the end of a cycle cost: decompressing and updating, without its micro-batches?

    python benchmarks/finish.py --model gpt2

One `florax.finish` of a model, layer by layer, against Adafactor's own update from mean gradients
of full size.
"""

import dataclasses
import functools
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
    shapes = models.parameter_shapes(s.shape, jnp.dtype(s.dtype))
    params = models.random_parameters(shapes, jax.random.key(0))

    def timed(name: str) -> Callable[[], float]:
        if name == "full":
            tx = florax.per_layer(optax.adafactor(LEARNING_RATE), models.is_stacked)

            def finish(params: Any, state: Any) -> tuple[Any, Any]:
                updates, state = tx.update(params, state, params)  # for their gradients
                return optax.apply_updates(params, updates), state
        else:
            tx = accumulation(name, s.accumulate, s.rank, s.side)
            finish = functools.partial(florax.finish, tx)
        state = jax.jit(tx.init)(params)
        if name != "full":  # zeros would be a special case
            state = jax.jit(functools.partial(florax.accumulate, tx))(params, state)
        compiled = jax.jit(finish).lower(params, state).compile()

        def seconds() -> float:
            start = time.perf_counter()
            jax.block_until_ready(compiled(params, state))
            return time.perf_counter() - start

        return seconds

    return timing.take_turns({name: timed(name) for name in s.methods}, s.rounds)


def main(s: Settings) -> None:
    row = workload.measure_together(s, "finish", measure)
    print(f"{s.title}; milliseconds an update, without its micro-batches:\n{tables.times([row])}")


if __name__ == "__main__":
    main(results.settings(Settings, f"{__doc__}\n{METHODS}"))
