"""Numbers to test with, drawn on the host: JAX would compile a program for every shape."""

from collections.abc import Sequence
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
