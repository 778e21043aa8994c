"""The mathematics of one matrix: draw a projection, compress, decompress, transfer.

A matrix G is an array of shape `(*rows, *columns)`: usually `(n, m)`, but rows and columns may span
several axes each, as in an attention kernel `(embed, heads, head_dim)`; m is the product of the
column axes. Its projection A has shape `(rank, *columns)` and its sketch C = G Aᵀ has shape
`(*rows, rank)`. Nothing here knows about trees, keys of leaves or optimizers.
"""

import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from florax import _cipher

Projection = Literal["gaussian", "cosine"]

PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
# Up to here the angles of the cosine projection are exact in 32-bit integers, see `_cosine`.
MAX_COSINE_COLUMNS = 2**20


@functools.partial(jax.jit, static_argnames=("projection", "rank", "columns"))
def draw(projection: Projection, seed: jax.Array, rank: int, columns: tuple[int, ...]) -> jax.Array:
    """Draw A, shape `(rank, *columns)`, float32, from a raw threefry key, `(2,)`, or a `seed`.

    `"gaussian"`: entries i.i.d. N(0, 1/rank), so E[AᵀA] = I and decompressing is unbiased; entry j
    of a decompressed row g has variance (‖g‖² + g_j²) / rank (Hao et al., 2024, arXiv:2402.03293).

    `"cosine"`: `rank` random rows of the orthonormal DCT-II matrix, with a random sign on every
    column. A Aᵀ = I, so decompressing is the orthogonal projection onto the row space of A, and
    E[AᵀA] = (rank / m) I: a shrunken mean, with the smallest error that a sketch can have.
    """
    size = math.prod(columns)
    matrix = _gaussian if projection == "gaussian" else _cosine
    return matrix(seed, rank, size).reshape(rank, *columns)


def seed(projection: Projection, key: jax.Array, rank: int, size: int) -> jax.Array:
    """The key, and what is small but slow to draw, to be drawn once, outside of loops; uint32.

    Of `"cosine"` the numbers of its rows, for which a permutation is sorted, and the signs of its
    columns, a bit each: with them a draw is a single kernel.
    """
    if projection == "gaussian":
        return key
    bits = jnp.pad(_signs_of_cosine(key, size), (0, -size % 32)).reshape(-1, 32)
    signs = jnp.sum(bits << jnp.arange(32, dtype=jnp.uint32), axis=1, dtype=jnp.uint32)
    return jnp.concatenate([key, _rows_of_cosine(key, rank, size), signs])


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


def _rows_of_cosine(key: jax.Array, rank: int, size: int) -> jax.Array:
    """The first `rank` of the numbers below `size`, sorted by random words."""
    order, _ = _bits(key, (size,))
    # By themselves, where two words are equal. Every dtype is given: the draw is the same in 64-bit
    # mode.
    _, rows = jax.lax.sort((order, jnp.arange(size, dtype=jnp.uint32)), num_keys=2)
    own: jax.Array = rows[:rank]
    return own


def _signs_of_cosine(key: jax.Array, size: int) -> jax.Array:
    """A bit for every column: whether it is negative."""
    _, bits = _bits(key, (size,))
    return bits & 1


def _cosine(seed: jax.Array, rank: int, size: int) -> jax.Array:
    """A[i, j] = s_j √(2/m) cos(π (2j+1) k_i / 2m), and √(1/m) in place of √(2/m) where k_i = 0."""
    key, rows, packed = seed[:2], seed[2 : 2 + rank], seed[2 + rank :]
    if rows.size:
        bits = packed[:, None] >> jnp.arange(32, dtype=jnp.uint32)
        negative = bits.reshape(-1)[:size] & 1
    else:
        rows, negative = _rows_of_cosine(key, rank, size), _signs_of_cosine(key, size)
    k, j = rows[:, None], jnp.arange(size, dtype=jnp.uint32)[None, :]
    signs = 1 - 2 * negative[None, :].astype(jnp.float32)

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
    out_sharding: Any = None,
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
        out_sharding=out_sharding,
    )


def decompress(sketch: jax.Array, projection: jax.Array, columns_first: bool = False) -> jax.Array:
    """Turn `sketch`, shape `(*rows, rank)`, back into a matrix C A, shape `(*rows, *columns)`.

    Or `(*columns, *rows)`: a matrix that is transposed later would be another one in memory.

    The adjoint of `compress`: ⟨compress(G), C⟩ = ⟨G, decompress(C)⟩.
    """
    dtype = jnp.promote_types(sketch.dtype, jnp.float32)
    sketch, projection = sketch.astype(dtype), projection.astype(dtype)
    if columns_first:
        return jnp.tensordot(projection, sketch, axes=([0], [sketch.ndim - 1]))
    return jnp.tensordot(sketch, projection, axes=1)


def mix(right: jax.Array, left: jax.Array, across: jax.Array) -> tuple[jax.Array, jax.Array]:
    """B C, `(l, k)`, of sketches divided by a power of two, and its exponent: see `solve`.

    Powers of two change no digit, and keep squares within what float32 has.
    """
    dtype = jnp.promote_types(right.dtype, jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(right)), jnp.max(jnp.abs(left)))
    _, exponent = jnp.frexp(largest.astype(dtype))
    c = jnp.ldexp(right.astype(dtype).reshape(-1, right.shape[-1]), -exponent)
    return _exactly(across.astype(dtype).reshape(len(across), -1), c), exponent


def solve(
    left: jax.Array,
    projection: jax.Array,
    rows: int,
    mixed: jax.Array,
    exponent: jax.Array,
    basis: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """What turns the sketches of both sides of a matrix back into it: nearly unbiased.

    Of G, n × m, the sketches are C = G Aᵀ, `(*rows, k)`, and (B G)ᵀ, `(*columns, l)`, where the
    rows of A, `(k, *columns)`, and of B, `(l, *rows)`, are orthonormal, and l > k. G is guessed in
    the columns of C, and what the guess leaves of R = B G is enlarged and added:

        guess = C (A + Y),   Y = argmin ‖R - B C (A + Y)‖² + λ ‖Y‖²
        G̃ = guess + Bᵀ Z,    Z = n / (l - d) · (R - B guess)

    λ = k σ² has the least error if columns of G are independent, with the covariance C Cᵀ / k that
    C shows, where σ² is the variance of what C's columns leave of an entry of R; of that, least
    squares leave (l - k) / l. Y is fitted to the same R that then judges it, so explains d of its l
    dimensions in any case, d = tr H where H R is what is explained: without d, G̃ would be shrunk;
    with it, of spectra that fall, it is right on average to a tenth.

    G̃ Aᵀ = C: what is in A's row space is exact. All of G is, up to rounding, if its rank is below
    k, or if it is k and C has its rank.

    Args:
      left: (B G)ᵀ.
      projection: A.
      rows: n.
      mixed: B C, what `mix` makes of both sketches and B, which are needed no more.
      exponent: of it.
      basis: what `orthonormal` makes of `mixed`.

    Returns:
      A + Y, `(k, *columns)`, and Z, `(l, *columns)`: G̃ = [C, Bᵀ] [A + Y; Z].

    Source: beyond the paper. The sketches, and the guess for λ = 0: Tropp, Yurtsever, Udell and
    Cevher, "Practical sketching algorithms for low-rank matrix approximation", 2017
    (arXiv:1609.00048); d: Golub, Heath and Wahba, "Generalized cross-validation as a method for
    choosing a good ridge parameter", 1979.
    """
    columns, (l, k), (p, factors) = left.shape[:-1], mixed.shape, basis  # noqa: E741
    a = projection.astype(mixed.dtype).reshape(k, -1)
    r = jnp.ldexp(left.astype(mixed.dtype).reshape(-1, l).T, -exponent)

    # With B C S = P, orthonormal, and Y = S X, every step is well conditioned, whatever C is.
    s = functools.reduce(_exactly, factors)
    rest = r - _exactly(mixed, a)
    x = _exactly(p.T, rest)
    variance = jnp.sum((rest - _exactly(p, x)) ** 2) / ((l - k) * r.shape[1])
    gram = _ridged(_exactly(p.T, p), _SHIFTS[-1])
    factor = (jnp.linalg.cholesky(gram + k * variance * _exactly(s.T, s)), True)
    # The inverse, small as it is: back substitution is slower than a product on a GPU.
    inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(k, dtype=gram.dtype))
    x, explained = _exactly(inverse, x), jnp.sum(inverse * gram)

    bottom = jnp.ldexp(rows / (l - explained) * (rest - _exactly(p, x)), exponent)
    # Factor by factor: what comes between is no larger than Y. Columns of S are as large as 1 / EPS
    # where those of C depend on each other, and most of S X would cancel.
    top = a + functools.reduce(lambda y, factor: _exactly(factor, y), factors[::-1], x)
    return top.reshape(k, *columns), bottom.reshape(l, *columns)


_SHIFTS = (1e-4, 1e-5, 1e-6)  # of the mean of the diagonal


def _exactly(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _ridged(gram: jax.Array, ridge: jax.typing.ArrayLike) -> jax.Array:
    """With a part of the mean of its diagonal added to it; one where all is zero."""
    mean = jnp.trace(gram) / len(gram)
    own = jnp.where(mean > 0, ridge * mean, 1.0)
    return gram + own * jnp.eye(len(gram), dtype=gram.dtype)


def orthonormal(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An orthonormal basis P of its columns, and factors of S with P = matrix S, the first first.

    Cholesky's QR, thrice, with less and less of a shift: without one it fails where columns depend
    on each other, as they do where the rank of a gradient is below that of its sketch.
    """
    rows, eye = len(matrix), jnp.eye(matrix.shape[1], dtype=matrix.dtype)

    def pass_over(basis: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        factor = jnp.linalg.cholesky(_ridged(_exactly(basis.T, basis), shift))
        both = jnp.concatenate([basis, eye])
        both = jax.lax.linalg.triangular_solve(factor, both, lower=True, transpose_a=True)
        return both[:rows], both[rows:]

    return jax.lax.scan(pass_over, matrix, jnp.array(_SHIFTS, matrix.dtype))


def transfer(sketch: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Carry a sketch over to a new projection, C A A'ᵀ: decompress with A, compress with A'.

    The product A A'ᵀ, shape `(rank, rank)`, is taken first, so nothing of the matrix's size exists.
    """
    dtype = jnp.promote_types(sketch.dtype, jnp.float32)
    overlap = compress(old.astype(dtype), new)
    return jnp.tensordot(sketch.astype(dtype), overlap, axes=1)
