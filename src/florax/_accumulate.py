"""Gradient accumulation kept as sketches: Algorithm 1 of the paper around a base optimizer."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

from florax import (
    _calls,
    _checks,
    _dimensions,
    _leaves,
    _meshes,
    _projection,
    _sketches,
    _stacks,
    _stored,
    _sums,
)

ShouldSkip: TypeAlias = Callable[..., tuple[Any, Any]]


class FloraAccumulateState(NamedTuple):
    """State of `flora_accumulate`; its fields are those of `optax.MultiStepsState`, and `updated`.

    `gradient_step`, a property, is how many updates the base optimizer has made.

    Attributes:
      mini_step: micro-steps since the last update of the base optimizer, shape `()`, int32.
      sketch: the accumulated gradient; `sketch.arrays` is a tree like the parameters with, per
        leaf, its sketch, shape `(*batch, *rows, rank)`, a tuple of two if both sides are
        projected, or a full-size array if it is kept dense.
      inner_opt_state: state of the base optimizer.
      updated: whether the base optimizer ran in the last micro-step, shape `()`, bool.
      skip_state: what `should_skip_update_fn` last reported.

    >>> import florax, jax.numpy as jnp, optax
    >>> tx = florax.flora_accumulate(optax.sgd(0.1), every_k_schedule=2, rank=16)
    >>> state = tx.init({"kernel": jnp.ones((512, 256))})
    >>> state.sketch.arrays["kernel"].shape, int(state.mini_step), int(state.gradient_step)
    ((512, 16), 0, 0)
    """

    mini_step: jax.Array
    sketch: _sketches.Sketches
    inner_opt_state: optax.OptState
    updated: jax.Array
    skip_state: Any = ()

    @property
    def gradient_step(self) -> jax.Array:
        """Updates of the base optimizer so far, shape `()`, int32: each starts a cycle."""
        return self.sketch.cycle


def flora_accumulate(
    opt: optax.GradientTransformation,
    every_k_schedule: int | Callable[[jax.Array], jax.typing.ArrayLike],
    rank: _dimensions.Rank,
    *,
    use_grad_mean: bool = True,
    should_skip_update_fn: ShouldSkip | None = None,
    key: Any = 0,
    projection: _projection.Projection = "gaussian",
    side: _leaves.Side = "smaller",
    dimension_numbers: _dimensions.DimensionNumbers | None = None,
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
        code) or the `"larger"` one (min(n, m)·r: fewer bytes at equal rank, and more noise); or
        `"both"`, with `projection="cosine"` and a rank of 3 or more: two sketches, of as many
        entries together as the one of `"smaller"` (in 4 bits scales add up to a quarter of its
        bytes where rows are short), up to two fifths of them in G Aᵀ, the rest in B G. What the
        base optimizer sees is right on average, to a tenth; its part in A's row space is exact, and
        all of it if the rank of the mean gradient is below that of A, which `state_report` shows.
        Where singular values fall like 1/i, its error at 256 × 256 and r = 64 is below half of that
        of an unbiased sketch of one side; of matrices of a few dozen, or below a rank of 10, it may
        be larger. A small system of equations is solved for every matrix, once a cycle, and
        sketches that are born take fewer operations than the gradient at small ranks only: while
        (n + m) (k + l) < n m.
      dimension_numbers: a tree (possibly a prefix) or a function `(path, leaf)` that gives
        `FloraDimensionNumbers`. None: a leaf of two axes is a matrix; others are kept dense.
      accumulator_dtype: dtype of the accumulator; None: float32, or the parameter's if wider.
        Sketches in a narrower one are rounded stochastically. `jnp.int8` and `jnp.int4` (and
        `jnp.int2`) keep sketches and dense leaves alike in so many bits, and a float32 scale for
        every 33 to 64 entries, rounded stochastically at every micro-step. Of the bytes of a
        full-size float32 accumulator take for about a quarter full size (`rank` a function that
        gives None) in 8 bits, for an eighth the same in 4; and for less sketches of both sides in
        4 bits, of half of the width for a sixteenth, of a quarter for 1/32: the documentation says
        what each costs. Sketches peak lower, and in floats can be summed over devices.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `FloraAccumulateState`. A
      `per_layer` inside it says which leaves are stacks: their layers are compressed one by one.

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
    (arXiv:2402.03293), Algorithm 1, whose printed 1/n is 1/τ; the defaults are its settings. The
    published JAX code has no transformation for it; the published PyTorch code keeps the
    accumulator outside of its optimizer, so that checkpoints lose it. Here it is part of the state.
    `side="both"` is beyond the paper: `florax._projection.solve` says how a gradient is
    reconstructed, and whose ideas that uses.
    """
    if not isinstance(opt, optax.GradientTransformation):
        raise TypeError(
            f"opt must be an Optax gradient transformation, got {opt!r}. flora_accumulate wraps "
            "the base optimizer: flora_accumulate(optax.adafactor(1e-3), 16, rank=256)."
        )
    _stored.check_dtype(accumulator_dtype)
    if not callable(every_k_schedule):
        _checks.positive_int("every_k_schedule", every_k_schedule)
    accumulation = _Accumulation(
        optax.with_extra_args_support(opt),
        every_k_schedule,
        _leaves.Plan(rank, side, projection, dimension_numbers),
        use_grad_mean,
        should_skip_update_fn,
        key,
        accumulator_dtype,
    )
    return optax.GradientTransformationExtraArgs(accumulation.init, accumulation.update)


@dataclasses.dataclass(frozen=True, eq=False)  # hashable as the functions that it holds are
class _Accumulation:
    """The settings of `flora_accumulate`, and its functions."""

    opt: optax.GradientTransformationExtraArgs
    every_k_schedule: int | Callable[[jax.Array], jax.typing.ArrayLike]
    plan: _leaves.Plan
    use_grad_mean: bool
    should_skip: ShouldSkip | None
    key: Any
    accumulator_dtype: jax.typing.DTypeLike | None

    @property
    def settings(self) -> tuple[Any, ...]:
        """What decides how the sketches are read and added to."""
        kept = "a mean" if self.use_grad_mean else "a sum"
        return ("flora_accumulate", kept, *self.plan.said)

    def init(self, params: optax.Params) -> FloraAccumulateState:
        with _sketches.sending():
            mini_step, updated = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.bool_)
        inner = self.opt.init(params)
        if _sketches.is_stand_in(params):
            sketch = cast(_sketches.Sketches, mini_step)
            return FloraAccumulateState(mini_step, sketch, inner, updated)
        axes = {path: a for stack in _stacks.all_of(inner) for path, a in stack.axes.items()}
        leaves = self.plan(params, axes)
        sketch = _sketches.Sketches.zeros(params, leaves, self._dtype, self.key, self.settings)
        skip_state: Any = ()
        if self.should_skip is not None:
            zeros = optax.tree.zeros_like(params)
            _, skip_state = self.should_skip(zeros, sketch.cycle, params)
        return FloraAccumulateState(mini_step, sketch, inner, updated, skip_state)

    def _dtype(self, own: jnp.dtype) -> jax.typing.DTypeLike:
        """Of the accumulator, for a parameter of dtype `own`."""
        if self.accumulator_dtype is not None:
            return self.accumulator_dtype
        return jnp.promote_types(own, jnp.float32)

    def update(
        self,
        updates: optax.Updates,
        state: FloraAccumulateState,
        params: optax.Params | None = None,
        *,
        florax: _calls.Call | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FloraAccumulateState]:
        if isinstance(florax, _calls.Look):
            return florax.note(updates, state.sketch, self), state
        if isinstance(florax, _calls.Finish):
            return self._finish(florax, state, params, extra_args)
        sketch, same = state.sketch.checked(self.settings)
        state = state._replace(sketch=sketch)
        every_k = self.every_k_schedule
        k_steps = every_k(state.gradient_step) if callable(every_k) else every_k
        skip, state = self._should_skip(updates, state, params)
        grads, treedef = state.sketch.match(updates)
        micro_gradients = state.sketch.compress(grads)
        if isinstance(florax, _calls.Accumulate):
            zeros = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in state.sketch.plan]
            return jax.tree.unflatten(treedef, zeros), self._store(micro_gradients, skip, state)
        parts: list[_stored.Stored] = [*micro_gradients]
        if all(map(_stored.is_quantized, state.sketch.leaves())):
            # Rounded at every micro-step, the last too, and once for both branches.
            parts = self._total(parts, state)

        def emit(
            state: FloraAccumulateState, parts: list[_stored.Stored]
        ) -> tuple[optax.Updates, FloraAccumulateState]:
            total = self._add(parts, state)
            # In the dtypes of the gradients; a parameter stands in for one that was never there.
            aligned = grads if params is None else state.sketch.aligned("params", params)
            pairs = zip(grads, aligned, strict=True)
            likes = [own if _sketches.is_sketch(grad) else grad for grad, own in pairs]
            # All there before any is used: else XLA on a CPU finds orders of the updates in which
            # an eighth more is alive at once.
            drawn = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
                state.sketch.draw()
            )
            sums = _sums.solved(_sums.of(state.sketch, total, drawn))
            triples = zip(sums, _sums.draw(sums), likes, strict=True)
            mean = [own.mean(a, like, own.arrays) for own, a, like in triples]
            mean_tree = jax.tree.unflatten(treedef, mean)
            updates, new = self._update_base(mean_tree, state, params, extra_args)
            # Not the mean: dense ones must stay those of `optax.MultiSteps`, to the bit.
            return jax.tree.map(lambda u: _sketches.where_true(same, u), updates), new

        def hold(
            state: FloraAccumulateState, parts: list[_stored.Stored]
        ) -> tuple[optax.Updates, FloraAccumulateState]:
            shapes, _ = jax.eval_shape(emit, state, parts)
            return optax.tree.zeros_like(shapes), self._store(parts, skip, state)

        # The sum is taken inside the branches, not before: only so does the compiler see the same
        # program as in `optax.MultiSteps`, and contract the same products and sums.
        ends_cycle = ~skip & (state.mini_step >= k_steps - 1)
        return cast(
            tuple[optax.Updates, FloraAccumulateState],
            jax.lax.cond(ends_cycle, emit, hold, state, parts),
        )

    def _finish(
        self,
        call: _calls.Finish,
        state: FloraAccumulateState,
        params: optax.Params | None,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, FloraAccumulateState]:
        """End the cycle with mean gradients that are given; nothing moves if there was none.

        What was accumulated is nothing then, too, and need not be read to be zero again.
        """
        mean = [call.gradients[leaf.path] for leaf in state.sketch.plan]
        _, treedef = state.sketch.match(params, "parameter")
        updates, new = self._update_base(
            jax.tree.unflatten(treedef, mean), state, params, extra_args
        )
        any_came = state.mini_step > 0
        updates = jax.tree.map(lambda u: jnp.where(any_came, u, jnp.zeros_like(u)), updates)
        cycle, old = new.sketch.cycle, state.inner_opt_state
        inner = jax.tree.map(functools.partial(jnp.where, any_came), new.inner_opt_state, old)
        sketch = dataclasses.replace(
            new.sketch, cycle=jnp.where(any_came, cycle, state.sketch.cycle)
        )
        return updates, new._replace(inner_opt_state=inner, sketch=sketch, updated=any_came)

    def _update_base(
        self,
        grads: optax.Updates,
        state: FloraAccumulateState,
        params: optax.Params | None,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, FloraAccumulateState]:
        """Run the base optimizer on the mean gradients, and start the next cycle."""
        updates, inner = self.opt.update(grads, state.inner_opt_state, params, **extra_args)
        return updates, state._replace(
            mini_step=jnp.zeros_like(state.mini_step),
            # Both branches of a conditional must agree, whatever dtypes a base optimizer returns.
            inner_opt_state=optax.tree.cast_like(inner, state.inner_opt_state),
            sketch=state.sketch.zeroed(cycle=optax.safe_increment(state.gradient_step)),
            updated=jnp.ones_like(state.updated),
        )

    def _add(self, parts: Sequence[_stored.Stored], state: FloraAccumulateState) -> list[jax.Array]:
        """The mean, or the sum, with one more micro-batch; what is in integers is that already."""

        def add(part: _stored.Stored, own: _stored.Stored) -> jax.Array:
            if isinstance(part, _stored.Quantized):
                return _stored.read(part)
            old = _meshes.divide_as(_stored.read(own), part)
            if self.use_grad_mean:
                # The running mean in the very form of `optax.MultiSteps`: dense leaves are its own.
                return old + (part - old) / (state.mini_step + 1)
            return part + old

        return [*map(add, parts, state.sketch.leaves())]

    def _total(
        self, parts: Sequence[_stored.Stored], state: FloraAccumulateState
    ) -> list[_stored.Stored]:
        """The same in the numbers of the state."""
        if any(map(_stored.is_quantized, parts)):
            return [*parts]
        total = self._add(parts, state)
        return state.sketch.round(total, state.gradient_step, state.mini_step)

    def _store(
        self, parts: Sequence[_stored.Stored], skip: jax.Array, state: FloraAccumulateState
    ) -> FloraAccumulateState:
        """The state after a micro-step that does not end the cycle."""
        total = self._total(parts, state)
        kept = jax.tree.map(functools.partial(jnp.where, skip), state.sketch.leaves(), total)
        mini_step = jnp.where(skip, state.mini_step, optax.safe_increment(state.mini_step))
        return state._replace(
            mini_step=mini_step,
            sketch=state.sketch.replace(kept),
            updated=jnp.zeros_like(state.updated),
        )

    def _should_skip(
        self, grads: optax.Updates, state: FloraAccumulateState, params: optax.Params | None
    ) -> tuple[jax.Array, FloraAccumulateState]:
        """Whether these gradients are to be left out, and the state with the report on them."""
        if self.should_skip is None:
            return jnp.array(False), state
        skip, skip_state = self.should_skip(grads, state.gradient_step, params)
        skip = jnp.asarray(skip)
        if skip.shape or skip.dtype != jnp.bool_:
            raise ValueError(
                "should_skip_update_fn must return a boolean scalar first, got dtype "
                f"{skip.dtype} and shape {skip.shape}. Reduce it with jnp.any or jnp.all."
            )
        return skip, state._replace(skip_state=skip_state)

    def can_sum_in_place(self, sketch: _sketches.Sketches) -> bool:
        """Whether gradients may be added one by one without being looked at: see `sums`."""
        # A skipped gradient must not be in the sum yet, and sums are no means where 16 bits round.
        exact = (
            _stored.is_quantized(x) or x.dtype == jnp.promote_types(x.dtype, jnp.float32)
            for x in sketch.leaves()
        )
        return all(exact) and self.should_skip is None

    def sums(self, state: FloraAccumulateState) -> list[_stored.Stored]:
        """The sums so far: a mean, which the state keeps, would be scaled at every micro-step."""
        factor = state.mini_step if self.use_grad_mean else 1
        return [
            _stored.scaled(lambda x: x * jnp.asarray(factor, x.dtype), own)
            for own in state.sketch.leaves()
        ]

    def with_sums(
        self, state: FloraAccumulateState, sums: list[_stored.Stored], count: int
    ) -> FloraAccumulateState:
        """The state after `count` micro-steps more."""
        total = state.mini_step + count
        if self.use_grad_mean:
            sums = [_stored.scaled(lambda x: x / total.astype(x.dtype), own) for own in sums]
        return state._replace(mini_step=total, sketch=state.sketch.replace(sums))
