"""The laws of one matrix: adjoint, unbiased, orthonormal, contracting."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax.extend.random import threefry_2x32
from numpy.testing import assert_allclose, assert_array_equal

from florax import _cipher, _projection

PROJECTIONS = _projection.PROJECTIONS


def raw_key(seed):
    return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


def raw_keys(seed, count):
    keys = jax.random.split(jax.random.key(seed, impl="threefry2x32"), count)
    return jax.random.key_data(keys)


def draw_many(projection, count, rank, size, seed=0):
    draw = jax.jit(jax.vmap(lambda key: _projection.draw(projection, key, rank, (size,))))
    return draw(raw_keys(seed, count))


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("rows, columns", [((7,), (12,)), ((3, 5), (12,)), ((7,), (4, 3))])
def test_decompress_is_the_adjoint_of_compress(projection, rows, columns):
    a = _projection.draw(projection, raw_key(0), 4, columns)
    g, c = normal(1, *rows, *columns), normal(2, *rows, 4)
    left = jnp.vdot(_projection.compress(g, a), c)
    right = jnp.vdot(g, _projection.decompress(c, a))
    # Sums of 12 and of some 100 float32 products: (12 + 100) 2⁻²⁴ of the sum of magnitudes.
    scale = jnp.vdot(abs(g), _projection.decompress(abs(c), abs(a)))
    assert abs(left - right) < 112 * 2**-24 * scale


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_several_axes_are_one_matrix_of_their_products(projection, optimized):
    a = _projection.draw(projection, raw_key(0), 4, (3, 5))
    flat = _projection.draw(projection, raw_key(0), 4, (15,))
    assert_array_equal(a.reshape(4, 15), flat)
    g = normal(1, 2, 6, 3, 5)
    sketch = _projection.compress(g, a)
    assert_allclose(sketch.reshape(12, 4), g.reshape(12, 15) @ flat.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_gaussian_reconstruction_is_unbiased_with_the_papers_variance(rank):
    g, count = normal(0, 32), 20_000
    a = draw_many("gaussian", count, rank, 32)
    estimates = np.asarray(jnp.einsum("j,crj,crk->ck", g, a, a), np.float64)
    variance = np.asarray(g @ g + g**2, np.float64) / rank
    # Five standard errors of 32 entries: a false alarm once in 50,000 runs; the seed is fixed.
    assert np.all(abs(estimates.mean(0) - g) < 5 * np.sqrt(variance / count))
    # The standard error of the variance, from the estimates' own fourth moment.
    deviations = (estimates - g) ** 2
    standard_error = deviations.std(0) / np.sqrt(count)
    assert np.all(abs(deviations.mean(0) - variance) < 5 * standard_error)


SIZES = [
    *[3, 1000, 1025, 33_001, 2**20],
    *(
        pytest.param(size, marks=pytest.mark.slow)
        for size in (2, 64, 1023, 1024, 32_768, 50_257, 131_072)
    ),
]


@pytest.mark.parametrize("size", SIZES)
def test_cosine_rows_are_orthonormal(size):
    rank = min(size, 16)
    a = np.asarray(_projection.draw("cosine", raw_key(size), rank, (size,)), np.float64)
    assert abs(a @ a.T - np.eye(rank)).max() < 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_cosine_entries_are_those_of_the_transform(size):
    """Against Python's integers: rows of wrong angles can be orthonormal too."""
    rank = min(size, 4)
    positions = np.arange(size, dtype=np.uint32)
    words = threefry_2x32(raw_key(size), np.concatenate([0 * positions, positions]))
    order, negative = np.asarray(words).reshape(2, size)
    rows = [int(k) for k in np.argsort(order, stable=True)[:rank]]
    signs = 1 - 2.0 * (negative & 1)
    columns = [*range(min(size, 1500)), *range(size - min(size, 1500), size)]
    a = np.asarray(_projection.draw("cosine", raw_key(size), rank, (size,)), np.float64)
    for i, k in enumerate(rows):
        angles = [(2 * j + 1) * k % (4 * size) * (math.pi / (2 * size)) for j in columns]
        expected = math.sqrt((1 if k == 0 else 2) / size) * np.cos(angles) * signs[columns]
        # The float32 angle is below 2π: off by 2π 2⁻²³; as much again for the cosine and the scale.
        assert_allclose(a[i, columns], expected, atol=4 * math.pi * 2**-23 * math.sqrt(2 / size))


def test_cosine_is_unbiased_up_to_the_share_of_rows():
    rank, size, count = 3, 16, 40_000
    a = draw_many("cosine", count, rank, size)
    gram = np.asarray(jnp.einsum("crj,crk->cjk", a, a), np.float64)
    standard_error = gram.std(0) / np.sqrt(count)
    assert np.all(abs(gram.mean(0) - rank / size * np.eye(size)) < 5 * standard_error + 1e-7)


def test_cosine_at_full_rank_is_the_identity():
    a = _projection.draw("cosine", raw_key(0), 24, (24,))
    g = normal(1, 10, 24)
    again = _projection.decompress(_projection.compress(g, a), a)
    # 24 products twice, in float32, of entries of norm 1.
    assert_allclose(again, g, atol=2 * 24 * 2**-24 * float(jnp.linalg.norm(g, axis=1).max()))


@pytest.mark.parametrize(
    "size", [1, 32, 33, *(pytest.param(n, marks=pytest.mark.slow) for n in (31, 100))]
)
@pytest.mark.parametrize("projection", _projection.PROJECTIONS)
def test_a_seed_draws_what_its_key_draws(projection, size, optimized):
    key, rank = raw_key(3), min(size, 4)
    seed = _projection.seed(projection, key, rank, size)
    wanted, got = (_projection.draw(projection, own, rank, (size,)) for own in (key, seed))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_transfer_is_a_decompression_and_a_compression(projection):
    old, new = (_projection.draw(projection, raw_key(seed), 4, (12,)) for seed in (0, 1))
    sketch = normal(2, 7, 4)
    expected = _projection.compress(_projection.decompress(sketch, old), new)
    assert_allclose(_projection.transfer(sketch, old, new), expected, rtol=1e-5, atol=1e-6)


def test_a_gaussian_transfer_multiplies_the_expected_square_by_the_bounds_factor():
    """E‖M A A'ᵀ‖² = (1 + (m+1)/r) ‖G‖² where M = G Aᵀ, whose own expected square is ‖G‖²."""
    rank, size, count = 8, 40, 20_000
    old = draw_many("gaussian", count, rank, size, seed=0)
    new = draw_many("gaussian", count, rank, size, seed=1)
    g = normal(2, 1, size)

    def square_after_transfer(old, new):
        return (_projection.transfer(_projection.compress(g, old), old, new) ** 2).sum()

    growth = np.asarray(jax.vmap(square_after_transfer)(old, new) / (g**2).sum(), np.float64)
    expected = 1 + (size + 1) / rank
    assert abs(growth.mean() - expected) < 5 * growth.std() / np.sqrt(count)


def test_a_cosine_transfer_never_lengthens():
    old = draw_many("cosine", 200, 5, 24, seed=0)
    new = draw_many("cosine", 200, 5, 24, seed=1)
    sketch = normal(2, 6, 5)
    moved = jax.vmap(_projection.transfer, (None, 0, 0))(sketch, old, new)
    assert (jnp.linalg.norm(moved, axis=2) <= jnp.linalg.norm(sketch, axis=1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_products_of_16_bit_gradients_accumulate_in_float32(dtype):
    """1 + 4096 · 2⁻¹²: a 16-bit accumulator would lose the small terms."""
    g = jnp.full((1, 4097), 2.0**-12, dtype).at[0, 0].set(1)
    a = jnp.ones((1, 4097))
    sketch = _projection.compress(g, a)
    assert sketch.dtype == jnp.float32 and sketch.item() == 2


def test_the_cipher_is_threefry():
    """To the bit that of JAX, for one key and for a key each."""
    keys = raw_keys(3, 7)
    words = jax.random.bits(jax.random.key(4), (7, 2), jnp.uint32)
    for own in (keys, keys[0]):
        each = jnp.broadcast_to(own, (7, 2))
        wanted = [threefry_2x32(k, w) for k, w in zip(each, words, strict=True)]
        got = jnp.stack(_cipher.encrypt(own, words[:, 0], words[:, 1]), axis=1)
        assert_array_equal(got, jnp.stack(wanted))
