"""Training steps written by hand: (params, state, micro-batches) -> (loss, params, state).

Micro-batches have a leading axis, also where a step takes one of them.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

import florax

Loss: TypeAlias = Callable[[Any, Any], jax.Array]  # of parameters and a micro-batch
Step: TypeAlias = Callable[[Any, Any, Any], tuple[jax.Array, Any, Any]]


def one_by_one(loss_fn: Loss, tx: optax.GradientTransformation) -> Step:
    """An ordinary step: all gradients, then all updates."""

    def step(params: Any, state: Any, batches: Any) -> tuple[jax.Array, Any, Any]:
        loss, grads = jax.value_and_grad(loss_fn)(params, first(batches))
        updates, state = tx.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    return step


def full_size(loss_fn: Loss, tx: optax.GradientTransformation) -> Step:
    """Accumulation without florax: the mean gradient in float32, in a scan."""

    def step(params: Any, state: Any, batches: Any) -> tuple[jax.Array, Any, Any]:
        count = len(jax.tree.leaves(batches)[0])

        def micro_step(total: Any, batch: Any) -> tuple[Any, jax.Array]:
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32) / count, grads)
            return optax.tree.add(total, grads), loss

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        total, losses = jax.lax.scan(micro_step, zeros, batches)
        grads = jax.tree.map(lambda t, p: t.astype(p.dtype), total, params)
        updates, state = tx.update(grads, state, params)
        return losses.mean(), optax.apply_updates(params, updates), state

    return step


def dense(loss_fn: Loss, tx: optax.GradientTransformation) -> Step:
    """The paper's way: a full-size gradient a micro-batch, compressed once it exists."""

    def step(params: Any, state: Any, batches: Any) -> tuple[jax.Array, Any, Any]:
        def micro_step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            return florax.accumulate(tx, grads, state), loss

        state, losses = jax.lax.scan(micro_step, state, batches)
        return losses.mean(), *florax.finish(tx, params, state)

    return step


def first(batches: Any) -> Any:
    """The first of some micro-batches."""
    return jax.tree.map(lambda x: x[0], batches)
