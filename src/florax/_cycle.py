"""A cycle of accumulation in its two halves, for a loop inside one jit."""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from florax import (
    _accumulate,
    _calls,
    _dimensions,
    _sketches,
    _stacks,
    _sums,
    _updates,
)


def has_updated(state: optax.OptState) -> jax.Array:
    """Whether the last micro-step was one in which the base optimizer ran, shape `()`, bool.

    Args:
      state: a state with that of `flora_accumulate` in it.

    Returns:
      True or False, as an array; False before the first micro-step.

    Raises:
      TypeError: `state` is the state of something else.

    >>> import florax, jax.numpy as jnp, optax
    >>> tx = florax.flora_accumulate(optax.sgd(1.0), every_k_schedule=1, rank=2)
    >>> state = tx.init(jnp.ones(3))
    >>> bool(florax.has_updated(state))
    False
    >>> _, state = tx.update(jnp.ones(3), state)
    >>> bool(florax.has_updated(state))
    True
    """
    found = _sketches.find(state, _accumulate.FloraAccumulateState)
    updated = [jnp.any(x) for own in found for x in jax.tree.leaves(own.updated)]
    if not updated:
        raise TypeError(_NO_STATE.format("has_updated", type(state).__name__))
    return functools.reduce(jnp.logical_or, updated)


def accumulate(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
) -> optax.OptState:
    """Add one micro-batch's gradients to the sketches: the first half of `flora_accumulate`.

    With `finish` for a loop inside one jit: no full-size zero updates in between, and the base
    optimizer is compiled once, outside of the loop. `every_k_schedule` plays no part, the mean is
    over what was accumulated.

    Args:
      tx: an optimizer with `flora_accumulate` in it.
      grads: gradients, a tree like the parameters.
      state: state of `tx`.
      params: only for what reads them, as a `should_skip_update_fn` may.

    Returns:
      The state with the gradients added, or, where `should_skip_update_fn` says so, without.

    Raises:
      TypeError: there is no `flora_accumulate` in the state.
      ValueError: the gradients do not match the parameters.

    >>> import florax, jax, jax.numpy as jnp, optax
    >>> tx = florax.flora_accumulate(optax.sgd(0.1), every_k_schedule=4, rank=2)
    >>> @jax.jit
    ... def step(params, state, batches):
    ...     def micro_step(state, batch):
    ...         grads = jax.grad(lambda w: jnp.mean((batch @ w - 1) ** 2))(params)
    ...         return florax.accumulate(tx, grads, state), None
    ...     state, _ = jax.lax.scan(micro_step, state, batches)
    ...     return florax.finish(tx, params, state)
    >>> params = jnp.zeros((8, 4))
    >>> params, state = step(params, tx.init(params), jnp.ones((4, 16, 8)))
    >>> int(state.gradient_step), params.shape
    (1, (8, 4))

    Source: the loop of Algorithm 1 in Hao et al., 2024 (arXiv:2402.03293).
    """
    accumulators("accumulate", state)
    update = optax.with_extra_args_support(tx).update
    _, state = update(grads, state, params, florax=_calls.Accumulate())
    return state


def finish(
    tx: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    **extra_args: Any,
) -> tuple[optax.Params, optax.OptState]:
    """Update the parameters with what was accumulated: the second half of `flora_accumulate`.

    Decompresses the mean gradient, runs the base optimizer on it, applies its updates, and starts
    a new cycle with new projections. Leaf by leaf, and where `per_layer` says what the layers are
    layer by layer, so that one full-size gradient is alive at a time. Where nothing was
    accumulated, as when every micro-batch was skipped, nothing moves.

    Args:
      tx: an optimizer with `flora_accumulate` in it. What else trains leaves, or keeps a state
        after it in a chain, goes into its base optimizer.
      params: the parameters.
      state: state of `tx`, after one `accumulate` or more.
      **extra_args: passed on to the base optimizer.

    Returns:
      The updated parameters, and the state at the start of the next cycle.

    Raises:
      TypeError: there is no `flora_accumulate` in the state.
      ValueError: `tx` does more than to accumulate, `params` are others than those of the state.

    >>> import florax, jax.numpy as jnp, optax
    >>> tx = florax.flora_accumulate(optax.sgd(0.1), every_k_schedule=2, rank=2)
    >>> params = jnp.ones((8, 4))
    >>> state = tx.init(params)
    >>> for grads in jnp.ones((2, 8, 4)):
    ...     state = florax.accumulate(tx, grads, state)
    >>> params, state = florax.finish(tx, params, state)
    >>> int(state.gradient_step), int(state.mini_step)
    (1, 0)

    Within one jit: see `accumulate`. Source: the rest of Algorithm 1 in Hao et al., 2024
    (arXiv:2402.03293).
    """
    return end("finish", tx, params, state, extra_args)


def accumulators(
    function: str, state: Any, params: Any = None
) -> list[_accumulate.FloraAccumulateState]:
    """The accumulations in a state; raise if there is none, or if it is of other parameters."""
    found = _sketches.find(state, _accumulate.FloraAccumulateState)
    if not found:
        raise TypeError(_NO_STATE.format(function, type(state).__name__))
    if not all(isinstance(own.sketch, _sketches.Sketches) for own in found):  # but one per layer
        raise ValueError(_OUT_OF_REACH.format(function))
    for own in found if params is not None else ():
        own.sketch.aligned("params", params)
    return found


_NO_STATE = (
    "{} takes the state of flora_accumulate, or one with it inside, got a {}. Pass tx.init(params) "
    "of an optimizer with flora_accumulate."
)
_OUT_OF_REACH = (
    "{} reaches flora_accumulate through chains, masks, partitions and injected hyperparameters "
    "only. Put what else stands around it, such as per_layer, inside: "
    "florax.flora_accumulate(florax.per_layer(opt, stacked), ...)."
)


def _give(
    update: _updates.Update,
    sums: Sequence[_sums.Sum],
    numbers: Sequence[int],
    likes: Sequence[jax.Array],
) -> None:
    """Give mean gradients, each divided as its `like` is, to an update."""
    for number, own, a, like in zip(numbers, sums, _sums.draw(sums), likes, strict=True):
        update.give(number, own.arrays, functools.partial(own.mean, a, like))


def end(
    function: str,
    tx: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    extra_args: dict[str, Any],
    *,
    layerwise: bool = False,
) -> tuple[optax.Params, optax.OptState]:
    """End a cycle; with `layerwise`, refuse to unless that goes leaf by leaf and by layers."""
    sums, paths = _all_sums(function, tx, params, state), _dimensions.names(params)
    update = _traced(tx, params, state, set(sums), extra_args)
    inside = _check_alone(update, paths, set(sums), state)
    if layerwise:
        update.check_leafwise(paths)

    replaced: dict[int, jax.Array] = {}
    for stack in _stacks.all_of(state):
        axes = {i: stack.axes[p] for i, p in enumerate(paths) if p in stack.axes and p in sums}
        try:
            layers = update.layers(axes, stack.height)
        except _updates.NoMap:
            if layerwise:
                raise
            continue  # as a whole, like any other leaf
        whole = _sums.solved([sums.pop(paths[number]) for number in axes])
        own = list(zip(whole, axes.values(), strict=True))

        def give(
            index: jax.Array,
            layer: _updates.Update,
            likes: list[jax.Array],
            carry: None,
            own: list[tuple[_sums.Sum, int]] = own,
        ) -> None:
            _give(layer, [whole.layer(axis, index) for whole, axis in own], range(len(own)), likes)

        replaced |= update.run_layers(layers, give)[0]

    numbers = [number for number, path in enumerate(paths) if path in sums]
    flat = jax.tree.leaves(params)
    rest = _sums.solved([sums[paths[i]] for i in numbers])
    _give(update, rest, numbers, [flat[i] for i in numbers])
    new_params, new_state = update.results(replaced)
    # What stands around the accumulations has seen every micro-batch already.
    leaves = zip(jax.tree.leaves(new_state), jax.tree.leaves(state), inside, strict=True)
    kept = [new if is_inside else old for new, old, is_inside in leaves]
    return new_params, jax.tree.unflatten(jax.tree.structure(state), kept)


def reached(
    function: str, tx: Any, params: optax.Params, state: optax.OptState
) -> list[tuple[_accumulate.FloraAccumulateState, _calls.Seen]]:
    """The accumulations in a state, and how `tx` reaches each; raise for what it does not."""
    states = accumulators(function, state, params)
    seen = {id(own.sketch): own for own in _calls.look(tx, state, params) if own.owner}
    if any(id(own.sketch) not in seen for own in states):
        raise ValueError(_OUT_OF_REACH.format(function))
    return [(own, seen[id(own.sketch)]) for own in states]


def _all_sums(
    function: str, tx: Any, params: optax.Params, state: optax.OptState
) -> dict[str, _sums.Sum]:
    """By the name of its leaf, all that the accumulations in the state hold."""
    sums: dict[str, _sums.Sum] = {}
    for own, seen in reached(function, tx, params, state):
        keys = own.sketch.keys()
        _, is_right = own.sketch.checked(seen.owner.settings)
        each = _sums.of(own.sketch, own.sketch.leaves(), keys, is_right)
        sums |= {own.leaf.path: own for own in each}
    return sums


def _traced(
    tx: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    owned: Collection[str],
    extra_args: dict[str, Any],
) -> _updates.Update:
    """The end of a cycle, to be given the mean gradients."""
    paths = _dimensions.names(params)

    def end(gradients: list[jax.Array], values: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = values
        flat, treedef = jax.tree.flatten(params)
        # What stands around the accumulations sees no gradient of theirs.
        around = [
            leaf if path in owned else gradient
            for path, leaf, gradient in zip(paths, flat, gradients, strict=True)
        ]
        call = _calls.Finish(dict(zip(paths, gradients, strict=True)))
        updates, new = optax.with_extra_args_support(tx).update(
            jax.tree.unflatten(treedef, around), state, params, florax=call, **extra_args
        )
        return optax.apply_updates(params, updates), optax.tree.cast_like(new, state)

    came = [own.mini_step > 0 for own in accumulators("finish", state)]
    flat = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
    runs = functools.reduce(jnp.logical_or, came)
    return _updates.Update(end, flat, (params, state), runs)


def _check_alone(
    update: _updates.Update, paths: Sequence[str], owned: Collection[str], state: optax.OptState
) -> list[bool]:
    """Raise if `tx` does more than to accumulate; which leaves of the state an accumulation has.

    What else trains leaves would do so at every micro-step, and what keeps a state behind an
    accumulation would see the zeros between its updates.
    """
    inside: list[bool] = jax.tree.leaves(
        jax.tree.map(
            lambda node: jax.tree.map(lambda _: _is_accumulation(node), node),
            state,
            is_leaf=_is_accumulation,
        )
    )
    count = len(paths)
    # The gradients have the labels of their leaves, what is kept around those behind them.
    labels = [None if own else label for label, own in enumerate(inside, count)]
    depends = update.depends([*[None] * count, *labels])
    owns = [path in owned for path in paths] + inside
    for number, (own, found) in enumerate(zip(owns, depends, strict=True)):
        if number < count and not own and found:
            raise ValueError(
                f"tx changes {paths[number]} at every micro-step, outside of flora_accumulate, as "
                "the other parts of a partition do, and as a mask passes gradients on. Put it "
                "inside (rank=None keeps a leaf dense), or freeze it with optax.set_to_zero."
            )
        moving = any(label >= count and not update.stays(label) for label in found)
        sees = any(label < count and owns[label] for label in found)
        if (own and moving) or (not own and sees):
            raise ValueError(
                "tx keeps a state around flora_accumulate that it updates at every micro-step and "
                "that the update depends on. Put what stands after flora_accumulate in a chain "
                "into its base optimizer."
            )
    return inside


def _is_accumulation(node: Any) -> bool:
    return isinstance(node, _accumulate.FloraAccumulateState)
