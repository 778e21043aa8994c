"""Checks of arguments: each error names the argument, the value and the fix."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def is_int(value: Any) -> bool:
    """Whether `value` is a Python or NumPy integer; booleans are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def positive_int(name: str, value: Any, *, static: bool = False) -> None:
    """Raise unless `value` is an int of at least 1, or, if not `static`, an integer JAX scalar."""
    if isinstance(value, jax.Array):
        if static:
            raise TypeError(
                f"{name} must be known when tracing, got the array {value}. Pass a Python int; "
                f"under optax.inject_hyperparams name it in static_args: static_args=({name!r},)."
            )
        if value.shape or not np.issubdtype(value.dtype, np.integer):
            raise TypeError(f"{name} must be an integer scalar, got {value}. Pass an int.")
    elif not is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r}. Pass a whole number of at least 1.")
    elif value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}. Pass a positive int.")


def decay_rate(name: str, value: Any) -> None:
    """Raise unless `value` lies in [0, 1); JAX scalars, which may be traced, pass."""
    if isinstance(value, jax.Array):
        return
    if not isinstance(value, float | int | np.floating) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {value!r}. Pass a number in [0, 1).")
    if not 0 <= value < 1:
        raise ValueError(
            f"{name} must lie in [0, 1), got {value}. 0 is no momentum, 0.9 is the usual choice."
        )


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
