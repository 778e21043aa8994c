"""Whole steps inside one jit: from a loss, an optimizer and data to new parameters."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from florax import (
    _accumulate,
    _calls,
    _cycle,
    _dimensions,
    _layerwise,
    _sketches,
    _slots,
    _stored,
    _value_and_grad,
)


def value_and_update(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    has_aux: bool = False,
    layerwise: bool = False,
) -> Callable[..., tuple[Any, optax.Params, optax.OptState]]:
    """Make a step with gradients that are born compressed, or updated layer by layer, for one jit.

    With a `flora_accumulate` in `tx` a step is a whole cycle: it scans over micro-batches; each
    one's sketches are added to the state's in place, and with them what is kept dense, so that
    neither a second set of sketches nor a full-size gradient of a compressed matrix exists. The
    update then proceeds as by `finish`: leaf by leaf, and by layers where there is a `per_layer` in
    it. An accumulator of 8 or 4 bits travels the same way: of a stack that the loss scans over, one
    layer's gradient, or sketch, is there in float32 at a time. In 16 bits (`accumulator_dtype`),
    and with `should_skip_update_fn`, every micro-batch's gradients are made first and added then,
    as `value_and_grad` and `accumulate` do.

    With `layerwise=True` one layer's gradient is alive at a time. It is for a model whose layers
    are stacked and scanned (`jax.lax.scan`, `flax.nnx.scan`, `flax.linen.scan`): `per_layer` in
    `tx` says which leaves are the layers, and the loss must scan over them. Without accumulation,
    every layer is updated as its gradient appears in the backward pass; only the inputs of layers
    are kept, and the layers recomputed, as under `jax.checkpoint`. With accumulation it is what
    happens anyway, or an error. The result is that of the ordinary step.

    Args:
      loss_fn: `loss_fn(params, *args)`, a real scalar, or a pair of it and anything else (`aux`).
      tx: an optimizer with `flora_accumulate` in it, reached through chains, masks, partitions or
        injected hyperparameters only; with `layerwise=True` any that updates every leaf by itself
        (Adam, Adafactor, Lion, `flora`), with `per_layer` in it. How many micro-batches there are
        is seen from the batch; `every_k_schedule` plays no part.
      has_aux: whether the loss returns a pair.
      layerwise: whether every layer is updated as its gradient appears.

    Returns:
      `step(params, state, *args, **extra_args) -> (loss, params, state)`, with the state of
      `tx.init(params)`; jit it and donate both. With accumulation every array in `args` has a
      leading axis of micro-batches, the loss is their mean, and arrays in `aux` come stacked. With
      `has_aux` the first result is a pair `(loss, aux)`. `extra_args` go to the optimizer, and the
      loss as `value`.

    Raises:
      TypeError: `tx` does not accumulate, nor is `layerwise` set; an argument is no array.
      ValueError: there are no micro-batches, or not as many in every argument; something in `tx`
        needs full gradients first, mixes leaves, or trains leaves beside the accumulation; the loss
        does not scan over what `per_layer` takes for layers. The message says what was found.

    >>> import florax, functools, jax, jax.numpy as jnp, optax
    >>> tx = florax.flora_accumulate(optax.sgd(0.1), every_k_schedule=4, rank=2)
    >>> loss_fn = lambda w, x: jnp.mean((x @ w - 1) ** 2)
    >>> step = jax.jit(florax.value_and_update(loss_fn, tx), donate_argnums=(0, 1))
    >>> params = jnp.zeros((8, 4))
    >>> loss, params, state = step(params, tx.init(params), jnp.ones((4, 16, 8)))
    >>> float(loss), params.shape, int(state.gradient_step)
    (1.0, (8, 4), 1)

    Layer by layer:

    >>> def scanned_loss(params, x):
    ...     layer = lambda x, w: (jnp.tanh(x @ w), None)
    ...     x, _ = jax.lax.scan(layer, x @ params["embed"], params["layers"])
    ...     return jnp.mean(x**2)
    >>> params = {"embed": jnp.ones((4, 8)) / 4, "layers": jnp.stack([jnp.eye(8)] * 6)}
    >>> tx = florax.per_layer(optax.adam(1e-2), {"embed": False, "layers": True})
    >>> step = florax.value_and_update(scanned_loss, tx, layerwise=True)
    >>> step, state = jax.jit(step, donate_argnums=(0, 1)), tx.init(params)
    >>> for _ in range(3):
    ...     loss, params, state = step(params, state, jnp.ones((16, 4)))
    ...     print(f"{loss:.3f}")
    0.193
    0.105
    0.048

    Source: Algorithm 1 of Hao et al., 2024 (arXiv:2402.03293), without its full-size gradients; and
    the fused update of LOMO (Lv et al., 2023, arXiv:2306.09782), which the paper combines with
    FLORA in its Appendix C, for any leaf-wise transformation and with accumulation.
    """

    def step(
        params: optax.Params, state: optax.OptState, *args: Any, **extra_args: Any
    ) -> tuple[Any, optax.Params, optax.OptState]:
        if layerwise and not _sketches.find(state, _accumulate.FloraAccumulateState):
            return _layerwise.step(loss_fn, tx, has_aux, params, state, args, extra_args)
        reached = _cycle.reached("value_and_update", tx, params, state)
        count = _micro_batches(args)
        # Nothing else may have to see every micro-batch.
        around = len(jax.tree.leaves(state)) - len(jax.tree.leaves([own for own, _ in reached]))
        if not around and all(seen.owner.can_sum_in_place(seen.sketch) for _, seen in reached):
            results, again, new = _sum_in_place(loss_fn, has_aux, params, reached, args, count)
            state = _sketches.replace(state, new)
        else:
            results, again, state = _gradients_first(loss_fn, tx, has_aux, params, state, args)
        loss = jnp.mean(results[0])
        own = {"value": loss, **extra_args}
        params, state = _cycle.end("value_and_update", tx, params, state, own, layerwise=layerwise)
        return again([loss, *results[1:]]), params, state

    return step


def _micro_batches(args: tuple[Any, ...]) -> int:
    """How many there are, after checking that all arguments have as many."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        name = f"args{jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"{name} of the step is {leaf!r}, no array with a leading axis of micro-batches. "
                "Let the loss close over it."
            )
        if not leaf.shape:
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            fix = "jax.random.split(key, n)" if is_key else "jnp.broadcast_to(x, (n,))"
            raise ValueError(
                f"{name} of the step is {'one key' if is_key else 'a scalar'} for all "
                f"micro-batches, without a leading axis of them. Pass one for each: {fix}."
            )
        counts[name] = leaf.shape[0]
    if not counts or 0 in counts.values():
        raise ValueError(
            "value_and_update needs micro-batches to scan over, got none. Pass arrays with a "
            "leading axis of micro-batches after params and state."
        )
    if len(set(counts.values())) > 1:
        raise ValueError(
            "All arguments of the step have a leading axis of micro-batches, got unequal ones: "
            f"{', '.join(f'{name} has {n}' for name, n in counts.items())}. A raw PRNG key has 2: "
            "pass one for each micro-batch."
        )
    return next(iter(counts.values()))


def _gradients_first(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    has_aux: bool,
    params: optax.Params,
    state: optax.OptState,
    micro_batches: tuple[Any, ...],
) -> tuple[list[jax.Array], Callable[..., Any], optax.OptState]:
    """Accumulate the gradients of all micro-batches; what the loss returned comes stacked."""
    value_and_grad = _value_and_grad.value_and_grad(loss_fn, tx, has_aux=has_aux)
    again: list[Callable[..., Any]] = []

    def micro_step(state: optax.OptState, batch: tuple[Any, ...]) -> tuple[optax.OptState, Any]:
        result, grads = value_and_grad(params, *batch, opt_state=state)
        arrays, rebuild = _value_and_grad.arrays_of(result, has_aux)
        again.append(rebuild)
        return _cycle.accumulate(tx, grads, state, params), arrays

    state, results = jax.lax.scan(micro_step, state, micro_batches)
    return results, again[-1], state


def _sum_in_place(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    params: optax.Params,
    reached: list[tuple[_accumulate.FloraAccumulateState, _calls.Seen]],
    micro_batches: tuple[Any, ...],
    count: int,
) -> tuple[list[jax.Array], Callable[..., Any], list[_accumulate.FloraAccumulateState]]:
    """The same, with the backward pass itself adding to the sums of the states."""
    _value_and_grad.check_first([seen for _, seen in reached], all_of_them=True)
    numbers = {path: number for number, path in enumerate(_dimensions.names(params))}
    plans = [
        [_value_and_grad.number_of(part, numbers) for part in seen.sketch.parts]
        for _, seen in reached
    ]
    # The keys once for all micro-batches. Dense leaves too: their gradients are summed in place.
    born = [own for _, seen in reached for own in _value_and_grad.with_keys(seen.sketch)]
    found = dict(zip(itertools.chain(*plans), born, strict=True))
    again: list[Callable[..., Any]] = []

    def micro_step(sums: dict[int, jax.Array], xs: tuple[jax.Array, tuple[Any, ...]]) -> Any:
        index, batch = xs
        program = _value_and_grad.trace_loss(loss_fn, 0, has_aux, (params, *batch), {})
        again.append(program.result)
        own = dict(slots)
        for (state, _), plan in zip(reached, plans, strict=True):
            written = [number for number in plan if number in slots]
            paths = [found[number].leaf.path for number in written]
            counts = state.gradient_step, state.mini_step + index
            keys = state.sketch.rounding_keys(paths, *counts)
            for number, path in zip(written, paths, strict=True):
                own[number] = dataclasses.replace(slots[number], key=keys[path])
        results, new, _ = _value_and_grad.differentiate(program, found, sums, own)
        return new, results

    sums: dict[int, _stored.Stored] = {}
    for (state, seen), plan in zip(reached, plans, strict=True):
        sums.update(zip(plan, seen.owner.sums(state), strict=True))
    slots = {i: _slots.Slot.of(own) for i, own in sums.items() if _stored.is_quantized(own)}
    carried = {i: _stored.read(own) for i, own in sums.items() if i not in slots}
    xs = (jnp.arange(count, dtype=jnp.int32), micro_batches)
    carried, results = jax.lax.scan(micro_step, carried, xs)
    sums = {**carried, **{i: slot.array() for i, slot in slots.items()}}
    new_states = [
        seen.owner.with_sums(state, [sums[number] for number in plan], count)
        for (state, seen), plan in zip(reached, plans, strict=True)
    ]
    return results, again[-1], new_states
