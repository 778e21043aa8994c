"""Where projections come from: the base key, the words of a leaf, the keys of its matrices.

A matrix's projection depends on the base key, the words of its leaf, its index in the stack and the
cycle, and on nothing else: not on other leaves, the sharding or the number of devices.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from florax import _checks, _cipher, _leaves


def base_key(key: Any) -> jax.Array:
    """Raw threefry key data, shape `(2,)`, uint32, from an int or a JAX key of any kind.

    Always a new array: a state that is donated must not take the caller's key along.
    """
    is_array = isinstance(key, jax.Array)
    if _checks.is_int(key) or (
        is_array and not key.shape and jnp.issubdtype(key.dtype, jnp.integer)
    ):
        return jax.random.key_data(jax.random.key(key, impl="threefry2x32"))
    if is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and not key.shape:
        if str(jax.random.key_impl(key)) == "threefry2x32":
            return jnp.array(jax.random.key_data(key), copy=True)
        return jax.random.bits(key, (2,), jnp.uint32)
    if is_array and key.shape == (2,) and key.dtype == jnp.uint32:
        return jnp.array(key, copy=True)
    raise TypeError(f"key must be an int or a JAX PRNG key, got {key!r}. Pass e.g. key=0.")


def words(label: Any) -> np.ndarray:
    """64 bits of a label's digest as two words, the same in every process (`hash` is not)."""
    digest = hashlib.blake2b(repr(label).encode(), digest_size=8).digest()
    return np.frombuffer(digest, ">u4").astype(np.uint32)


def fold(key: jax.Array, *data: jax.typing.ArrayLike) -> jax.Array:
    """Fold integers into raw threefry keys, `(*n, 2)`, one after the other."""
    for number in data:
        key = fold_words(key, jnp.stack([jnp.uint32(0), jnp.asarray(number).astype(jnp.uint32)]))
    return key


def fold_words(key: jax.Array, words: jax.Array) -> jax.Array:
    """Fold pairs of words, `(*n, 2)`, into one raw threefry key or a key each: their ciphers."""
    return jnp.stack(_cipher.encrypt(key, words[..., 0], words[..., 1]), axis=-1)


def of_matrices(
    leaves: Sequence[_leaves.Leaf],
    words: Sequence[jax.Array],
    key: jax.Array,
    cycle: jax.typing.ArrayLike,
) -> list[jax.Array]:
    """Per leaf the keys of its matrices in a cycle, shape `(matrices, 2)`, uint32.

    The base key with the index in the stack, the cycle and the leaf's words folded in, in this
    order. So layer i of a stack is a leaf of its own with the base key `fold(key, i)`.
    """
    if not leaves:
        return []
    # Without the barrier the cipher would become a part of every slice.
    packed = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
        of_all_matrices(leaves, words, key, cycle)
    )
    return split(packed, [leaf.matrices for leaf in leaves])


def of_all_matrices(
    leaves: Sequence[_leaves.Leaf],
    words: Sequence[jax.Array],
    key: jax.Array,
    cycle: jax.typing.ArrayLike,
) -> jax.Array:
    """The same as `of_matrices` in one array, leaf after leaf; there must be a leaf."""
    stacks: dict[tuple[int, ...], jax.Array] = {}
    for leaf in leaves:
        if leaf.stack_shape not in stacks:
            stacks[leaf.stack_shape] = _of_stack(key, leaf.stack_shape)
    keys = jnp.concatenate([stacks[leaf.stack_shape] for leaf in leaves])
    own = [jnp.broadcast_to(w, (leaf.matrices, 2)) for w, leaf in zip(words, leaves, strict=True)]
    # All together: folding is a handful of tiny kernels, and a model has hundreds of matrices.
    return fold_words(fold(keys, cycle), jnp.concatenate(own))


# Up to so many parts XLA may take slices into what uses them; more take too long to compile.
_FEW = 16


def split(array: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Consecutive parts of an array along its first axis, as `jnp.split` gives them."""
    if len(sizes) == 1:
        return [array]
    if len(sizes) <= _FEW:
        few: list[jax.Array] = jnp.split(array, np.cumsum(sizes)[:-1])
        return few
    # XLA makes the code of kernels that are alike once. Those of slices are not, as each has its
    # start in it: some 10 ms for every one of hundreds. Here the starts are operands, and the
    # barrier keeps XLA from finding out their values.
    starts = np.cumsum([0, *sizes[:-1]], dtype=np.uint32)
    first = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
        [jnp.uint32(start) for start in starts]
    )
    rest = [np.uint32(0)] * (array.ndim - 1)
    # Words without a sign: for others JAX asks whether they count from the end.
    return [
        jax.lax.dynamic_slice(array, (start, *rest), (size, *array.shape[1:]))
        for start, size in zip(first, sizes, strict=True)
    ]


def _of_stack(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The keys of a stack of that shape, row by row, shape `(matrices, 2)`."""
    keys = key[None]
    for size in shape:
        indices = jnp.arange(size, dtype=jnp.uint32)
        keys = jax.vmap(lambda k, i=indices: jax.vmap(fold, (None, 0))(k, i))(keys).reshape(-1, 2)
    return keys


def rows(array: jax.Array) -> list[jax.Array]:
    """The rows of an array, as `split` takes it apart."""
    return [row[0] for row in split(array, [1] * len(array))]


def seeds(leaves: Sequence[_leaves.Leaf], keys: Sequence[jax.Array]) -> list[jax.Array]:
    """Per leaf the keys of its matrices, with what is slow to draw inside of a loop over them.

    That is, over those of stacks: seeds of shape `(matrices, words)`, uint32.
    """
    return [
        jax.vmap(leaf.seed_matrix)(own) if leaf.batch else own
        for leaf, own in zip(leaves, keys, strict=True)
    ]


def draw(leaves: Sequence[_leaves.Leaf], keys: Sequence[jax.Array]) -> list[jax.Array]:
    """The projections of compressed leaves from the keys, or seeds, of their matrices.

    Per leaf float32, shape `(*batch, rank, *columns)`.
    """
    drawn: dict[int, jax.Array] = {}
    for width in sorted({own.shape[-1] for own in keys}):
        numbers = [i for i, own in enumerate(keys) if own.shape[-1] == width]
        packed = jnp.concatenate([keys[i] for i in numbers])
        drawn |= zip(numbers, draw_all([leaves[i] for i in numbers], packed), strict=True)
    return [drawn[i] for i in range(len(leaves))]


def draw_all(
    leaves: Sequence[_leaves.Leaf], keys: jax.Array, limit: float = math.inf
) -> list[jax.Array]:
    """As `draw`, from the keys of all matrices in one array, leaf after leaf.

    What is drawn together has at most `limit` bytes, or is that of a single leaf.
    """
    starts = np.cumsum([0, *(leaf.matrices for leaf in leaves)])
    # Without the barriers XLA fuses what makes the keys into the draw, and the draw into every
    # slice of it: minutes of compilation on a GPU where it now takes seconds.
    keys = jax.lax.optimization_barrier(keys)  # type: ignore[no-untyped-call]
    drawn: dict[int, jax.Array] = {}
    for members in chunks(leaves, limit):
        numbers = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in members])
        own = keys if len(numbers) == len(keys) else keys[numbers]
        matrices = jax.vmap(leaves[members[0]].draw_matrix)(own)
        matrices = jax.lax.optimization_barrier(matrices)  # type: ignore[no-untyped-call]
        parts = split(matrices, [leaves[i].matrices for i in members])
        for i, part in zip(members, parts, strict=True):
            drawn[i] = part.reshape(*leaves[i].stack_shape, *part.shape[1:])
    return [drawn[i] for i in range(len(leaves))]


def chunks(leaves: Sequence[_leaves.Leaf], limit: float = math.inf) -> list[list[int]]:
    """Numbers of leaves whose projections are drawn in one call, in the order of their first ones.

    They are alike, and follow each other among those alike: one call a group, not one a leaf, for a
    model whose layers are not stacked has hundreds of leaves, and a call is 150 operations, which
    all of XLA's passes go through.
    """
    open_chunks: dict[Any, tuple[list[int], int]] = {}
    found: list[list[int]] = []
    for i, leaf in enumerate(leaves):
        size = leaf.projection_bytes
        members, held = open_chunks.get(leaf.drawn_like, ([], 0))
        if not members or held + size > limit:
            members, held = [], 0
            found.append(members)
        members.append(i)
        open_chunks[leaf.drawn_like] = members, held + size
    return found
