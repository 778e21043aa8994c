"""Gradient accumulation kept as sketches: Algorithm 1 of the paper around a base optimizer."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

from florax import _checks, _leafwise, _leaves, _meshes, _per_layer, _projection, _sketches

ShouldSkip: TypeAlias = Callable[..., tuple[jax.Array, Any]]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class AccumulationRule:
    """The static settings that `accumulate` needs and finds in the state."""

    use_grad_mean: bool
    should_skip_update_fn: ShouldSkip | None


class FloraAccumulateState(NamedTuple):
    """State of `flora_accumulate`; its fields are those of `optax.MultiStepsState`, and the key.

    Attributes:
      mini_step: micro-steps since the last update of the base optimizer, shape `()`, int32.
      gradient_step: updates of the base optimizer so far, shape `()`, int32.
      inner_opt_state: state of the base optimizer.
      sketch: the accumulated gradient; `sketch.arrays` is a tree like the parameters with, per
        leaf, its sketch, shape `(*batch, *rows, rank)`, or a full-size array if it is kept dense.
      key: base key of the projections, raw threefry data, shape `(2,)`, uint32.
      rule: whether gradients are averaged and when they are skipped; static.
      skip_state: what `should_skip_update_fn` last reported.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_opt_state: optax.OptState
    sketch: _sketches.Sketches
    key: jax.Array
    rule: AccumulationRule
    skip_state: Any = ()


def flora_accumulate(
    opt: optax.GradientTransformation,
    every_k_schedule: int | Callable[[jax.Array], jax.typing.ArrayLike],
    rank: _leaves.Rank,
    *,
    use_grad_mean: bool = True,
    should_skip_update_fn: ShouldSkip | None = None,
    key: Any = 0,
    projection: _projection.Projection = _projection.DEFAULT_PROJECTION,
    side: _leaves.Side = "smaller",
    dimension_numbers: _leaves.DimensionNumbers | None = None,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulate gradients as random sketches around a base optimizer (FLORA, Algorithm 1).

    For a matrix of gradients G₁, …, G_τ, with τ = `every_k_schedule`, and the cycle's projection A:

    .. math::
        C = \frac{1}{\tau} \sum_t G_t A^\top, \qquad \text{then the base optimizer sees } C A,

    once every τ calls; in between the updates are zero and the base optimizer neither runs nor
    moves. Every cycle draws a new A. A drop-in for
    `optax.MultiSteps(opt, k).gradient_transformation()`, and exactly that for leaves kept dense.

    It wraps `opt`, it cannot stand in front of it: an optimizer that came after it in a chain would
    take the zeros in between for gradients. What must see each micro-batch's gradient goes in
    front, as in `optax.chain(optax.clip_by_global_norm(1.0), florax.flora_accumulate(...))`.

    Args:
      opt: the base optimizer: any Optax transformation, `flora_momentum` included.
      every_k_schedule: τ, in micro-steps, at least 1; or a function from the number of updates so
        far to τ.
      rank: width r of the sketches: an int; or a function `(path, leaf) -> int | None`; or a tree
        of those, possibly a prefix of the parameters'. None keeps a leaf dense.
      use_grad_mean: average the gradients (the paper's 1/τ); else sum them.
      should_skip_update_fn: `(gradients, gradient_step, params) -> (skip, skip_state)`, for example
        `optax.skip_not_finite`: a skipped micro-step is as if it had never happened.
      key: an int or a JAX PRNG key: the source of all projections.
      projection: `"gaussian"`, the paper's, unbiased; or `"cosine"`, orthonormal rows of a randomly
        signed cosine transform: C A is then the orthogonal projection of the mean gradient, shorter
        than it by about √(r/m) but with the least error that a sketch can have. Adam and Adafactor
        do not see the length; with SGD raise the learning rate.
      side: project the `"smaller"` side of a matrix (sketch of max(n, m)·r, as in the published
        code) or the `"larger"` one (min(n, m)·r: fewer bytes at equal rank, and more noise).
      dimension_numbers: a tree (possibly a prefix) or a function `(path, leaf)` that gives
        `FloraDimensionNumbers`. None: a leaf of two axes is a matrix; others are kept dense.
      accumulator_dtype: dtype of the accumulator; None: float32, or the parameter's if wider.
        Sketches in a narrower one are rounded stochastically.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `FloraAccumulateState`.

    Raises:
      ValueError, TypeError: an argument is out of range, or gradients do not match the parameters;
        the message names the argument, its value and the fix.

    >>> import florax, jax.numpy as jnp, optax
    >>> params = {"kernel": jnp.ones((512, 256)), "bias": jnp.zeros(256)}
    >>> tx = florax.flora_accumulate(optax.adafactor(1e-3), every_k_schedule=2, rank=16)
    >>> state = tx.init(params)
    >>> {name: x.shape for name, x in state.sketch.arrays.items()}
    {'bias': (256,), 'kernel': (512, 16)}
    >>> for _ in range(2):
    ...     updates, state = tx.update(params, state, params)
    ...     print(bool(florax.has_updated(state)), bool((updates["kernel"] == 0).all()))
    False True
    True False

    Source: Hao, Cao, Mou, "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024
    (arXiv:2402.03293), Algorithm 1, whose printed 1/n is 1/τ. The published JAX code has no
    transformation for it; the published PyTorch code keeps the accumulator outside of its
    optimizer, so that checkpoints lose it. Here it is part of the state.
    """
    if not isinstance(opt, optax.GradientTransformation):
        raise TypeError(
            f"opt must be an Optax gradient transformation, got {opt!r}. flora_accumulate wraps "
            "the base optimizer: flora_accumulate(optax.adafactor(1e-3), 16, rank=256)."
        )
    if not callable(every_k_schedule):
        _checks.positive_int("every_k_schedule", every_k_schedule)
    _leaves.check_settings(rank, side, projection)
    base = optax.with_extra_args_support(opt)
    rule = AccumulationRule(use_grad_mean, should_skip_update_fn)
    plan = functools.partial(
        _leaves.plan,
        rank=rank,
        side=side,
        projection=projection,
        dimension_numbers=dimension_numbers,
    )
    return optax.GradientTransformationExtraArgs(
        Init(base, rule, key, plan, accumulator_dtype), Update(base, every_k_schedule)
    )


@dataclasses.dataclass(frozen=True, eq=False)  # hashable as the function it is
class Init:
    """The init function of `flora_accumulate`."""

    opt: optax.GradientTransformationExtraArgs
    rule: AccumulationRule
    key: Any
    plan: Callable[..., tuple[_leaves.Leaf, ...]]
    accumulator_dtype: jax.typing.DTypeLike | None

    def __call__(self, params: optax.Params) -> FloraAccumulateState:
        # Two arrays, not one twice: states can be donated.
        mini_step, gradient_step = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        base_state, base_key = self.opt.init(params), _leaves.base_key(self.key)
        if _sketches.is_stand_in(params):
            sketch = cast(_sketches.Sketches, mini_step)
            return FloraAccumulateState(
                mini_step, gradient_step, base_state, sketch, base_key, self.rule
            )
        stacked = None
        if isinstance(self.opt.update, _per_layer.Update):
            stacked = [stack is not None for stack in base_state.stacks.of_leaves]
        leaves = self.plan(params, stacked=stacked)
        sketch = _sketches.zero_sketches(params, leaves, self._dtype)
        skip_state: Any = ()
        if self.rule.should_skip_update_fn is not None:
            zeros = optax.tree.zeros_like(params)
            _, skip_state = self.rule.should_skip_update_fn(zeros, gradient_step, params)
        return FloraAccumulateState(
            mini_step, gradient_step, base_state, sketch, base_key, self.rule, skip_state
        )

    def _dtype(self, own: jnp.dtype) -> jax.typing.DTypeLike:
        """Of the accumulator, for a parameter of dtype `own`."""
        if self.accumulator_dtype is not None:
            return self.accumulator_dtype
        return jnp.promote_types(own, jnp.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """The update function of `flora_accumulate`, which `finish` asks for the base optimizer."""

    opt: optax.GradientTransformationExtraArgs
    every_k_schedule: int | Callable[[jax.Array], jax.typing.ArrayLike]

    def __call__(
        self,
        updates: optax.Updates,
        state: FloraAccumulateState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FloraAccumulateState]:
        every_k = self.every_k_schedule
        k_steps = every_k(state.gradient_step) if callable(every_k) else every_k
        skip, state = _should_skip(updates, state, params)
        micro_gradients = _compress(updates, state)

        def emit(
            state: FloraAccumulateState, micro_gradients: list[jax.Array]
        ) -> tuple[optax.Updates, FloraAccumulateState]:
            total = _add(micro_gradients, state)
            return _finish(self.opt, updates, total, state, params, extra_args)

        def hold(
            state: FloraAccumulateState, micro_gradients: list[jax.Array]
        ) -> tuple[optax.Updates, FloraAccumulateState]:
            shapes, _ = jax.eval_shape(emit, state, micro_gradients)
            return optax.tree.zeros_like(shapes), _store(micro_gradients, skip, state)

        # The sum is taken inside the branches, not before: only so does the compiler see the same
        # program as in `optax.MultiSteps`, and contract the same products and sums.
        ends_cycle = ~skip & (state.mini_step >= k_steps - 1)
        return cast(
            tuple[optax.Updates, FloraAccumulateState],
            jax.lax.cond(ends_cycle, emit, hold, state, micro_gradients),
        )


def has_updated(state: FloraAccumulateState) -> jax.Array:
    """Whether the last micro-step was one in which the base optimizer ran, shape `()`, bool.

    Args:
      state: the state of `flora_accumulate` itself; in a chain, its part of the chain's state.

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
    check_state("has_updated", state)
    return jnp.logical_and(state.mini_step == 0, state.gradient_step > 0)


def accumulate(
    grads: optax.Updates, state: FloraAccumulateState, params: optax.Params | None = None
) -> FloraAccumulateState:
    """Add one micro-batch's gradients to the sketches: the first half of `flora_accumulate`.

    With `finish` for a loop inside one jit: no full-size zero updates in between, and the base
    optimizer is compiled once, outside of the loop. `every_k_schedule` plays no part, the mean is
    over what was accumulated.

    Args:
      grads: gradients, a tree like the parameters.
      state: state of `flora_accumulate`.
      params: only for a `should_skip_update_fn` that reads them.

    Returns:
      The state with the gradients added, or, where `should_skip_update_fn` says so, without.

    Raises:
      TypeError: `state` is the state of something else.
      ValueError: the gradients do not match the parameters.

    >>> import florax, jax, jax.numpy as jnp, optax
    >>> tx = florax.flora_accumulate(optax.sgd(0.1), every_k_schedule=4, rank=2)
    >>> @jax.jit
    ... def step(params, state, batches):
    ...     def micro_step(state, batch):
    ...         grads = jax.grad(lambda w: jnp.mean((batch @ w - 1) ** 2))(params)
    ...         return florax.accumulate(grads, state), None
    ...     state, _ = jax.lax.scan(micro_step, state, batches)
    ...     return florax.finish(tx, params, state)
    >>> params = jnp.zeros((8, 4))
    >>> params, state = step(params, tx.init(params), jnp.ones((4, 16, 8)))
    >>> int(state.gradient_step), params.shape
    (1, (8, 4))

    Source: the loop of Algorithm 1 in Hao et al., 2024 (arXiv:2402.03293).
    """
    check_state("accumulate", state)
    skip, state = _should_skip(grads, state, params)
    return _store(_compress(grads, state), skip, state)


def finish(
    tx: optax.GradientTransformation,
    params: optax.Params,
    state: FloraAccumulateState,
    **extra_args: Any,
) -> tuple[optax.Params, FloraAccumulateState]:
    """Update the parameters with what was accumulated: the second half of `flora_accumulate`.

    Decompresses the mean gradient, runs the base optimizer on it, applies its updates, and starts
    a new cycle with new projections.

    Args:
      tx: what `flora_accumulate` returned.
      params: the parameters.
      state: state of `tx`, after one `accumulate` or more.
      **extra_args: passed on to the base optimizer.

    Returns:
      The updated parameters, and the state at the start of the next cycle.

    Raises:
      TypeError: `tx` is not a `flora_accumulate`, or `state` is the state of something else.

    For an example see `accumulate`. Source: the rest of Algorithm 1 in Hao et al., 2024
    (arXiv:2402.03293).
    """
    update = check_transformation("finish", tx)
    check_state("finish", state)
    _sketches.match(params, state.sketch.plan)
    params, inner_opt_state = _update_and_apply(update.opt, params, state, extra_args)
    return params, _restart(state, inner_opt_state)


def _compress(grads: optax.Updates, state: FloraAccumulateState) -> list[jax.Array]:
    """What one micro-batch adds: per leaf the sketch of its gradient, or the gradient if dense."""
    leaves = state.sketch.plan
    flat, _ = _sketches.match(grads, leaves)
    return _sketches.compress(flat, leaves, state.key, state.gradient_step)


def _add(micro_gradients: list[jax.Array], state: FloraAccumulateState) -> list[jax.Array]:
    """The mean, or the sum, with one more micro-batch; not yet rounded to the state's dtype."""
    pairs = zip(micro_gradients, state.sketch.leaves(), strict=True)
    if state.rule.use_grad_mean:
        # The running mean in the very form of `optax.MultiSteps`, for bit-equal dense leaves.
        return [old + (new - old) / (state.mini_step + 1) for new, old in pairs]
    return [new + old for new, old in pairs]


def _store(
    micro_gradients: list[jax.Array], skip: jax.Array, state: FloraAccumulateState
) -> FloraAccumulateState:
    """The state after a micro-step that does not end the cycle."""
    kept = state.sketch.leaves()
    total = _sketches.round_all(
        state.sketch.plan,
        _add(micro_gradients, state),
        [old.dtype for old in kept],
        state.key,
        state.gradient_step,
        state.mini_step,
    )
    kept = [jnp.where(skip, old, new) for old, new in zip(kept, total, strict=True)]
    mini_step = jnp.where(skip, state.mini_step, optax.safe_increment(state.mini_step))
    return state._replace(mini_step=mini_step, sketch=state.sketch.replace(kept))


def _should_skip(
    grads: optax.Updates, state: FloraAccumulateState, params: optax.Params | None
) -> tuple[jax.Array, FloraAccumulateState]:
    """Whether these gradients are to be left out, and the state with the report on them."""
    should_skip = state.rule.should_skip_update_fn
    if should_skip is None:
        return jnp.array(False), state
    skip, skip_state = should_skip(grads, state.gradient_step, params)
    if skip.shape or skip.dtype != jnp.bool_:
        raise ValueError(
            "should_skip_update_fn must return a boolean scalar first, got dtype "
            f"{skip.dtype} and shape {skip.shape}. Reduce it with jnp.any or jnp.all."
        )
    return skip, state._replace(skip_state=skip_state)


def _finish(
    opt: optax.GradientTransformationExtraArgs,
    like: optax.Updates,
    total: list[jax.Array],
    state: FloraAccumulateState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, FloraAccumulateState]:
    """Run the base optimizer on what was accumulated, in the dtypes of `like`, and start afresh."""
    leaves = state.sketch.plan
    likes, treedef = _sketches.match(like, leaves)
    if params is not None:  # the parameter stands in for a gradient that was never there
        pairs = zip(likes, jax.tree.leaves(params), strict=True)
        likes = [x if isinstance(grad, _sketches.Sketch) else grad for grad, x in pairs]
    drawn = _leaves.draw(leaves, state.key, state.gradient_step)
    grads = [
        _decompress(leaf, a, target, accumulated)
        for leaf, accumulated, target, a in zip(leaves, total, likes, drawn, strict=True)
    ]
    updates, inner_opt_state = opt.update(
        jax.tree.unflatten(treedef, grads), state.inner_opt_state, params, **extra_args
    )
    # Both branches of the conditional must agree, whatever dtypes a base optimizer returns.
    return updates, _restart(state, optax.tree.cast_like(inner_opt_state, state.inner_opt_state))


def _restart(state: FloraAccumulateState, inner_opt_state: optax.OptState) -> FloraAccumulateState:
    """The state at the start of the next cycle."""
    return state._replace(
        mini_step=jnp.zeros_like(state.mini_step),
        gradient_step=optax.safe_increment(state.gradient_step),
        inner_opt_state=inner_opt_state,
        sketch=state.sketch.replace([jnp.zeros_like(x) for x in state.sketch.leaves()]),
    )


def _update_and_apply(
    opt: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    state: FloraAccumulateState,
    extra_args: dict[str, Any],
) -> tuple[optax.Params, optax.OptState]:
    """Run the base optimizer leaf by leaf, and stacks of layers layer by layer."""
    leaves, kept, inner = state.sketch.plan, state.sketch.leaves(), state.inner_opt_state

    def update(
        opt: optax.GradientTransformationExtraArgs,
        leaves: list[_leaves.Leaf],
        kept: list[jax.Array],
        keys: list[jax.Array],
        params: optax.Params,
        inner: optax.OptState,
    ) -> tuple[optax.Params, optax.OptState]:
        drawn = _leaves.draw_from(tuple(leaves), keys)
        gradients = [
            functools.partial(_decompress, leaf, a, param)
            for leaf, a, param in zip(leaves, drawn, jax.tree.leaves(params), strict=True)
        ]
        return _leafwise.update_and_apply(opt, gradients, kept, inner, params, extra_args)

    keys = _leaves.matrix_keys(leaves, state.key, state.gradient_step)
    if not isinstance(opt.update, _per_layer.Update):
        return update(opt, list(leaves), kept, keys, params, inner)

    opt, stacks = opt.update.opt, inner.stacks

    def part(stack: int | None) -> tuple[list[_leaves.Leaf], list[jax.Array], list[jax.Array]]:
        numbers = [i for i, own in enumerate(stacks.of_leaves) if own == stack]
        return [leaves[i] for i in numbers], [kept[i] for i in numbers], [keys[i] for i in numbers]

    parts: dict[int | None, Any] = {}
    parts[None], rest = update(opt, *part(None), stacks.select(params, None), inner.rest)
    layers = []
    for stack, own in enumerate(inner.layers):
        own_leaves, own_kept, own_keys = part(stack)
        layer_leaves = [leaf.layer() for leaf in own_leaves]
        height = stacks.heights[stack]
        # Dense leaves have one key, which no layer needs.
        own_keys = [
            k.reshape(height, -1, 2) if leaf.rank else jnp.zeros((height, 0), k.dtype)
            for k, leaf in zip(own_keys, own_leaves, strict=True)
        ]

        def layer(
            index: jax.Array,
            carry: Any,
            layer_leaves: list[_leaves.Leaf] = layer_leaves,
            fixed: Any = (own_kept, own_keys),
        ) -> Any:
            (sketches, layer_keys), (layer_params, layer_state) = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), (fixed, carry)
            )
            new = update(opt, layer_leaves, sketches, layer_keys, layer_params, layer_state)
            return jax.tree.map(
                lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, index, 0), carry, new
            )

        # A loop that carries the stacks updates them in place; a scan would make new ones.
        own_params = stacks.select(params, stack)
        carry = jax.tree.map(_meshes.settle, (own_params, own))
        parts[stack], own = jax.lax.fori_loop(0, height, layer, carry)
        layers.append(own)
    merged = stacks.merge(jax.tree.structure(params), parts)
    return merged, _per_layer.PerLayerState(tuple(layers), rest, stacks)


def _decompress(
    leaf: _leaves.Leaf, projection: jax.Array | None, like: Any, sketch: jax.Array
) -> jax.Array:
    """The gradient, dense ones as they are, in the dtype of `like` and divided as it is."""
    if isinstance(like, _sketches.Sketch):
        like, dtype = None, leaf.dtype
    else:
        dtype = like.dtype
    gradient = sketch if projection is None else leaf.decompress(sketch, projection, like)
    return gradient.astype(dtype)


def check_transformation(function: str, tx: Any) -> Update:
    """Raise unless `tx` is a `flora_accumulate`; its update function."""
    update = getattr(tx, "update", None)
    if not isinstance(update, Update):
        raise TypeError(
            f"{function} takes what flora_accumulate returned as tx, got {tx!r}. Transformations "
            "that stand beside it in a chain go into its base optimizer."
        )
    return update


def check_state(function: str, state: Any) -> None:
    """Raise unless `state` is a state of `flora_accumulate`."""
    if not isinstance(state, FloraAccumulateState):
        raise TypeError(
            f"{function} takes the state of flora_accumulate, got a {type(state).__name__}. Of the "
            "state of a chain pass the part that belongs to flora_accumulate."
        )
