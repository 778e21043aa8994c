"""Momentum kept as sketches: Algorithm 2 of the paper as an Optax transformation."""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from florax import _calls, _checks, _dimensions, _leaves, _meshes, _projection, _sketches, _stored


class FloraMomentumState(NamedTuple):
    """State of `flora_momentum`.

    Attributes:
      count: updates seen so far, shape `()`, int32.
      sketch: the momentum; `sketch.arrays` is a tree like the parameters with, per leaf, its
        sketch, shape `(*batch, *rows, rank)`, or a full-size average if it is kept dense.

    >>> import florax, jax.numpy as jnp
    >>> tx = florax.flora_momentum(rank=16)
    >>> state = tx.init({"kernel": jnp.ones((512, 256)), "bias": jnp.zeros(256)})
    >>> {name: x.shape for name, x in state.sketch.arrays.items()}, int(state.count)
    ({'bias': (256,), 'kernel': (512, 16)}, 0)
    """

    count: jax.Array  # type: ignore[assignment]  # the name of Optax's counts, not tuple.count
    sketch: _sketches.Sketches


def flora_momentum(
    rank: _dimensions.Rank,
    decay: jax.typing.ArrayLike = 0.9,
    resample_every: jax.typing.ArrayLike = 1000,
    *,
    key: Any = 0,
    projection: _projection.Projection = "cosine",
    side: _leaves.Side = "smaller",
    residual: bool | None = None,
    nesterov: bool = False,
    dimension_numbers: _dimensions.DimensionNumbers | None = None,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace updates by their moving average, kept as a random sketch (FLORA, Algorithm 2).

    For a matrix of updates G and its current projection A, with β = `decay`:

    .. math::
        M \leftarrow \beta M + (1 - \beta) G A^\top, \qquad
        \text{emit } M A + (G - G A^\top A),

    momentum inside the subspace of A and the plain update outside, and every κ = `resample_every`
    updates a new A' is drawn and M ← M A A'ᵀ. Leaves that are kept dense get exactly
    `optax.ema(decay, debias=False)`. The paper's own, Gaussian and without the residual G − G Aᵀ A,
    is `projection="gaussian"`.

    Chain it *after* an adaptive optimizer, where `optax.adafactor(momentum=...)` has its average
    too: `optax.chain(optax.adafactor(1e-3), florax.flora_momentum(128))`. In front of it the
    optimizer would estimate its second moments from the sketch's noise. With `optax.sgd`, which has
    no such state, either order is the same. To accumulate gradients as well, wrap the chain in
    `flora_accumulate`; a momentum that follows an accumulation would average its zeros.

    With `projection="gaussian"` keep `resample_every` above ln(1 + (m+1)/r) / (2 ln(1/β)), where
    m is the projected side: every transfer multiplies the expected ‖M‖² by 1 + (m+1)/r, and decay
    must undo that within a cycle. At β = 0.9 and m = 512 this is 20 updates for r = 8 and 6 for
    r = 256. `"cosine"` has no such bound.

    Args:
      rank: width r of the sketches: an int; or a function `(path, leaf) -> int | None`; or a tree
        of those, possibly a prefix of the parameters'. None keeps a leaf dense.
      decay: β in [0, 1).
      resample_every: κ, in updates, at least 1.
      key: an int or a JAX PRNG key: the source of all projections.
      projection: `"cosine"`, orthonormal rows of a randomly signed cosine transform: M A is the
        orthogonal projection of the average onto the subspace, with the least error that a sketch
        can have; or `"gaussian"`, the paper's, with entries N(0, 1/r): M A is the average, on
        average.
      side: project the `"smaller"` side of a matrix (sketch of max(n, m)·r, as in the published
        code) or the `"larger"` one (min(n, m)·r: fewer bytes at equal rank, and more noise).
      residual: emit G − G Aᵀ A too. It costs no state, but needs `"cosine"` and the full-size
        update. None: True with `"cosine"`, False with `"gaussian"`. Without it, M A of `"cosine"`
        has no factor m/r to make up for what lies outside of the subspace: after an optimizer it
        acts as a smaller learning rate.
      nesterov: emit β M + (1 − β) G Aᵀ, decompressed, instead of M.
      dimension_numbers: a tree (possibly a prefix) or a function `(path, leaf)` that gives
        `FloraDimensionNumbers`. None: a leaf of two axes is a matrix; others are kept dense.
      accumulator_dtype: dtype of the state; None: that of the parameter, as in `optax.ema`.
        Sketches in 16 bits are rounded stochastically, so that they do not stall. `jnp.int8` and
        `jnp.int4` (and `jnp.int2`) keep sketches and dense leaves alike in so many bits, and a
        float32 scale for every 33 to 64 entries, rounded stochastically at every update.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `FloraMomentumState`. As with
      `optax.ema`, the dtype of its updates is the promotion of the gradient's and the state's.

    Raises:
      ValueError, TypeError: an argument is out of range, or gradients do not match the parameters;
        the message names the argument, its value and the fix.

    >>> import florax, jax.numpy as jnp, optax
    >>> params = {"kernel": jnp.ones((512, 256)), "bias": jnp.zeros(256)}
    >>> tx = optax.chain(optax.adafactor(1e-3), florax.flora_momentum(rank=16))
    >>> state = tx.init(params)
    >>> {name: x.shape for name, x in state[1].sketch.arrays.items()}
    {'bias': (256,), 'kernel': (512, 16)}
    >>> updates, state = tx.update(params, state, params)
    >>> updates["kernel"].shape
    (512, 256)

    Source: Hao, Cao, Mou, "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024
    (arXiv:2402.03293), Algorithm 2. The authors' published code departs from it, and from this: its
    JAX version carries momentum over with the *old* projection both ways and then changes the key,
    which loses its direction (`tests/test_momentum.py` holds us to keeping it), keeps bfloat16
    sketches whatever the parameters, emits β M A + (1 − β) G (`nesterov` here compresses G as
    well), and averages *before* clipping and the learning rate. Its PyTorch version emits
    β M_old A + (1 − β) G.
    """
    if side == "both":
        raise ValueError(
            "side='both' is for accumulation, got it for flora_momentum. Pass side='smaller': its "
            "residual lost less in training than a pair of sketches of as many bytes."
        )
    _checks.decay_rate("decay", decay)
    _checks.positive_int("resample_every", resample_every)
    _stored.check_dtype(accumulator_dtype)
    plan = _leaves.Plan(rank, side, projection, dimension_numbers)
    settings = ("flora_momentum", *plan.said)
    residual = projection == "cosine" if residual is None else residual
    if residual and projection == "gaussian":
        raise ValueError(
            "residual=True needs orthonormal projections, got projection='gaussian': G − G AᵀA is "
            "then not the part outside the subspace. Leave out either."
        )

    def init_fn(params: optax.Params) -> FloraMomentumState:
        with _sketches.sending():
            count = jnp.zeros([], jnp.int32)
        if _sketches.is_stand_in(params):
            return FloraMomentumState(count, cast(_sketches.Sketches, count))
        dtype = accumulator_dtype
        return FloraMomentumState(
            count,
            _sketches.Sketches.zeros(
                params, plan(params), lambda own: own if dtype is None else dtype, key, settings
            ),
        )

    def update_fn(
        updates: optax.Updates,
        state: FloraMomentumState,
        params: optax.Params | None = None,
        *,
        florax: _calls.Call | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FloraMomentumState]:
        del extra_args
        if isinstance(florax, _calls.Look) and not residual:
            return florax.note(updates, state.sketch), state
        sketches, _ = state.sketch.checked(settings)
        grads, treedef = sketches.match(updates)
        drawn = sketches.draw()
        admitted = iter(sketches.admit([grad for grad in grads if _sketches.is_sketch(grad)]))

        emitted, kept = [], []
        likes = grads if params is None else sketches.aligned("params", params)
        for leaf, grad, own, like in zip(
            sketches.plan, grads, sketches.leaves(), likes, strict=True
        ):
            average = _stored.read(own)
            a = drawn.get(leaf.path)
            if a is None:
                average = _meshes.divide_as(average, grad)
                new = optax.tree.update_moment(grad, average, decay, order=1)
                out = optax.tree.update_moment(grad, new, decay, order=1) if nesterov else new
                emitted.append(out.astype(grad.dtype) if _stored.is_quantized(own) else out)
                kept.append(new)
                continue
            born = isinstance(grad, _sketches.Sketch)
            if born and residual:
                raise ValueError(
                    f"A residual needs the full gradient of {leaf.path}, got its sketch. Use "
                    "jax.value_and_grad, or flora_momentum(..., residual=False)."
                )
            sketch = next(admitted)[0] if born else leaf.compress(grad, a)
            average = _meshes.divide_as(average, sketch).astype(sketch.dtype)
            new = optax.tree.update_moment(sketch, average, decay, order=1)
            out = optax.tree.update_moment(sketch, new, decay, order=1) if nesterov else new
            # One decompression serves both parts: M A + G − (G Aᵀ) A = G + (M − G Aᵀ) A.
            out = out - sketch if residual else out
            out = leaf.decompress(out, a, like if born else grad)
            out = out + grad if residual else out
            dtype = leaf.dtype if born else grad.dtype
            is_float = not _stored.is_quantized(own)
            emitted.append(out.astype(jnp.promote_types(dtype, own.dtype) if is_float else dtype))
            kept.append(new)

        sketches = sketches.replace(sketches.round(kept, state.count, _AVERAGE))
        count = optax.safe_increment(state.count)
        # At the end of a cycle, not at the start of the next: so the state alone says with which
        # projections to read it, whatever becomes of `resample_every`.
        sketches = _resample(sketches, count, count % resample_every == 0)
        return jax.tree.unflatten(treedef, emitted), FloraMomentumState(count, sketches)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _resample(
    sketches: _sketches.Sketches, count: jax.Array, ends_cycle: jax.Array
) -> _sketches.Sketches:
    """Where a cycle ends, carry the sketches over to the next one's projections."""
    compressed = [i for i, leaf in enumerate(sketches.plan) if leaf.rank]
    new = dataclasses.replace(sketches, cycle=sketches.cycle + ends_cycle.astype(jnp.int32))

    def carry_over() -> list[_stored.Stored]:
        # Both projections are drawn here, once in `resample_every` updates, and not kept alive.
        before, after = sketches.draw(), new.draw()
        moved = [
            leaf.transfer(kept, before[leaf.path], after[leaf.path]) if leaf.rank else kept
            for leaf, kept in zip(sketches.plan, sketches.read(), strict=True)
        ]
        rounded = new.round(moved, count, _TRANSFER)
        return [rounded[i] for i in compressed]

    kept = sketches.leaves()
    carried = jax.lax.cond(ends_cycle, carry_over, lambda: [kept[i] for i in compressed])
    for i, sketch in zip(compressed, carried, strict=True):
        kept[i] = sketch
    return new.replace(kept)


# Which of the two roundings of an update it is: after the average, or after the transfer.
_AVERAGE, _TRANSFER = 0, 1
