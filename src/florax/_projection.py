"""The mathematics of one matrix: draw a projection, compress, decompress, transfer.

A matrix G is an array of shape `(*rows, *columns)`: usually `(n, m)`, but rows and columns may span
several axes each, as in an attention kernel `(embed, heads, head_dim)`; m is the product of the
column axes. Its projection A has shape `(rank, *columns)` and its sketch C = G Aᵀ has shape
`(*rows, rank)`. Nothing here knows about trees, keys of leaves or optimizers.
"""

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from florax import _cipher

Projection = Literal["gaussian", "cosine"]

PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
# The one place that says which projection is used when none is named: the paper's.
DEFAULT_PROJECTION: Projection = "gaussian"
# Up to here the angles of the cosine projection are exact in 32-bit integers, see `_cosine`.
MAX_COSINE_COLUMNS = 2**20


@functools.partial(jax.jit, static_argnames=("projection", "rank", "columns"))
def draw(projection: Projection, key: jax.Array, rank: int, columns: tuple[int, ...]) -> jax.Array:
    """Draw A, shape `(rank, *columns)`, float32, from `key`, a raw threefry key of shape `(2,)`.

    `"gaussian"`: entries i.i.d. N(0, 1/rank), so E[AᵀA] = I and decompressing is unbiased; entry j
    of a decompressed row g has variance (‖g‖² + g_j²) / rank (Hao et al., 2024, arXiv:2402.03293).

    `"cosine"`: `rank` random rows of the orthonormal DCT-II matrix, with a random sign on every
    column. A Aᵀ = I, so decompressing is the orthogonal projection onto the row space of A, and
    E[AᵀA] = (rank / m) I: a shrunken mean, with the smallest error that a sketch can have.
    """
    size = math.prod(columns)
    matrix = _gaussian if projection == "gaussian" else _cosine
    return matrix(key, rank, size).reshape(rank, *columns)


def _bits(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Two random words, uint32, for every entry: the cipher of its position.

    Not `jax.random.bits`, whose bits follow a flag and the version of JAX, and, with the "rbg"
    generator, how an array is sharded: a saved sketch is read with projections that are drawn
    anew, and bits that changed would turn it into noise.
    """
    position = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    words: tuple[jax.Array, jax.Array] = _cipher.encrypt(key, jnp.uint32(0), position)
    return words


def _gaussian(key: jax.Array, rank: int, size: int) -> jax.Array:
    """Of uniform numbers in (-1, 1), the midpoints of 2²³ intervals, the normal quantiles."""
    bits, _ = _bits(key, (rank, size))
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1
    return jax.lax.erf_inv(uniform) * math.sqrt(2 / rank)


def _cosine(key: jax.Array, rank: int, size: int) -> jax.Array:
    """A[i, j] = s_j √(2/m) cos(π (2j+1) k_i / 2m), and √(1/m) in place of √(2/m) where k_i = 0."""
    order, negative = _bits(key, (size,))
    # Every dtype is given: the draw is the same in 64-bit mode.
    j = jnp.arange(size, dtype=jnp.uint32)
    # Numbers sorted by random words, and by themselves where two words are equal.
    _, k = jax.lax.sort((order, j), num_keys=2)
    k, j = k[:rank, None], j[None, :]
    signs = 1 - 2 * (negative[None, :] & 1).astype(jnp.float32)

    # (2j+1) k mod 4m without overflow: (2j+1) k overflows 32 bits from m = 33,000 on, and a float32
    # angle is wrong long before. With j = 1024 j₁ + j₀ both products stay below 2³² up to m = 2²⁰.
    period = jnp.uint32(4 * size)
    j1, j0 = j >> 10, j & 1023
    angle = (k * (2 * j0 + 1) + (k * 2048 % period) * j1 % period) % period
    scale = jnp.where(k == 0, math.sqrt(1 / size), math.sqrt(2 / size))
    return signs * scale * jnp.cos(angle.astype(jnp.float32) * (math.pi / (2 * size)))


def compress(
    matrix: jax.Array,
    projection: jax.Array,
    columns: tuple[int, ...] | None = None,
    batch: tuple[int, ...] = (),
) -> jax.Array:
    """Sketch `matrix` as G Aᵀ: contract its `columns` axes (the last ones) with those of A.

    With `batch` axes, a stack of matrices and of projections, of shape `(*batch, rank, *columns)`.
    Axes are named, not moved: a transposed gradient would be another gradient in memory. The result
    has shape `(*batch, *rows, rank)`.

    A is rounded to the dtype of the matrix, so that 16-bit gradients meet the fast matrix units of
    an accelerator; the products accumulate in float32 at least, the dtype of the result.
    """
    stack = tuple(range(len(batch)))
    last = tuple(range(len(batch) + 1, projection.ndim))
    if columns is None:
        columns = tuple(range(matrix.ndim - len(last), matrix.ndim))
    return jax.lax.dot_general(
        matrix,
        projection.astype(matrix.dtype),
        ((columns, last), (batch, stack)),
        preferred_element_type=jnp.promote_types(matrix.dtype, jnp.float32),
    )


def decompress(sketch: jax.Array, projection: jax.Array) -> jax.Array:
    """Turn `sketch`, shape `(*rows, rank)`, back into a matrix C A, shape `(*rows, *columns)`.

    The adjoint of `compress`: ⟨compress(G), C⟩ = ⟨G, decompress(C)⟩.
    """
    dtype = jnp.promote_types(sketch.dtype, jnp.float32)
    sketch, projection = sketch.astype(dtype), projection.astype(dtype)
    return jnp.tensordot(sketch, projection, axes=1)


def reconstruct(
    right: jax.Array, left: jax.Array, projection: jax.Array, across: jax.Array
) -> jax.Array:
    """The matrix of which both sides are sketched: C = G Aᵀ, `(*rows, k)`, and Rᵀ = Gᵀ Bᵀ.

    `left` is Rᵀ, `(*columns, l)`; A, `(k, *columns)`, and B, `(l, *rows)`, have orthonormal rows.
    What is in the row space of A is C A; of the rest, with the orthonormal basis Q of C's columns,
    B tells what Q X must be: the least squares of B Q X = R - B C A, with a ridge.

    Source: Tropp, Yurtsever, Udell and Cevher, "Practical sketching algorithms for low-rank matrix
    approximation", 2017 (arXiv:1609.00048), with C A added to it.
    """
    rows, columns = right.shape[:-1], left.shape[:-1]
    c, r = right.reshape(-1, right.shape[-1]), left.reshape(-1, left.shape[-1]).T
    a, b = projection.reshape(len(projection), -1), across.reshape(len(across), -1)
    # Powers of two change no digit, and keep squares within what float32 has.
    largest = jnp.maximum(jnp.max(jnp.abs(c)), jnp.max(jnp.abs(r)))
    exponent = jnp.frexp(largest)[1]
    c, r = jnp.ldexp(c, -exponent), jnp.ldexp(r, -exponent)
    q = _orthonormal(c)
    rest = r - _exactly(_exactly(b, c), a)
    bq = _exactly(b, q)
    gram = _ridged(_exactly(bq.T, bq), _RIDGE)
    factor = (jnp.linalg.cholesky(gram), True)
    x = jax.scipy.linalg.cho_solve(factor, _exactly(bq.T, rest))
    matrix = jnp.concatenate([c, q], axis=1) @ jnp.concatenate([a, x])
    return jnp.ldexp(matrix, exponent).reshape(*rows, *columns)


_RIDGE = 1e-3  # of the mean of the diagonal


def _exactly(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _ridged(gram: jax.Array, ridge: float) -> jax.Array:
    """With a part of the mean of its diagonal added to it; one where all is zero."""
    mean = jnp.trace(gram) / len(gram)
    own = jnp.where(mean > 0, ridge * mean, 1.0)
    return gram + own * jnp.eye(len(gram), dtype=gram.dtype)


def _orthonormal(matrix: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns: Cholesky's QR, thrice, with less and less of a shift.

    Without a shift it fails where columns depend on each other, as they do where the rank of a
    gradient is below that of its sketch.
    """
    for shift in (1e-4, 1e-5, 1e-6):
        factor = jnp.linalg.cholesky(_ridged(_exactly(matrix.T, matrix), shift))
        matrix = jax.lax.linalg.triangular_solve(factor, matrix, lower=True, transpose_a=True)
    return matrix


def transfer(sketch: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Carry a sketch over to a new projection, C A A'ᵀ: decompress with A, compress with A'.

    The product A A'ᵀ, shape `(rank, rank)`, is taken first, so nothing of the matrix's size exists.
    """
    dtype = jnp.promote_types(sketch.dtype, jnp.float32)
    overlap = compress(old.astype(dtype), new)
    return jnp.tensordot(sketch.astype(dtype), overlap, axes=1)
