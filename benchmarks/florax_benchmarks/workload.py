"""A model, a batch and methods: what memory.py, speed.py and peers.py measure, and their flags."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from florax_benchmarks import models, results
from florax_benchmarks.methods import Method, MethodName, make, stacked_shapes


@dataclasses.dataclass(frozen=True)
class Workload:
    model: models.ModelName = "gpt2"  # whose shape to train
    methods: tuple[MethodName, ...] = ("none", "full", "sketched")  # to compare
    dtype: Literal["float32", "bfloat16"] = "float32"  # of parameters and activations
    batch: int = 1  # rows of a micro-batch
    length: int = 512  # tokens of a row; of T5's target
    source: int = 512  # tokens that T5 reads; the other models have no source
    accumulate: int = 16  # micro-batches an update, of the methods that accumulate
    rank: int = 256  # of the sketches
    side: Literal["larger", "smaller"] = "larger"  # of a matrix that is projected
    results: Path = results.FOLDER  # folder for the JSON; what it has is not measured again

    def __post_init__(self):
        for name in ("batch", "length", "source", "accumulate", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.batch_shapes()  # says what is wrong with the length

    @property
    def shape(self) -> models.Shape:
        return models.SHAPES[self.model]

    @property
    def title(self) -> str:
        rows = f"{self.source}→{self.length}" if self.shape.family == "t5" else f"{self.length}"
        accumulate = f"×{self.accumulate}"
        rank = f"r = {self.rank} of the {self.side} side"
        return f"{self.model}, {self.dtype}, {self.batch}×{rows}, {accumulate}, {rank}"

    def settings(self) -> dict[str, Any]:
        """What identifies a row of the results."""
        names = ("model", "dtype", "batch", "length", "source", "accumulate", "rank", "side")
        return {name: getattr(self, name) for name in names}

    def batch_shapes(self) -> dict[str, Any]:
        return models.batch_shapes(self.shape, self.batch, self.length, self.source)


def measure_each(
    w: Workload,
    benchmark: str,
    measure: Callable[[Any, str, str | None], dict[str, Any] | None],
    **more: Any,
) -> list[dict[str, Any]]:
    """The rows of a benchmark that gives every method a process of its own.

    `measure` gets the workload, the method and a known program, as `results.get_of_program` says;
    `more` is what identifies a row beside the workload and the method.
    """

    def row(name: str) -> dict[str, Any]:
        isolated = functools.partial(results.isolated, measure, w, name)
        settings = w.settings() | {"method": name} | more
        return results.get_of_program(w.results, benchmark, settings, isolated)

    return [row(name) for name in w.methods]


class Lowered(NamedTuple):
    """A method's program, not compiled yet; `params`, `state` and `batches` are shapes."""

    method: Method
    program: jax.stages.Lowered
    params: Any
    state: Any
    batches: Any
    seconds: float  # of tracing

    def compile(self) -> "Compiled":
        start = time.perf_counter()
        step = self.program.compile()
        seconds = self.seconds + time.perf_counter() - start
        return Compiled(self.method, step, self.params, self.state, self.batches, seconds)


class Compiled(NamedTuple):
    """A compiled method; `params`, `state` and `batches` are shapes."""

    method: Method
    step: jax.stages.Compiled
    params: Any
    state: Any
    batches: Any
    seconds: float  # of tracing and compilation


def lower_method(workload: Workload, name: str) -> Lowered:
    w, batch = workload, workload.batch_shapes()
    params = models.parameter_shapes(w.shape, jnp.dtype(w.dtype))
    loss_fn = functools.partial(models.loss, w.shape)
    start = time.perf_counter()
    method = make(name, loss_fn, w.accumulate, w.rank, w.side)
    state = jax.eval_shape(method.init, params)
    batches = stacked_shapes(batch, method.micro_batches)
    program = jax.jit(method.step, donate_argnums=(0, 1)).lower(params, state, batches)
    return Lowered(method, program, params, state, batches, time.perf_counter() - start)


class Running:
    """Parameters, state and random tokens for a compiled method, on the device."""

    def __init__(self, compiled: Compiled, vocabulary: int):
        self.compiled, key = compiled, jax.random.key(0)
        self.params = models.random_parameters(compiled.params, key)
        self.state = jax.jit(compiled.method.init)(self.params)
        tokens = functools.partial(jax.random.randint, key, minval=0, maxval=vocabulary)
        self.batches = jax.tree.map(lambda x: tokens(x.shape).astype(x.dtype), compiled.batches)
        jax.block_until_ready((self.params, self.state, self.batches))

    def update(self) -> float:
        """Train for one update; its seconds a micro-step."""
        c, start = self.compiled, time.perf_counter()
        for _ in range(c.method.calls):
            loss, self.params, self.state = c.step(self.params, self.state, self.batches)
        self.loss = float(loss)
        return (time.perf_counter() - start) / (c.method.calls * c.method.micro_batches)
