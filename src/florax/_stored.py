"""The numbers that accumulators are kept in: floats, or integers of 8, 4 or 2 bits with scales.

Integers are packed into words, and blocks of them share a scale. What is added to them is rounded
stochastically, so that it is right on average, however small it is. Nothing here knows what the
numbers are of: a sketch, or a gradient of full size.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from florax import _meshes

# Entries that share a scale, up to so many; and along how many at least.
_BLOCK, _SHORT = 64, 32
_INTEGERS = {jnp.dtype(jnp.int8): 8, jnp.dtype(jnp.int4): 4, jnp.dtype(jnp.int2): 2}
# Of an integer, the highest level (`_level`).
_HIGHEST = {8: 127, 4: 7, 2: 3}
_TINY = float(np.finfo(np.float32).tiny)
N = TypeVar("N", jax.Array, np.ndarray)


def check_dtype(dtype: Any) -> None:
    """Raise unless accumulators can be kept in that dtype."""
    if dtype is None:
        return
    try:
        own = jnp.dtype(dtype)
    except TypeError:
        own = None
    is_float = own is not None and jnp.issubdtype(own, jnp.floating) and own.itemsize > 1
    if not is_float and own not in _INTEGERS:
        raise TypeError(
            f"accumulator_dtype must be a floating-point dtype of 16 bits or more, jnp.int8, "
            f"jnp.int4 or jnp.int2, got {dtype!r}. In 8 bits take jnp.int8: it comes with scales."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array in 8, 4 or 2 bits: an integer an entry, and a scale for every block of them.

    The last axes, mostly the last one, are cut into blocks of 33 to 64 entries (fewer, if they have
    no more). Entry i of a block has its integer at bits `bits · (i // w)` of the block's word
    `i mod w`, where w is the number of words in a block, and is the level of that integer (see
    `_level`) times the block's scale.

    Attributes:
      words: `32 / bits` integers in each, shape `(*lead, words)`, uint32.
      scales: shape `(*lead, blocks)`, float32; NaN where something in the block was not finite.
      trail: sizes of the axes that are cut into blocks; static.
      bits: of an integer; static.
    """

    words: jax.Array
    scales: jax.Array
    trail: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return (*self.words.shape[:-1], *self.trail)

    @property
    def ndim(self) -> int:
        """Of the array."""
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Of an integer."""
        return next(dtype for dtype, bits in _INTEGERS.items() if bits == self.bits)


Stored: TypeAlias = jax.Array | Quantized


def is_quantized(node: Any) -> TypeGuard[Quantized]:
    """Whether a node of a tree is an array in few bits."""
    return isinstance(node, Quantized)


def zeros(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: jax.Array, axes: Sequence[int]
) -> Stored:
    """Zeros whose first axes are divided among devices as the `axes` of `like` are."""
    own = jnp.dtype(dtype)
    if own not in _INTEGERS:
        return _meshes.zeros(shape, dtype, like, axes)
    lead = len(shape)
    while lead and (lead == len(shape) or math.prod(shape[lead:]) < _SHORT):
        lead -= 1
    trail, bits = shape[lead:], _INTEGERS[own]
    blocks, per_block = _cut(math.prod(trail), bits)
    along = (*_meshes.division(like, axes), None)[: lead + 1]
    if len(trail) != 1 or (lead < len(along) and blocks % _meshes.parts(like, along[lead])):
        along = along[:lead]
    words, scales = (
        _meshes.zeros((*shape[:lead], size), kind, like, axes[:lead], along)
        for size, kind in ((blocks * per_block, jnp.uint32), (blocks, jnp.float32))
    )
    return Quantized(words, scales, trail, bits)


def _cut(size: int, bits: int) -> tuple[int, int]:
    """How many blocks so many entries are cut into, and the words in each."""
    blocks = -(-size // _BLOCK)
    entries = -(-size // max(blocks, 1))
    return blocks, -(-entries * bits // 32)


def fits(stored: Stored) -> bool:
    """Whether there are as many words and scales as an array of its shape and bits has."""
    if not isinstance(stored, Quantized):
        return True
    blocks, per_block = _cut(math.prod(stored.trail), stored.bits)
    *lead, words = stored.words.shape
    return words == blocks * per_block and stored.scales.shape == (*lead, blocks)


def named(stored: Stored, axes: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """Which axes, of those of the array, the axes of what is stored are; None for others."""
    if not isinstance(stored, Quantized):
        return axes
    lead = stored.words.ndim - 1
    return (*axes[:lead], axes[lead] if len(stored.trail) == 1 else None)


def read(stored: Stored) -> jax.Array:
    """The array."""
    if not isinstance(stored, Quantized):
        return stored
    decode = functools.partial(_decode, stored.trail, stored.bits)
    array: jax.Array = _meshes.automatically(decode, stored.words, stored.scales)
    return array


def write(
    like: Stored, value: jax.Array, key: jax.Array | None, rows: jax.Array | None = None
) -> Stored:
    """An array in the numbers of `like`; `key` says which rounding it is: two words, uint32.

    `rows` numbers the places before the last axis, if the array is a part of a larger one.
    """
    if not isinstance(like, Quantized):
        own = jnp.finfo(like.dtype)  # type: ignore[no-untyped-call]
        if own.maxexp < 128:  # float16: less than float32 has
            # A sketch may be larger than what it is of. Infinities in it would come back as NaN.
            held = jnp.clip(value, -float(own.max), float(own.max))
            value = jnp.where(jnp.isfinite(value), held, value)
        if key is None:
            return value.astype(like.dtype)
        return stochastic_round(value, like.dtype, key)
    assert key is not None
    if rows is None:
        rows = row_numbers(like)
    encode = functools.partial(_encode, like.bits)
    arrays = _meshes.automatically(encode, (like.words, like.scales), value, rows, key)
    return Quantized(*arrays, like.trail, like.bits)


def row_numbers(stored: Quantized) -> jax.Array:
    """A number for every place before the last axis of the words."""
    shape = stored.words.shape[:-1]
    return jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)


def scaled(function: Callable[[jax.Array], jax.Array], stored: Stored) -> Stored:
    """The array times a factor, as `function` multiplies by it: of integers their scales."""
    if not isinstance(stored, Quantized):
        return function(stored)
    return dataclasses.replace(stored, scales=function(stored.scales))


def _decode(trail: tuple[int, ...], bits: int, words: jax.Array, scales: jax.Array) -> jax.Array:
    lead, (blocks,) = words.shape[:-1], scales.shape[-1:]
    words = words.reshape(*lead, blocks, 1, words.shape[-1] // max(blocks, 1))
    # The integer's highest bit becomes the word's, and is drawn out to the right.
    left = np.uint32(32 - bits) - _shifts(bits)
    integers = (words << left).astype(jnp.int32) >> (32 - bits)
    entries = _level(bits, integers.astype(jnp.float32)) * scales[..., None, None]
    size = math.prod(trail)
    flat = entries.reshape(*lead, math.prod(entries.shape[len(lead) :]))
    return flat[..., :size].reshape(*lead, *trail)


def _encode(
    bits: int,
    old: tuple[jax.Array, jax.Array],
    value: jax.Array,
    rows: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    lead, (blocks,) = old[0].shape[:-1], old[1].shape[-1:]
    if not blocks or not value.size:
        return old
    per_word, words = 32 // bits, old[0].shape[-1] // blocks
    flat = value.reshape(*lead, -1).astype(jnp.float32)
    padding = blocks * words * per_word - flat.shape[-1]
    padded = jnp.pad(flat, [(0, 0)] * len(lead) + [(0, padding)]) if padding else flat
    entries = padded.reshape(*lead, blocks, per_word, words)
    # Times the reciprocal: XLA replaces division by a constant with it in some programs only.
    scales = jnp.max(jnp.abs(entries), axis=(-2, -1)) * np.float32(1 / _HIGHEST[bits])
    # Float32 has reciprocals of what is between only. What is not finite has no integers: the scale
    # says so.
    scales = jnp.where(scales < _TINY, 0.0, jnp.where(scales <= 0.25 / _TINY, scales, jnp.nan))
    regular = scales > 0
    inverse = jnp.where(regular, 1 / jnp.where(regular, scales, 1), 0)[..., None, None]
    noise = _noise(key, rows, padded.shape[-1]).reshape(entries.shape)
    integers = _drawn(bits, entries * inverse, noise)
    integers = jnp.where(regular[..., None, None], integers, 0).astype(jnp.int32)
    masked = integers.astype(jnp.uint32) & np.uint32(2**bits - 1)
    packed = jnp.sum(masked << _shifts(bits), axis=-2, dtype=jnp.uint32)
    return packed.reshape(old[0].shape), scales


def _level(bits: int, integer: N) -> N:
    """What an integer stands for, in scales; the highest level is the block's largest entry.

    In 8 bits the integer itself, from -127 to 127. In 4 bits, from -7 to 7, the levels are closer
    to each other near zero, where most entries are, and in 2 bits, from -2 to 1, they are -3,
    -0.62, 0.62 and 3: with u from -1 to 1 in even steps, 4/7 u + 3/7 u³ times the highest. A cubic,
    fitted to the levels that gave the least rounding noise in gradients of a GPT-2. For normal
    entries the noise has 0.82 times the variance that even levels give it in 4 bits, and 0.42 times
    in 2, where the even ones are -1, 0 and 1 (`tests/test_stored.py`).
    """
    if bits == 8:
        return integer
    step: N = integer if bits == 4 else 2 * integer + 1
    cubic = np.float32(3 / 7 / _HIGHEST[bits] ** 2)
    level: N = step * (np.float32(4 / 7) + cubic * (step * step))
    return level


def _drawn(bits: int, value: jax.Array, noise: jax.Array) -> jax.Array:
    """Of the integers with the levels around a value one or the other: right on average."""
    if bits == 8:
        integer = jnp.clip(jnp.floor(value), -127, 126)
    else:
        lowest = -7.0 if bits == 4 else -2.0
        integer = jnp.full_like(value, lowest)
        for level in _level(bits, np.arange(lowest + 1, 2 ** (bits - 1) - 1, dtype=np.float32)):
            integer = integer + (value >= level)
    below, above = _level(bits, integer), _level(bits, integer + 1)
    drawn: jax.Array = integer + (noise * (above - below) < value - below)
    return drawn


def _shifts(bits: int) -> np.ndarray:
    """By how many bits each integer of a word is shifted."""
    return np.arange(0, 32, bits, dtype=np.uint32)[:, None]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def stochastic_round(value: jax.Array, dtype: jax.typing.DTypeLike, key: jax.Array) -> jax.Array:
    """Round `value` to `dtype`, up or down with the probabilities that make it right on average.

    Rounding to the nearest stalls a moving average whose increments are below half a unit in the
    last place: in bfloat16 from a decay of about 0.99 on. `key` is two random words, uint32, shape
    `(2,)`. Differentiated as a cast is.
    """
    nearest = value.astype(dtype)
    error = value - nearest.astype(value.dtype)
    other = jnp.nextafter(nearest, jnp.where(error > 0, jnp.inf, -jnp.inf).astype(dtype))
    gap = other.astype(value.dtype) - nearest.astype(value.dtype)
    *lead, width = value.shape or (1,)
    rows = jnp.arange(math.prod(lead), dtype=jnp.uint32).reshape(lead)
    noise = _noise(key, rows, width).reshape(value.shape)
    # An infinite or undefined value makes the quotient 0 or NaN: the nearest value then stands.
    return jnp.where(noise < error / gap, other, nearest)


@stochastic_round.defjvp
def _stochastic_round_jvp(dtype: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (value, key), (tangent, _) = primals, tangents
    return stochastic_round(value, dtype, key), tangent.astype(dtype)


def _noise(key: jax.Array, rows: jax.Array, width: int) -> jax.Array:
    """Uniform in [0, 1), float32, `(*rows, width)`: a hash of the key and each entry's position.

    Rounding needs noise, not randomness. `jax.random.uniform` would write a float32 buffer of the
    sketch's shape, and take a quarter of a second to compile for every leaf; this is a few integer
    operations inside the kernel that rounds. The mixer is Wellons' lowbias32, its constants
    included (https://nullprogram.com/blog/2018/07/31/).
    """
    row = _mixed(_mixed(rows ^ key[0]) ^ key[1])[..., None]
    word = _mixed(jnp.arange(width, dtype=jnp.uint32) ^ row)
    return (word >> 8).astype(jnp.float32) * 2.0**-24


def _mixed(word: jax.Array) -> jax.Array:
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)
