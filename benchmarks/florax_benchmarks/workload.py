"""A model, a batch and a method: what memory.py and speed.py measure, and their common flags."""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import models
from methods import METHODS, Method, make, stacked_shapes

import results


@dataclasses.dataclass(frozen=True)
class Workload:
    model: Literal[tuple(models.SHAPES)] = "gpt2"  # type: ignore[valid-type]
    methods: tuple[Literal[METHODS], ...] = ("none", "full", "sketched")  # type: ignore
    dtype: Literal["float32", "bfloat16"] = "float32"  # of parameters and activations
    batch: int = 1  # rows of a micro-batch
    length: int = 512  # tokens of a row; of T5's target
    source: int = 512  # tokens that T5 reads; the other models have no source
    accumulate: int = 16  # micro-batches an update, of the methods that accumulate
    rank: int = 256
    side: Literal["larger", "smaller"] = "larger"  # of a matrix, to be projected
    results: Path = results.FOLDER  # folder for the JSON; rows that are there are not run again

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


class Compiled(NamedTuple):
    """A compiled method; `params`, `state` and `batches` are shapes."""

    method: Method
    step: jax.stages.Compiled
    params: Any
    state: Any
    batches: Any
    seconds: float  # of tracing and compilation


def compile_method(workload: Workload, name: str) -> Compiled:
    w, batch = workload, workload.batch_shapes()
    params = models.parameter_shapes(w.shape, jnp.dtype(w.dtype))
    loss_fn = functools.partial(models.loss, w.shape)
    start = time.perf_counter()
    method = make(name, loss_fn, w.accumulate, w.rank, w.side, batch)
    state = jax.eval_shape(method.init, params)
    batches = stacked_shapes(batch, method.micro_batches)
    step = jax.jit(method.step, donate_argnums=(0, 1)).lower(params, state, batches).compile()
    return Compiled(method, step, params, state, batches, time.perf_counter() - start)


class Running:
    """Parameters, state and random tokens for a compiled method, on the device."""

    def __init__(self, compiled: Compiled, vocabulary: int):
        self.compiled, key = compiled, jax.random.key(0)
        self.params = models.random_parameters(compiled.params, key)
        self.state = jax.jit(compiled.method.init)(self.params)
        tokens = functools.partial(jax.random.randint, key, minval=0, maxval=vocabulary)
        self.batches = jax.tree.map(lambda x: tokens(x.shape), compiled.batches)
        jax.block_until_ready((self.params, self.state, self.batches))

    def update(self) -> float:
        """Train for one update; its seconds a micro-step."""
        c, start = self.compiled, time.perf_counter()
        for _ in range(c.method.calls):
            loss, self.params, self.state = c.step(self.params, self.state, self.batches)
        self.loss = float(loss)
        return (time.perf_counter() - start) / (c.method.calls * c.method.micro_batches)
