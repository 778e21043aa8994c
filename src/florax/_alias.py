"""Ready-made optimizers."""

from typing import Any

import jax
import optax

from florax import _dimensions, _leaves, _momentum, _projection


def flora(
    learning_rate: optax.ScalarOrSchedule,
    rank: _dimensions.Rank,
    decay: jax.typing.ArrayLike = 0.9,
    resample_every: jax.typing.ArrayLike = 1000,
    *,
    multiply_by_parameter_scale: bool = True,
    weight_decay_rate: float | jax.Array | None = None,
    weight_decay_mask: Any = None,
    key: Any = 0,
    projection: _projection.Projection = "cosine",
    side: _leaves.Side = "smaller",
    residual: bool | None = None,
    nesterov: bool = False,
    dimension_numbers: _dimensions.DimensionNumbers | None = None,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adafactor with its momentum kept as sketches, ready made.

    `optax.chain(optax.adafactor(learning_rate), florax.flora_momentum(rank, ...))`, and weight
    decay after it. With `projection="gaussian"` it is the paper's optimizer. On leaves kept dense
    it is `optax.adafactor(learning_rate, momentum=decay)`, bit for bit in float32; in 16 bits,
    where Optax averages in float32, pass `accumulator_dtype`. For other settings of Adafactor, or
    another base optimizer, write the chain.

    Args:
      learning_rate: a scalar or a schedule.
      rank: see `flora_momentum`, as for every argument not named here.
      decay: decay of the momentum.
      resample_every: updates between new projections.
      multiply_by_parameter_scale: scale updates by the size of the parameter, as Adafactor does.
      weight_decay_rate: as in `optax.adafactor`, *not* multiplied by the learning rate.
      weight_decay_mask: a tree of bools, or a function of the parameters that gives one.
      key: source of all projections.
      projection: `"cosine"` or `"gaussian"`.
      side: side of a matrix that is projected.
      residual: pass what lies outside the subspace through without momentum; None: unless the
        projection is Gaussian.
      nesterov: look one step ahead.
      dimension_numbers: how leaves are seen as matrices.
      accumulator_dtype: dtype of the momentum.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError, TypeError: as `flora_momentum`.

    >>> import florax, jax.numpy as jnp
    >>> tx = florax.flora(1e-3, rank=16)
    >>> params = jnp.ones((512, 256))
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> updates.shape
    (512, 256)

    Source: Hao et al., 2024 (arXiv:2402.03293), Algorithm 2 with Adafactor as the base optimizer.
    """
    transforms = [
        optax.adafactor(learning_rate, multiply_by_parameter_scale=multiply_by_parameter_scale),
        _momentum.flora_momentum(
            rank,
            decay,
            resample_every,
            key=key,
            projection=projection,
            side=side,
            residual=residual,
            nesterov=nesterov,
            dimension_numbers=dimension_numbers,
            accumulator_dtype=accumulator_dtype,
        ),
    ]
    if weight_decay_rate is not None:
        # `optax.adafactor` adds decay before it turns the sign; here the sign is turned already.
        transforms.append(optax.add_decayed_weights(-weight_decay_rate, weight_decay_mask))
    return optax.chain(*transforms)
