"""A variant trains on a task at all learning rates from all seeds at once: one compiled program."""

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


class Sweep(NamedTuple):
    """A program that is not compiled yet, and its arguments."""

    task: Task
    lowered: jax.stages.Lowered
    arguments: tuple[Any, ...]
    bytes: dict[str, int]  # of parameters, accumulator and what else there is beside parameters


class Outcome(NamedTuple):
    """Arrays are by learning rate and seed."""

    validation: np.ndarray
    test: np.ndarray
    params: Any  # parameters with these two leading axes
    seconds: float  # of all runs together, without compilation


def prepare(task: Task, name: str, learning_rates: Sequence[float], seeds: int) -> Sweep:
    """The sweep of the variant of this name."""
    v = variants.parse(name)
    task = task if v.accumulator or not v.few_examples else task._replace(accumulate=1)
    order = np.stack([_order(task, seed) for seed in range(seeds)])
    if v.accumulator is None:
        order = order.reshape(seeds, -1, 1, task.micro_batch)

    def one(rate: Array, seed: Array, order: Array, data: Any, saved: Any) -> Any:
        run = _Run(task, v, rate, jax.random.key(seed), len(order), saved)

        def update(carry: Any, rows: Array) -> tuple[Any, Array]:
            loss, *carry = run.step(*carry, task.take(data["train"], rows))
            return tuple(carry), loss

        (trained, _), _ = jax.lax.scan(update, (run.trained, run.tx.init(run.trained)), order)
        params = run.merge(trained)
        losses = [_heldout(task, params, data[split]) for split in ("validation", "test")]
        return *losses, params

    data = {"train": task.train, "validation": task.validation, "test": task.test}
    over_seeds = jax.vmap(one, (None, 0, 0, None, None))
    program = jax.jit(jax.vmap(over_seeds, (0, None, None, None, None)))
    arguments = (jnp.array(learning_rates), jnp.arange(seeds), order, data, task.saved)
    lowered = program.lower(*arguments)
    return Sweep(task, lowered, arguments, _bytes(task, v))


def run(sweep: Sweep) -> Outcome:
    compiled = sweep.lowered.compile()
    arguments = jax.block_until_ready(jax.device_put(sweep.arguments))
    with results.alone():
        start = time.perf_counter()
        validation, test, params = jax.block_until_ready(compiled(*arguments))
        seconds = time.perf_counter() - start
    return Outcome(np.asarray(validation), np.asarray(test), params, seconds)


class _Run:
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
        run = _Run(task, v, 1.0, jax.random.key(0), 2, saved)
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
