"""Sketches of both sides: what two of them tell of a matrix, and the states that keep them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from numpy.testing import assert_array_equal

import florax
from florax import _projection


@pytest.fixture(scope="module", autouse=True)
def quickly(compile_quickly):
    """These tests are about values, not about speed."""


def accumulate(opt=None, every_k_schedule=2, rank=5, **arguments):
    arguments = {"side": "both", "projection": "cosine", **arguments}
    return florax.flora_accumulate(
        optax.identity() if opt is None else opt, every_k_schedule, rank, **arguments
    )


# --- the reference


def projections_of(state, cycles):
    """A and B of every leaf, by cycle."""
    of_columns, of_rows = (reference.projections(state, cycles, of) for of in ("", " across"))
    return {name: (of_columns[name], of_rows[name]) for name in of_columns}


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
def test_states_and_updates_are_those_of_the_float64_reference(mean):
    """The updates are off by what R is, and that is enlarged by n / (l - d): 20 / (8 - 3) at most.

    R and C are sums of 20 products of 8 gradients each, 160 roundings that are as often up as down:
    four times their root times 2⁻²⁴ is 3e-6, and as much again for what is made of them.
    """
    cycles, every, rank = 3, 8, 8
    tx = accumulate(
        every_k_schedule=every,
        rank=rank,
        use_grad_mean=mean,
        dimension_numbers=reference.dimension_numbers,
    )
    rng, grads = np.random.default_rng(0), {}
    for name, (shape, *_) in reference.LEAVES.items():
        grads[name] = jnp.asarray(rng.normal(size=(cycles * every + 3, *shape)), jnp.float32)
    params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads)
    first = tx.init(params)

    def step(state, grad):
        updates, state = tx.update(grad, state, params)
        return state, (updates, state.sketch.arrays)

    _, (updates, kept) = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(first, grads)
    for name, (a, b) in projections_of(first, cycles + 1).items():
        given, emitted = (
            np.stack([reference.matrices(name, "smaller", x) for x in tree[name]])
            for tree in (grads, updates)
        )
        pair = [np.reshape(x, (*given.shape[:2], *x.shape[-2:])) for x in kept[name]]
        assert [x.shape[-2:] for x in pair] == [(20, 3), (12, 8)]
        for i in range(given.shape[1]):
            expected = reference.accumulate_both(given[:, i], a[:, i], b[:, i], every, mean=mean)
            for t, (update, sketches) in enumerate(expected):
                assert reference.relative_error(emitted[t, i], update) < 6e-6
                for own, sketch in zip(pair, sketches, strict=True):
                    assert reference.relative_error(own[t, i], sketch) < 1e-5


# --- a matrix from its sketches


# n, m, and the ranks k and l of the sketches.
SHAPES = [(24, 24, 5, 8), (32, 24, 4, 8), (48, 12, 3, 18), (64, 16, 2, 12), (96, 24, 1, 2)]
EPS = 2.0**-24


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def draw(seed, n, m, k, l):  # noqa: E741
    """A and B, shapes (k, m) and (l, n)."""
    keys = jax.random.key_data(jax.random.split(jax.random.wrap_key_data(seed), 2))
    return _projection.draw("cosine", keys[0], k, (m,)), _projection.draw(
        "cosine", keys[1], l, (n,)
    )


def seeds(count, seed=0):
    return jax.random.key_data(jax.random.split(jax.random.key(seed, impl="threefry2x32"), count))


def sketches_of(g, a, b):
    return _projection.compress(g, a), _projection.compress(g.T, b)


reconstruct = jax.jit(_projection.reconstruct)


@jax.jit
def again(g, a, b):
    """G̃, from the sketches of G."""
    return _projection.reconstruct(*sketches_of(g, a, b), a, b)


def singular(n, m, values, seed=0):
    """A matrix with these singular values, and its singular vectors, (n, q) and (m, q)."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(size, len(values))))[0] for size in (n, m))
    return np.asarray((u * values) @ v.T, np.float32), u, v


@pytest.mark.parametrize("n, m, k, l", [shape for shape in SHAPES if shape[2] > 1])
def test_a_gradient_of_a_rank_below_that_of_its_sketch_is_recovered(n, m, k, l):  # noqa: E741
    """R, and what is guessed of it, are sums of n products and off by √n roundings; what is left
    of their difference is noise, and is enlarged by n / (l - d): of the most matrices this bounds
    the error. A sketch by chance near to a lower rank has more, of which there are five times.
    """
    errors = []
    for rank in range(1, k):
        for seed, own in enumerate(seeds(10)):
            factors = np.random.default_rng([seed, rank])
            g = factors.normal(size=(n, rank)) @ factors.normal(size=(rank, m))
            g = np.asarray(g, np.float32)
            errors.append(reference.relative_error(again(g, *draw(own, n, m, k, l)), g))
    bound = n / (l - k) * math.sqrt(n) * 2 * EPS
    assert np.median(errors) < bound and max(errors) < 5 * bound


@pytest.mark.parametrize("n, m, k, l", SHAPES)
def test_so_is_one_of_the_very_rank_where_its_sketch_has_that_rank_too(n, m, k, l):  # noqa: E741
    """What is off in C by a rounding is off in the guess by 1 / its least singular value."""
    seen = 0
    for seed, own in enumerate(seeds(20)):
        factors = np.random.default_rng(seed)
        g = np.asarray(factors.normal(size=(n, k)) @ factors.normal(size=(k, m)), np.float32)
        a, b = draw(own, n, m, k, l)
        singular_values = np.linalg.svd(g @ a.T, compute_uv=False)
        if singular_values[-1] > 1e-3 * singular_values[0]:
            assert reference.relative_error(again(g, a, b), g) < 1e-3
            seen += 1
    assert seen >= 15


@pytest.mark.parametrize("n, m, k, l", SHAPES)
def test_what_is_in_the_row_space_of_the_projection_is_exact(n, m, k, l):  # noqa: E741
    """G̃ Aᵀ = C, whatever G is: what is added to C A is in the columns that A does not see."""
    for seed, own in enumerate(seeds(5)):
        g = np.random.default_rng(seed).normal(size=(n, m)).astype(np.float32)
        a, b = draw(own, n, m, k, l)
        got = again(g, a, b)
        # Each entry is a sum of m products; what must vanish in it has been enlarged.
        allowed = math.sqrt(m) * 2 * EPS * np.linalg.norm(got)
        assert np.linalg.norm(got @ a.T - g @ a.T) < allowed


@pytest.mark.parametrize("n, m, k, l", [(32, 24, 2, 4), (32, 24, 4, 8), (24, 24, 4, 6)])
@pytest.mark.parametrize("spectrum", ["falling", "a few and noise"])
def test_it_is_nearly_unbiased_in_every_direction(spectrum, n, m, k, l):  # noqa: E741
    """Of uᵢᵀ E[G̃] vⱼ the diagonal is within a tenth of the singular values, the rest is zero.

    Nearly: what is judged is what was fitted, and the correction for it is right on average only.
    Five standard errors of 2,000 draws: a false alarm in 576 entries once in 3,000 runs; the
    seeds are fixed.
    """
    values = {"falling": 1 / np.arange(1.0, m + 1), "a few and noise": np.full(m, 0.1)}[spectrum]
    values[:2] = 1.0
    g, u, v = singular(n, m, values)
    many = jax.jit(jax.vmap(lambda seed: again(g, *draw(seed, n, m, k, l))))
    found = np.einsum("ni,cnm,mj->cij", u, np.asarray(many(seeds(2000)), np.float64), v)
    mean, standard_error = found.mean(0), found.std(0) / math.sqrt(len(found))
    allowed = 5 * standard_error + np.diag(0.1 * values)
    assert np.all(abs(mean - np.diag(values)) < allowed)
    gain = np.einsum("cii,i->c", found, values) / np.sum(values**2)
    assert 0.9 < gain.mean() < 1.1


@pytest.mark.parametrize(
    "n, m, rank", [(96, 24, 10), (96, 96, 24), (96, 96, 48), (256, 64, 16), (128, 128, 32)]
)
def test_it_is_nearer_than_an_unbiased_sketch_of_one_side_of_as_many_bytes(n, m, rank):
    """Of a spectrum that falls as 1/i. The square error of (m / r) G AᵀA is m / r - 1 of ‖G‖²."""
    k = 2 * rank // 5
    g, *_ = singular(n, m, 1 / np.arange(1, m + 1))
    many = jax.vmap(lambda seed: again(g, *draw(seed, n, m, k, (rank - k) * n // m)))
    errors = np.sum((np.asarray(jax.jit(many)(seeds(24))) - g) ** 2, (1, 2)) / np.sum(g**2)
    standard_error = errors.std() / math.sqrt(len(errors))
    assert errors.mean() + 5 * standard_error < m / rank - 1


# --- numbers of every size


N, M, K, L = 32, 24, 4, 8


@functools.cache
def example():
    """Sketches of a matrix, and what they were made with."""
    g, *_ = singular(N, M, 1 / np.arange(1, M + 1))
    a, b = draw(seeds(1)[0], N, M, K, L)
    return (*sketches_of(g, a, b), a, b)


@pytest.mark.parametrize("exponent", [-100, -30, 1, 60, 120])
def test_powers_of_two_scale_it_exactly(exponent):
    c, r, a, b = example()
    scaled = reconstruct(jnp.ldexp(c, exponent), jnp.ldexp(r, exponent), a, b)
    assert_array_equal(scaled, jnp.ldexp(reconstruct(c, r, a, b), exponent))


@pytest.mark.parametrize("factor", [1e-30, 1e-15, 1e15, 1e30])
def test_numbers_whose_squares_float32_has_not_are_as_good_as_others(factor):
    c, r, a, b = example()
    got = np.asarray(reconstruct(c * np.float32(factor), r * np.float32(factor), a, b), np.float64)
    # Every entry of the sketches is rounded once by the factor.
    allowed = N / (L - K) * 4 * EPS
    assert reference.relative_error(got / factor, reconstruct(c, r, a, b)) < allowed


def test_of_zero_it_is_zero():
    c, r, a, b = example()
    assert not np.any(reconstruct(0 * c, 0 * r, a, b))
    # One of them alone may be: a gradient that A, or B, does not see.
    assert np.all(np.isfinite(reconstruct(0 * c, r, a, b)))
    assert np.all(np.isfinite(reconstruct(c, 0 * r, a, b)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["right", "left"])
def test_what_is_not_finite_is_finite_nowhere(which, bad):
    """In no entry, for every one depends on both sketches; and in no other matrix of a stack."""
    *pair, a, b = example()
    broken = [x.at[1, 0].set(bad) if i == which else x for i, x in enumerate(pair)]
    stack = [jnp.stack(xs) for xs in zip(pair, broken, strict=True)]
    good, got = jax.jit(jax.vmap(_projection.reconstruct, (0, 0, None, None)))(*stack, a, b)
    assert not np.any(np.isfinite(got))
    np.testing.assert_allclose(good, reconstruct(*pair, a, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_it_is_computed_in_float32_at_least(dtype):
    """Of bfloat16 sketches what their float32 values give; float64 recovers to its own eps."""
    with jax.enable_x64(dtype == jnp.float64):
        c, r, a, b = (jnp.asarray(np.asarray(x)) for x in example())
        c, r = c.astype(dtype), r.astype(dtype)
        got = _projection.reconstruct(c, r, a, b)
        wide = jnp.promote_types(dtype, jnp.float32)
        assert got.dtype == wide
        assert_array_equal(got, _projection.reconstruct(c.astype(wide), r.astype(wide), a, b))


def test_several_axes_are_those_of_one_matrix():
    c, r, a, b = example()
    several = reconstruct(
        c.reshape(4, 8, K), r.reshape(2, 3, 4, L), a.reshape(K, 2, 3, 4), b.reshape(L, 4, 8)
    )
    assert_array_equal(several.reshape(N, M), reconstruct(c, r, a, b))
