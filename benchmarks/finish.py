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

    def timed(name: str) -> Callable[[], float]:
        params = models.random_parameters(shapes, jax.random.key(0))
        if name == "full":
            tx = florax.per_layer(optax.adafactor(LEARNING_RATE), models.is_stacked)
            state, grads = jax.jit(tx.init)(params), jax.tree.map(jnp.copy, params)

            def finish(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state

            rest = (grads,)
            ready = lambda params, state: state  # noqa: E731
        else:
            tx = accumulation(name, s.accumulate, s.rank, s.side)
            state, rest = jax.jit(tx.init)(params), ()
            finish = functools.partial(florax.finish, tx)
            # Zeros would be a special case.
            accumulate = functools.partial(florax.accumulate, tx)
            ready = jax.jit(lambda params, state: accumulate(params, state), donate_argnums=1)
        compiled = jax.jit(finish, donate_argnums=(0, 1)).lower(params, state, *rest).compile()
        held = [params, state]

        def seconds() -> float:
            params, state = held
            state = jax.block_until_ready(ready(params, state))
            start = time.perf_counter()
            held[:] = jax.block_until_ready(compiled(params, state, *rest))
            return time.perf_counter() - start

        return seconds

    return timing.take_turns({name: timed(name) for name in s.methods}, s.rounds)


def main(s: Settings) -> None:
    row = workload.measure_together(s, "finish", measure)
    print(f"{s.title}; milliseconds an update, without its micro-batches:\n{tables.times([row])}")


if __name__ == "__main__":
    main(results.settings(Settings, f"{__doc__}\n{METHODS}"))
