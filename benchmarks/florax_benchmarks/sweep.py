"""A variant trains on a task, at several learning rates from several seeds at once."""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import florax
from florax_benchmarks import baselines, results, variants
from florax_benchmarks.tasks import Task

EVALUATED = 16  # held-out examples at a time, of each run
WARMUP = 0.05  # share of the updates, of tasks that have a schedule


class Run(NamedTuple):
    """Of a variant on a task."""

    rate: float  # the learning rate, at its peak
    seed: int  # of parameters, the order of the data and projections


class Outcome(NamedTuple):
    """Of a run: held-out losses, and the parameters on the host."""

    validation: float
    test: float
    params: Any


class Sweep:
    """Runs of one variant on one task, so many at a time, by one compiled program.

    Attributes:
      task: what is learned.
      bytes: of parameters, accumulator and what else there is beside parameters, of one run.
      lowered: the program, not compiled yet.
      seconds: of all runs so far together, without compilation.
    """

    def __init__(self, task: Task, variant: str, at_once: int):
        """Nothing is compiled yet.

        Args:
          task: what is learned.
          variant: its name.
          at_once: runs that the program trains.
        """
        self._variant, self._at_once = variants.parse(variant), at_once
        if self._variant.accumulator is None and self._variant.few_examples:
            task = task._replace(accumulate=1)
        self.task, self.seconds = task, 0.0
        self.bytes = _bytes(task, self._variant)
        data = {"train": task.train, "validation": task.validation, "test": task.test}
        self._given = (data, task.saved)
        program = jax.jit(jax.vmap(self._train, (0, 0, 0, None, None)))
        runs = self._inputs([Run(1e-3, seed) for seed in range(at_once)])
        self.lowered = program.lower(*runs, *self._given)
        self._compiled: jax.stages.Compiled | None = None

    def train(self, runs: Sequence[Run]) -> list[Outcome]:
        """Of these runs, at most `at_once`."""
        if self._compiled is None:
            self._compiled = self.lowered.compile()
            self._given = jax.device_put(self._given)
        # The program has as many: the last one takes the place of those that are missing.
        filled = [*runs, *[runs[-1]] * (self._at_once - len(runs))]
        inputs = jax.block_until_ready((*self._inputs(filled), *self._given))
        with results.alone():
            start = time.perf_counter()
            trained = jax.block_until_ready(self._compiled(*inputs))
            self.seconds += time.perf_counter() - start
        validation, test, params = jax.device_get(trained)
        return [
            Outcome(float(validation[i]), float(test[i]), jax.tree.map(lambda x, i=i: x[i], params))
            for i in range(len(runs))
        ]

    def _inputs(self, runs: Sequence[Run]) -> tuple[Array, Array, Array]:
        rates, seeds = (jnp.array(own) for own in zip(*runs, strict=True))
        orders = {run.seed: _order(self.task, run.seed) for run in runs}
        order = np.stack([orders[run.seed] for run in runs])
        if self._variant.accumulator is None:  # every micro-batch is an update's
            order = order.reshape(len(runs), -1, 1, self.task.micro_batch)
        return rates, seeds, jnp.array(order)

    def _train(self, rate: Array, seed: Array, order: Array, data: Any, saved: Any) -> Any:
        key = jax.random.key(seed)
        run = _Optimization(self.task, self._variant, rate, key, len(order), saved)

        def update(carry: Any, rows: Array) -> tuple[Any, Array]:
            loss, *carry = run.step(*carry, self.task.take(data["train"], rows))
            return tuple(carry), loss

        (trained, _), _ = jax.lax.scan(update, (run.trained, run.tx.init(run.trained)), order)
        params = run.merge(trained)
        losses = [_heldout(self.task, params, data[split]) for split in ("validation", "test")]
        return *losses, params


class _Optimization:
    """One run's optimizer, the trained parameters at its start, and its step."""

    def __init__(
        self, task: Task, v: variants.Variant, rate: Any, key: Array, updates: int, saved: Any
    ):
        params = task.init(key, saved)
        self.trained, self.merge, is_stacked = params, lambda trained: trained, task.is_stacked
        if variants.has_adapters(v.base):
            self.trained, frozen, merge = baselines.adapt(params, v.base_rank, task.matrices, key)
            self.merge = lambda trained: merge(trained, frozen)
            is_stacked = baselines.are_stacked_too(params, is_stacked)

        def loss(trained: Any, batch: Any) -> Array:
            losses, counts = task.losses(self.merge(trained), batch)
            return losses.sum() / counts.sum()

        rates = functools.partial(_rate, rate, updates if task.is_scheduled else None)
        opt = variants.optimizer(v, rates, task.matrices, is_stacked, task.resample_every, key)
        self.tx, self.step = variants.accumulating(
            v, loss, opt, task.accumulate, task.matrices, key
        )


def _rate(peak: Any, updates: int | None, count: Any) -> Any:
    if updates is None:
        return peak
    warmup = max(1, round(WARMUP * updates))
    return peak * optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, updates)(count)


def _order(task: Task, seed: int) -> np.ndarray:
    """The examples of each update's micro-batches: (updates, micro-batches, examples)."""
    updates, examples = task.updates, task.accumulate * task.micro_batch
    if task.order:
        rows = task.order(seed, updates, examples)
    else:
        total = len(jax.tree.leaves(task.train)[0])
        draw = np.random.default_rng(seed)
        epochs = -(-updates * examples // total)
        rows = np.concatenate([draw.permutation(total) for _ in range(epochs)])
    return rows.reshape(-1)[: updates * examples].reshape(updates, -1, task.micro_batch)


def _heldout(task: Task, params: Any, data: Any) -> Array:
    """The mean loss of all tokens that count."""
    total = len(jax.tree.leaves(data)[0])
    numbers = jnp.arange(-(-total // EVALUATED) * EVALUATED).reshape(-1, EVALUATED)

    def sums(numbers: Array) -> tuple[Array, Array]:
        batch = jax.tree.map(lambda x: x[numbers % total], data)
        losses, counts = task.losses(params, batch)
        counts &= (numbers < total).reshape(-1, *(1,) * (losses.ndim - 1))
        return jnp.where(counts, losses, 0.0).sum(), counts.sum()

    losses, counts = jax.lax.map(sums, numbers)
    return losses.sum() / counts.sum()


def _bytes(task: Task, v: variants.Variant) -> dict[str, int]:
    """Those of one run, by shapes alone."""

    def parts(saved: Any) -> Any:
        run = _Optimization(task, v, 1.0, jax.random.key(0), 2, saved)
        state, accumulator = run.tx.init(run.trained), ()
        if isinstance(state, florax.FloraAccumulateState):
            accumulator, state = state.sketch, state.inner_opt_state
        elif v.accumulator is not None:  # made in the step, in float32
            accumulator = jax.tree.map(lambda x: x.astype(jnp.float32), run.trained)
        adapters = run.trained["adapters"] if variants.has_adapters(v.base) else ()
        params = task.init(jax.random.key(0), saved)
        return {"parameter": params, "accumulator": accumulator, "optimizer": (state, adapters)}

    shapes = jax.eval_shape(parts, task.saved)
    return {
        f"{name}_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for name, tree in shapes.items()
    }
