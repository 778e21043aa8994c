"""How long do models whose layers are not stacked take to compile?

    python benchmarks/compile_time.py --case llama --methods plain multisteps dense sketched
    python benchmarks/compile_time.py --case matrices --methods ema momentum multisteps accumulate

Of a model, a step, every layer's matrices as leaves of their own:

    plain        gradients and the base optimizer, no accumulation
    multisteps   full-size gradients and `optax.MultiSteps` around it
    dense        full-size gradients and `florax.flora_accumulate` around it
    sketched     `florax.value_and_grad`, and `flora_accumulate`
    int8         as dense, without sketches, in 8 bits

Of 200 matrices, an update by itself: `optax.MultiSteps` against `flora_accumulate` (`accumulate`),
and `optax.ema` against `flora_momentum` (`momentum`, and `cosine` with the other projection).

Every method has a process of its own and compiles once, after something trivial; nothing is
allocated. The processor's seconds are those of all threads, and other work on the machine counts
less in them than in those of the clock.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import florax
from florax_benchmarks import models, results, tables

SHAPES = {
    "llama": models.Shape("llama", 24, 512, 8, 64, 1376, 32000),
    **{name: models.SHAPES[name] for name in ("llama-1b", "gpt2", "t5-small")},
}
MATRICES = [(512, 512), (512, 1376), (1376, 512), (512, 2048)] * 50
OF_MODELS = ("plain", "multisteps", "dense", "sketched", "int8")
OF_MATRICES = ("ema", "momentum", "cosine", "multisteps", "accumulate")
OPTIMIZERS = {"adafactor": optax.adafactor(1e-3), "sgd": optax.sgd(1e-3)}


@dataclasses.dataclass(frozen=True)
class Settings:
    case: Literal[*SHAPES, "matrices"] = "llama"  # what to compile
    methods: tuple[Literal[*dict.fromkeys(OF_MODELS + OF_MATRICES)], ...] = ()  # none named: all
    optimizer: Literal[*OPTIMIZERS] = "adafactor"  # the base optimizer
    rank: int = 16  # of the sketches
    results: Path = results.FOLDER  # folder for the JSON

    def __post_init__(self):
        for name in set(self.methods) - set(self.of_case):
            raise ValueError(f"{self.case} has the methods {', '.join(self.of_case)}; got {name}")

    @property
    def of_case(self) -> tuple[str, ...]:
        return OF_MATRICES if self.case == "matrices" else OF_MODELS


def program(s: Settings, name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What to compile, and the shapes of its arguments."""
    opt = OPTIMIZERS[s.optimizer]
    if name in ("dense", "sketched", "accumulate"):
        tx = florax.flora_accumulate(opt, 4, ranks(s))
    elif name == "int8":
        tx = florax.flora_accumulate(opt, 4, lambda path, leaf: None, accumulator_dtype=jnp.int8)
    elif name == "multisteps":
        tx = optax.MultiSteps(opt, 4).gradient_transformation()
    elif name == "ema":
        tx = optax.ema(0.9, debias=False)
    elif name in ("momentum", "cosine"):
        projection = "cosine" if name == "cosine" else "gaussian"
        tx = florax.flora_momentum(s.rank, projection=projection, residual=False)
    else:
        tx = opt

    if s.case == "matrices":
        params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in MATRICES]
        return tx.update, (params, jax.eval_shape(tx.init, params), params)

    shape = SHAPES[s.case]
    params = models.unstacked(models.parameter_shapes(shape, jnp.dtype("float32")))
    loss = functools.partial(models.loss, shape)

    def step(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any, Any]:
        if name == "sketched":
            value, grads = florax.value_and_grad(loss, tx)(params, batch, opt_state=state)
        else:
            value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    batch = models.batch_shapes(shape, 4, 128, 128)
    return step, (params, jax.eval_shape(tx.init, params), batch)


def ranks(s: Settings) -> Any:
    """Attention and feed-forward matrices have sketches, as in the paper."""
    if s.case == "matrices":
        return s.rank
    return lambda path, leaf: s.rank if florax.attention_and_feed_forward(path, leaf) else None


def measure(s: Settings, name: str) -> dict[str, Any]:
    jax.jit(lambda x: x + 1).lower(1.0).compile()  # starts the compiler, on no method's account
    function, arguments = program(s, name)
    donated = 1 if s.case == "matrices" else (0, 1)
    clocks = [(time.perf_counter(), time.process_time())]
    traced = jax.jit(function, donate_argnums=donated).trace(*arguments)
    clocks.append((time.perf_counter(), time.process_time()))
    lowered = traced.lower()
    clocks.append((time.perf_counter(), time.process_time()))
    compiled = lowered.compile()
    clocks.append((time.perf_counter(), time.process_time()))
    memory = compiled.memory_analysis()
    seconds = [[b - a for a, b in itertools.pairwise(clock)] for clock in zip(*clocks, strict=True)]
    wall, cpu = (dict(zip(("trace", "lower", "compile"), own, strict=True)) for own in seconds)
    unaliased = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "seconds": round(sum(wall.values()), 2),
        "processor_seconds": round(sum(cpu.values()), 2),
        "parts": {name: round(x, 2) for name, x in wall.items()},
        "processor_parts": {name: round(x, 2) for name, x in cpu.items()},
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes + unaliased,
    }


def main(s: Settings) -> None:
    rows = []
    for name in s.methods or s.of_case:
        settings = {"case": s.case, "optimizer": s.optimizer, "rank": s.rank, "method": name}
        isolated = functools.partial(results.isolated, measure, s, name)
        rows.append(results.get(s.results, "compile_time", settings, isolated))
    title = f"{s.case}, unstacked, {s.optimizer}, r = {s.rank}"
    print(f"{title}; seconds to compile:\n{tables.compile_time(rows)}")


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))
