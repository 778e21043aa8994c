"""Whole accumulating steps inside one jit: a loss, a transformation, micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from florax import _accumulate, _sketches, _sketching


def value_and_update(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformation, has_aux: bool = False
) -> Callable[..., tuple[Any, optax.Params, _accumulate.FloraAccumulateState]]:
    """Make a step that accumulates born-compressed gradients and updates, for one jit.

    The step scans over micro-batches; each one's sketches are added to the state's in place, and
    with them what is kept dense, so that neither a second set of sketches nor a full-size gradient
    of a compressed matrix exists. `finish` then updates the parameters leaf by leaf. In 16 bits
    (`accumulator_dtype`), and with `should_skip_update_fn`, every micro-batch's gradients are made
    first and added then, as `value_and_grad` and `accumulate` do.

    Args:
      loss_fn: `loss_fn(params, *batch)`, a scalar, or a pair of it and anything else (`aux`).
      tx: what `flora_accumulate` returned. Wrap its base optimizer in `per_layer` if layers are
        stacked, and the update proceeds layer by layer. How many micro-batches there are is seen
        from the batch; `every_k_schedule` plays no part.
      has_aux: whether the loss returns a pair.

    Returns:
      `step(params, state, *micro_batches) -> (loss, params, state)`, where every array in
      `micro_batches` has a leading axis of micro-batches: the mean loss (with `has_aux` a pair of
      it and the stacked aux), and the updated parameters and state. Jit it and donate both.

    Raises:
      TypeError: `tx` is not a `flora_accumulate`.
      ValueError: there are no micro-batches.

    >>> import florax, functools, jax, jax.numpy as jnp, optax
    >>> tx = florax.flora_accumulate(optax.sgd(0.1), every_k_schedule=4, rank=2)
    >>> loss_fn = lambda w, x: jnp.mean((x @ w - 1) ** 2)
    >>> step = jax.jit(florax.value_and_update(loss_fn, tx), donate_argnums=(0, 1))
    >>> params = jnp.zeros((8, 4))
    >>> loss, params, state = step(params, tx.init(params), jnp.ones((4, 16, 8)))
    >>> float(loss), params.shape, int(state.gradient_step)
    (1.0, (8, 4), 1)

    Source: Algorithm 1 of Hao et al., 2024 (arXiv:2402.03293), without its full-size gradients.
    """
    _accumulate.check_transformation("value_and_update", tx)

    def step(
        params: optax.Params, state: _accumulate.FloraAccumulateState, *micro_batches: Any
    ) -> tuple[Any, optax.Params, _accumulate.FloraAccumulateState]:
        if not jax.tree.leaves(micro_batches):
            raise ValueError(
                "value_and_update needs micro-batches to scan over, got none. Pass arrays with a "
                "leading axis of micro-batches after params and state."
            )
        _accumulate.check_state("value_and_update", state)
        accumulate_all = _sum_in_place if _can_sum_in_place(state) else _gradients_first
        results, state = accumulate_all(loss_fn, has_aux, params, state, micro_batches)
        loss, aux = results if has_aux else (results, None)
        params, state = _accumulate.finish(tx, params, state)
        return (jnp.mean(loss), aux) if has_aux else jnp.mean(loss), params, state

    return step


def _can_sum_in_place(state: _accumulate.FloraAccumulateState) -> bool:
    # A skipped gradient must not be in the sum yet, and a sum in 16 bits needs its own rounding.
    wide = all(x.dtype == jnp.promote_types(x.dtype, jnp.float32) for x in state.sketch.leaves())
    return wide and state.rule.should_skip_update_fn is None


def _gradients_first(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    params: optax.Params,
    state: _accumulate.FloraAccumulateState,
    micro_batches: tuple[Any, ...],
) -> tuple[Any, _accumulate.FloraAccumulateState]:
    """Accumulate the gradients of all micro-batches; what the loss returned comes stacked."""
    value_and_grad = _sketching.value_and_grad(loss_fn, has_aux=has_aux)

    def micro_step(
        state: _accumulate.FloraAccumulateState, batch: tuple[Any, ...]
    ) -> tuple[_accumulate.FloraAccumulateState, Any]:
        result, grads = value_and_grad(params, *batch, opt_state=state)
        return _accumulate.accumulate(grads, state, params), result

    state, results = jax.lax.scan(micro_step, state, micro_batches)
    return results, state


def _sum_in_place(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    params: optax.Params,
    state: _accumulate.FloraAccumulateState,
    micro_batches: tuple[Any, ...],
) -> tuple[Any, _accumulate.FloraAccumulateState]:
    """The same, with the backward pass itself adding to the sums of the state."""
    leaves, key, cycle = state.sketch.plan, state.key, state.gradient_step
    _sketches.match(params, leaves)
    # The keys once for all micro-batches. Dense leaves too: their gradients are summed in place.
    found = _sketching.with_keys(dict(enumerate(leaves)), key, cycle)

    def micro_step(sums: list[jax.Array], batch: tuple[Any, ...]) -> tuple[list[jax.Array], Any]:
        program = _sketching.trace_loss(loss_fn, 0, has_aux, (params, *batch), {})
        result, new, dense = _sketching.differentiate(program, found, dict(enumerate(sums)))
        # What could not be followed through the loss has its gradient at full size.
        numbers = sorted(dense)
        own_leaves = tuple(leaves[i] for i in numbers)
        grads = _sketches.compress([dense[i] for i in numbers], own_leaves, key, cycle)
        new |= {i: sums[i] + grad for i, grad in zip(numbers, grads, strict=True)}
        return [new[i] for i in range(len(leaves))], result

    # Sums, not the running mean that the state keeps: a mean would be scaled at every micro-step.
    mean, sums = state.rule.use_grad_mean, state.sketch.leaves()
    if mean:
        sums = [x * state.mini_step.astype(x.dtype) for x in sums]
    sums, results = jax.lax.scan(micro_step, sums, micro_batches)
    count = state.mini_step + len(jax.tree.leaves(micro_batches)[0])
    if mean:
        sums = [x / count.astype(x.dtype) for x in sums]
    return results, state._replace(mini_step=count, sketch=state.sketch.replace(sums))


def microbatch_accumulator(
    state: _accumulate.FloraAccumulateState,
) -> optax.microbatching.Accumulator:
    """Accumulate gradients as sketches in `optax.microbatch`.

    Args:
      state: state of `flora_accumulate`, to which the gradients are added.

    Returns:
      An `optax.microbatching.Accumulator` for that part of a function's results which is a tree of
      gradients, full-size or born compressed; its result is the state, ready for `finish`.

    Raises:
      TypeError: `state` is the state of something else.

    >>> import florax, jax, jax.numpy as jnp, optax
    >>> tx = florax.flora_accumulate(optax.sgd(0.1), every_k_schedule=4, rank=2)
    >>> @jax.jit
    ... def step(params, state, batch):
    ...     grad = jax.grad(lambda w, x: jnp.mean((x @ w - 1) ** 2))
    ...     accumulator = florax.microbatch_accumulator(state)
    ...     state = optax.microbatch(grad, 1, 16, accumulator)(params, batch)
    ...     return florax.finish(tx, params, state)
    >>> params = jnp.zeros((8, 4))
    >>> params, state = step(params, tx.init(params), jnp.ones((64, 8)))
    >>> params.shape, int(state.gradient_step)
    ((8, 4), 1)
    """
    _accumulate.check_state("microbatch_accumulator", state)
    return optax.microbatching.Accumulator(
        init=lambda shapes: state,
        update=lambda carry, grads, index: _accumulate.accumulate(grads, carry),
        finalize=lambda carry: carry,
        aggregate=_refuse_to_aggregate,
    )


def _refuse_to_aggregate(values: Any) -> Any:
    raise TypeError(
        "microbatch_accumulator adds micro-batches one by one: use optax.microbatch, not "
        "optax.microbatching.micro_vmap."
    )
