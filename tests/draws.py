"""Numbers to test with, drawn on the host: JAX would compile a program for every shape."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def normal(
    seed: int | Sequence[int], *shape: int, scale: float = 1.0, dtype: Any = jnp.float32
) -> jax.Array:
    """Independent normal numbers."""
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def normal_like(seed: int, tree: Any) -> Any:
    """The same in the shapes and dtypes of a tree."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(draw.standard_normal(x.shape), x.dtype), tree)


def tokens(vocabulary: int, *shape: int, seed: int = 0) -> jax.Array:
    """Numbers of tokens, int32, of which none is 0: often that is the padding."""
    return jnp.asarray(np.random.default_rng(seed).integers(1, vocabulary, shape), jnp.int32)


def module(make: Callable[[], Any], parameter: Callable[[Sequence[Any], Any], Any]) -> Any:
    """The `nnx.Module` that `make` makes, with what `parameter` makes of a path and a shape.

    Not with what `make` draws: a program for that takes seconds to compile.
    """
    from flax import nnx

    model = nnx.eval_shape(make)
    flat = nnx.to_flat_state(nnx.state(model))
    drawn = {path: jnp.asarray(parameter(path, x.shape), x.dtype) for path, x in flat}
    nnx.update(model, nnx.from_flat_state(drawn))
    return model


def normal_module(make: Callable[[], Any], scale: float) -> Any:
    """With normal parameters; those that scale norms are near one. None is zero or one."""
    draw = np.random.default_rng(0)

    def parameter(path: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
        numbers = draw.standard_normal(shape)
        return 1 + numbers / 10 if path[-1] == "scale" else scale * numbers

    return module(make, parameter)
