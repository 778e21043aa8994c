"""Keys and values of the tokens so far, so that each new token is a forward pass of its own only.

Slot s of a row holds the token at position s of that row. Padding is never stored, so that rows of
different lengths, padded on either side, share one array.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class KeyValue(NamedTuple):
    """What attention remembers; of stacked layers with a leading axis of layers."""

    key: Array  # (B, S, H, D)
    value: Array  # (B, S, H, D)


Cache = KeyValue | list[KeyValue]  # of stacked layers, and of a list of them


def empty(
    layers: int, batch: int, length: int, heads: int, size: int, dtype: jnp.dtype, *, stacked: bool
) -> Cache:
    """A cache for rows of up to `length` tokens, padding not counted."""
    shape = (batch, length, heads, size)
    if stacked:
        zeros = jnp.zeros((layers, *shape), dtype)
        return KeyValue(zeros, zeros)
    zeros = jnp.zeros(shape, dtype)
    return [KeyValue(zeros, zeros)] * layers


def slots(cache: Cache, positions: Array, mask: Array) -> Array:
    """Where to store tokens, (B, T); padding gets a slot past the end, which `store` leaves out."""
    return jnp.where(mask, positions, _length(cache))


def attend(cache: Cache, positions: Array) -> Array:
    """Which slots tokens at `positions`, (B, T), see: all up to their own; (B, 1, T, S), bool."""
    # No padding is stored and all slots up to the own one are filled, so this is the whole mask.
    return jnp.arange(_length(cache)) <= positions[:, None, :, None]


def store(cache: KeyValue, key: Array, value: Array, slots: Array) -> KeyValue:
    """One layer's cache with T tokens more, `key` and `value` of shape (B, T, H, D)."""
    rows = jnp.arange(slots.shape[0])[:, None]
    return KeyValue(
        cache.key.at[rows, slots].set(key.astype(cache.key.dtype), mode="drop"),
        cache.value.at[rows, slots].set(value.astype(cache.value.dtype), mode="drop"),
    )


def _length(cache: Cache) -> int:
    layer = cache[0] if isinstance(cache, list) else cache
    return layer.key.shape[-3]
