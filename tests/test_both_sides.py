"""Sketches of both sides: what two of them tell of a matrix, and the states that keep them."""

import dataclasses
import functools
import math

import chex
import draws
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_array_equal

import florax
from florax import _projection, _sketches, _sums


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


def by_night(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("mean", [True, by_night(False)], ids=["mean", "sum"])
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


def shapes(least=1):
    """Those whose k is not below that; by day a square one, and one whose k is a sixth of l."""
    return [
        shape if shape in ((24, 24, 5, 8), (48, 12, 3, 18)) else by_night(*shape)
        for shape in SHAPES
        if shape[2] >= least
    ]


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


def put_together(right, left, a, b):
    """The matrix, of both of its sketches, as `_sums` and `Leaf` do it."""
    mixed, exponent = _projection.mix(right, left, b)
    basis, rows = _projection.orthonormal(mixed), math.prod(right.shape[:-1])
    top, bottom = _projection.solve(left, a, rows, mixed, exponent, basis)
    wide = jnp.concatenate([right.astype(top.dtype), jnp.moveaxis(b, 0, -1)], axis=-1)
    return _projection.decompress(wide, jnp.concatenate([top, bottom]))


reconstruct = jax.jit(put_together)


@jax.jit
def again(g, a, b):
    """G̃, from the sketches of G."""
    return put_together(*sketches_of(g, a, b), a, b)


def width_of_c(rank):
    """Up to two fifths, a multiple of the power of two that is in the rank 8 to 15 times."""
    unit = 2 ** max(0, math.floor(math.log2(rank / 8)))
    return max(k for k in range(0, rank, unit) if k <= 2 * rank / 5)


def singular(n, m, values, seed=0):
    """A matrix with these singular values, and its singular vectors, (n, q) and (m, q)."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(size, len(values))))[0] for size in (n, m))
    return np.asarray((u * values) @ v.T, np.float32), u, v


def roundings(g, rank, a, b):
    """By how much of itself a G of this rank d may be off that is put together from its sketches.

    G = U Σ Vᵀ, and W = Vᵀ Aᵀ. Without roundings the guess C (B C)⁺ R is G, and C⁺ G = W⁺ Vᵀ,
    C (B C)⁺ = U (B U)⁺. With E_C, E_R and E_M, those of C, R and B C, it is off, to first order, by

        E_C W⁺ Vᵀ + U (B U)⁺ (E_R - E_M W⁺ Vᵀ).

    Let α = 1 / σ(W) and β = 1 / σ(B U), of the least singular values: neither is below 1. They are
    measured, and Σ is not in it. Entries are sums of n products at most: they are off by √n EPS, if
    in whatever order a CPU adds them up roundings are as often up as down. C is about √(k / m) of G
    and R √(l / n), at most 0.62 here, and B C less: α E_C + β E_R + αβ E_M is at most 2 αβ √n EPS.
    And what is left of R, 2 √n EPS, roundings of it and of its guess, is enlarged by n / (l - d).

    Of 300 seeds of each shape most are below a fifth of it, and the furthest off by two fifths.
    """
    (n, _), (k, l) = g.shape, (len(a), len(b))  # noqa: E741
    u, _, v = np.linalg.svd(np.asarray(g, np.float64))
    sines = [
        np.linalg.svd(np.asarray(x, np.float64) @ y, compute_uv=False)[-1]
        for x, y in ((a, v[:rank].T), (b, u[:, :rank]))
    ]
    return 2 * math.sqrt(n) * EPS * (1 / math.prod(sines) + n / (l - k))


@pytest.mark.parametrize("least", [1.0, 1e-4])
@pytest.mark.parametrize("k", [8, 16])
def test_a_basis_is_orthonormal_even_where_columns_nearly_depend_on_each_other(k, least):
    """But for the last shift, at most, and roundings: PᵀP are k² sums of n products, off by √n EPS.

    Squares of the least singular values are lost in the roundings of the first PᵀP: one pass less
    leaves some 1e-2.
    """
    n = 5 * k // 2
    matrix, _, _ = singular(n, k, np.geomspace(1, least, k))
    basis = np.asarray(_projection.orthonormal(jnp.asarray(matrix))[0], np.float64)
    off = np.linalg.norm(basis.T @ basis - np.eye(k), 2)
    assert off <= _projection._SHIFTS[-1] + k * n**0.5 * EPS


@pytest.mark.parametrize("n, m, k, l", shapes(least=2))
def test_a_gradient_of_a_rank_below_that_of_its_sketch_is_recovered(n, m, k, l):  # noqa: E741
    """The most of them as if only what is left of R were off."""
    errors, allowed = [], []
    for rank in range(1, k):
        for seed, own in enumerate(seeds(10)):
            factors = np.random.default_rng([seed, rank])
            g = factors.normal(size=(n, rank)) @ factors.normal(size=(rank, m))
            g, (a, b) = np.asarray(g, np.float32), draw(own, n, m, k, l)
            errors.append(reference.relative_error(again(g, a, b), g))
            allowed.append(roundings(g, rank, a, b))
    assert np.all(np.array(errors) < allowed)
    assert np.median(errors) < 2 * math.sqrt(n) * EPS * n / (l - k)


@pytest.mark.parametrize("near", [1e-2, 1e-4, 0])
@pytest.mark.parametrize("n, m, k, l", shapes(least=3))
def test_so_it_is_where_columns_of_its_sketch_are_near_to_each_other(n, m, k, l, near):  # noqa: E741
    """Others tell them apart, so that A V is as good as ever.

    The most of them: where it is between them and roundings, what is lost may be more.
    """
    shares = []
    for seed, own in enumerate(seeds(20)):
        a, b = draw(own, n, m, k, l)
        factors, axis = np.random.default_rng(seed), np.asarray(a, np.float64)
        w = factors.normal(size=(2, m))
        w -= (1 - near) * np.outer(w @ (axis[1] - axis[0]), axis[1])
        g = np.asarray(factors.normal(size=(n, 2)) @ w, np.float32)
        shares.append(reference.relative_error(again(g, a, b), g) / roundings(g, 2, a, b))
    assert np.median(shares) < 1


@pytest.mark.parametrize("n, m, k, l", shapes())
def test_so_is_one_of_the_very_rank_where_its_sketch_has_that_rank_too(n, m, k, l):  # noqa: E741
    seen = 0
    for seed, own in enumerate(seeds(20)):
        factors = np.random.default_rng(seed)
        g = np.asarray(factors.normal(size=(n, k)) @ factors.normal(size=(k, m)), np.float32)
        a, b = draw(own, n, m, k, l)
        singular_values = np.linalg.svd(g @ a.T, compute_uv=False)
        if singular_values[-1] > 1e-3 * singular_values[0]:
            assert reference.relative_error(again(g, a, b), g) < roundings(g, k, a, b)
            seen += 1
    assert seen >= 15


@pytest.mark.parametrize("n, m, k, l", shapes())
def test_what_is_in_the_row_space_of_the_projection_is_exact(n, m, k, l):  # noqa: E741
    """G̃ Aᵀ = C, whatever G is: what is added to C A is in the columns that A does not see."""
    for seed, own in enumerate(seeds(5)):
        g = np.random.default_rng(seed).normal(size=(n, m)).astype(np.float32)
        a, b = draw(own, n, m, k, l)
        got = again(g, a, b)
        # Each entry is a sum of m products; what must vanish in it has been enlarged.
        allowed = math.sqrt(m) * 2 * EPS * np.linalg.norm(got)
        assert np.linalg.norm(got @ a.T - g @ a.T) < allowed


@pytest.mark.parametrize(
    "n, m, k, l", [(32, 24, 4, 8), by_night(32, 24, 2, 4), by_night(24, 24, 4, 6)]
)
@pytest.mark.parametrize("spectrum", ["falling", by_night("a few and noise")])
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
    "n, m, rank, share",
    [
        (96, 24, 10, 1),
        by_night(96, 96, 24, 1),
        by_night(96, 96, 48, 1),
        by_night(256, 64, 16, 1),
        by_night(128, 128, 32, 1),
        by_night(256, 256, 64, 1 / 2),
    ],
)
def test_it_is_nearer_than_an_unbiased_sketch_of_one_side_of_as_many_bytes(n, m, rank, share):
    """Of a spectrum that falls as 1/i. The square error of (m / r) G AᵀA is m / r - 1 of ‖G‖²."""
    k = width_of_c(rank)
    g, *_ = singular(n, m, 1 / np.arange(1, m + 1))
    many = jax.vmap(lambda seed: again(g, *draw(seed, n, m, k, (rank - k) * n // m)))
    errors = np.sum((np.asarray(jax.jit(many)(seeds(24))) - g) ** 2, (1, 2)) / np.sum(g**2)
    standard_error = errors.std() / math.sqrt(len(errors))
    assert errors.mean() + 5 * standard_error < share**2 * (m / rank - 1)


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


@pytest.mark.parametrize("bad", [np.nan, np.inf, by_night(-np.inf)])
@pytest.mark.parametrize("which", [0, 1], ids=["right", "left"])
def test_what_is_not_finite_is_finite_nowhere(which, bad):
    """In no entry, for every one depends on both sketches; and in no other matrix of a stack."""
    *pair, a, b = example()
    broken = [x.at[1, 0].set(bad) if i == which else x for i, x in enumerate(pair)]
    stack = [jnp.stack(xs) for xs in zip(pair, broken, strict=True)]
    good, got = jax.jit(jax.vmap(put_together, (0, 0, None, None)))(*stack, a, b)
    assert not np.any(np.isfinite(got))
    np.testing.assert_allclose(good, reconstruct(*pair, a, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, *map(by_night, (jnp.float16, jnp.float32, jnp.float64))]
)
def test_it_is_computed_in_float32_at_least(dtype):
    """Of bfloat16 sketches what their float32 values give; float64 recovers to its own eps."""
    with jax.enable_x64(dtype == jnp.float64):
        c, r, a, b = (jnp.asarray(np.asarray(x)) for x in example())
        c, r = c.astype(dtype), r.astype(dtype)
        got = reconstruct(c, r, a, b)
        wide = jnp.promote_types(dtype, jnp.float32)
        assert got.dtype == wide
        assert_array_equal(got, reconstruct(c.astype(wide), r.astype(wide), a, b))


def test_several_axes_are_those_of_one_matrix():
    c, r, a, b = example()
    several = reconstruct(
        c.reshape(4, 8, K), r.reshape(2, 3, 4, L), a.reshape(K, 2, 3, 4), b.reshape(L, 4, 8)
    )
    assert_array_equal(several.reshape(N, M), reconstruct(c, r, a, b))


# Each has several axes on one side, or a stack of two; the larger side comes first or last.
GEOMETRIES = {
    "columns": ((24, 4, 5), florax.FloraDimensionNumbers(0, (1, 2))),
    "rows": ((4, 5, 24), florax.FloraDimensionNumbers((0, 1), 2)),
    "stacks": ((2, 12, 3, 16), florax.FloraDimensionNumbers(1, 3, (0, 2))),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape, axes", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_whatever_its_axes_a_leaf_of_low_rank_is_recovered(shape, axes):
    """Of rank 1 where the first sketch has 3."""
    rng, factors = np.random.default_rng(0), np.ones(shape)
    for side in (axes.rows, axes.columns):
        own = [size if axis in {*side, *axes.batch} else 1 for axis, size in enumerate(shape)]
        factors = factors * rng.normal(size=own)
    g = jnp.asarray(factors, jnp.float32)
    tx = accumulate(None, 1, 8, dimension_numbers=axes)
    updates, _ = jax.jit(tx.update)(g, tx.init(g), g)
    assert reference.relative_error(updates, factors) < 2e-5


# --- the two sketches of a state

# The same operations by other kernels: eight products after each other, of at most 20 terms, make
# entries below 16.
ROUNDINGS = 8 * 20 * 16 * EPS


def test_a_leaf_does_not_depend_on_those_beside_it_whose_sketches_are_stored_alike():
    """In integers axes are not seen: a kernel of two heads is like one that is a matrix."""
    axes = {"heads": florax.FloraDimensionNumbers(0, (1, 2)), "kernel": None}
    tx = accumulate(
        every_k_schedule=1,
        accumulator_dtype=jnp.int8,
        dimension_numbers=lambda path, leaf: axes[path[0].key],
    )

    @jax.jit
    def there_and_back(grads):
        return florax.finish(tx, grads, florax.accumulate(tx, grads, tx.init(grads)))[0]

    grads = {"heads": draws.normal(0, 12, 2, 7), "kernel": draws.normal(1, 12, 14)}
    together, alone = there_and_back(grads), there_and_back({"heads": grads["heads"]})
    np.testing.assert_allclose(together["heads"], alone["heads"], rtol=0, atol=ROUNDINGS)


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 2, 4])
def test_how_many_matrices_are_solved_for_at_once_makes_no_difference(monkeypatch, together):
    """Five in a stack, and one by itself that is like them: loops with a rest, and without."""
    tx = accumulate(
        every_k_schedule=1, dimension_numbers=lambda path, leaf: STACK if leaf.ndim == 3 else None
    )
    grads = {"layers": draws.normal(0, 5, 20, 12), "single": draws.normal(1, 20, 12)}
    wanted, _ = tx.update(grads, tx.init(grads))
    monkeypatch.setattr(_sums, "_TOGETHER", 4 * together * 8 * 12)  # bytes of R, and of B nearly
    got, _ = tx.update(grads, tx.init(grads))
    chex.assert_trees_all_close(got, wanted, rtol=0, atol=ROUNDINGS)


@pytest.mark.slow
def test_both_projections_of_a_square_matrix_are_independent():
    """And those of a cycle, of a layer and of a key from those of others."""
    tx = accumulate(rank=20, dimension_numbers=florax.FloraDimensionNumbers(1, 2, 0))
    state = tx.init(jnp.zeros((2, 40, 40)))
    drawn = [
        matrix
        for cycle in (0, 1)
        for stack in dataclasses.replace(state.sketch, cycle=jnp.int32(cycle)).draw().values()
        for matrix in stack
    ]
    assert [a.shape for a in drawn] == [(8, 40)] * 2 + [(12, 40)] * 2 + [(8, 40)] * 2 + [
        (12, 40)
    ] * 2
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            # The square of a random unit row on k orthonormal ones of 40 is k / 40 on average.
            overlap = np.sum(np.square(a @ b.T)) / len(a) / len(b) * 40
            assert 0.6 < overlap < 1.4


@pytest.mark.slow
def test_the_same_key_gives_the_same_and_another_key_another():
    g = draws.normal(0, 20, 12)

    update = jax.jit(accumulate(every_k_schedule=1).update)

    def of(key):
        return update(g, accumulate(every_k_schedule=1, key=key).init(g), g)[0]

    assert_array_equal(of(3), of(jax.random.key(3, impl="threefry2x32")))
    assert np.linalg.norm(of(3) - of(4)) > 0.1 * np.linalg.norm(g)


@pytest.mark.slow
def test_the_sum_of_sketches_is_the_sketch_of_the_sum():
    """And so of a mean; the updates, too, are those of the sum at once."""
    tx, one = accumulate(use_grad_mean=False), accumulate(None, 1, use_grad_mean=False)
    grads = draws.normal(0, 2, 20, 12)
    state = tx.init(grads[0])
    add = jax.jit(functools.partial(florax.accumulate, tx))
    after = [add(g, state).sketch.arrays for g in (*grads, grads.sum(0))]
    sums = jax.tree.map(jnp.add, *after[:2])
    chex.assert_trees_all_close(sums, after[2], rtol=1e-5, atol=1e-6)
    both, _ = jax.jit(tx.update)(grads[1], add(grads[0], state))
    at_once, _ = jax.jit(one.update)(grads.sum(0), one.init(grads[0]))
    # Sums of 20 products, enlarged by up to 20 / (5 - 2).
    np.testing.assert_allclose(both, at_once, rtol=1e-4, atol=5e-5)


def report_of(shape, rank, side, dtype=None, **arguments):
    """The report, and the bytes of the arrays of the state."""
    tx = accumulate(None, 2, rank, side=side, accumulator_dtype=dtype, **arguments)
    params = jax.ShapeDtypeStruct(shape, jnp.float32)
    arrays = jax.tree.leaves(jax.eval_shape(tx.init, params).sketch.arrays)
    (row,) = florax.state_report(tx, params).rows
    return row, sum(x.size * x.dtype.itemsize for x in arrays)


hypothesis = pytest.importorskip("hypothesis", reason="hypothesis comes with the extra `test`")
st = hypothesis.strategies
MANY = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def shapes_and_ranks(draw):
    shape = draw(st.integers(4, 400)), draw(st.integers(4, 400))
    return shape, draw(st.integers(3, min(shape) - 1))


@MANY
@hypothesis.given(shapes_and_ranks(), st.sampled_from([None, jnp.bfloat16]), st.integers(0, 3))
def test_two_sketches_take_no_more_bytes_than_one(shape_and_rank, dtype, layers):
    """n k + m l, and l is rounded down from (r - k) n / m: less than m numbers of them are left."""
    (n, m), rank = shape_and_rank
    stack = dict(dimension_numbers=florax.FloraDimensionNumbers(1, 2, 0)) if layers else {}
    shape, count = ((layers, n, m), layers) if layers else ((n, m), 1)
    row, kept = report_of(shape, rank, "both", dtype, **stack)
    of_one, _ = report_of(shape, rank, "smaller", dtype, **stack)
    larger, smaller = max(n, m), min(n, m)
    k = width_of_c(rank)
    l = (rank - k) * larger // smaller  # noqa: E741
    assert (row.rank, row.side, row.across) == (k, smaller, (l, larger))
    assert k < l < larger
    size = jnp.dtype(dtype or jnp.float32).itemsize
    assert row.state_bytes == kept == size * count * (larger * k + smaller * l)
    assert row.full_bytes == size * count * n * m
    assert of_one.state_bytes - size * count * smaller < row.state_bytes <= of_one.state_bytes


@MANY
@hypothesis.given(shapes_and_ranks(), st.sampled_from([(jnp.int8, 1.1), (jnp.int4, 1.25)]))
def test_in_integers_short_rows_take_a_few_scales_more(shape_and_rank, dtype_and_factor):
    """A scale for every 33 to 64 entries of a row, and a word begun in each: in 4 bits it shows."""
    shape, rank = shape_and_rank
    hypothesis.assume(min(shape) >= 32)
    dtype, factor = dtype_and_factor
    row, kept = report_of(shape, rank, "both", dtype)
    assert (
        row.state_bytes == kept <= factor * report_of(shape, rank, "smaller", dtype)[0].state_bytes
    )


def test_reports_show_both_sketches():
    tx = accumulate(None, 2, 64)
    params = {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32), "b": jnp.zeros(3)}
    table = str(florax.state_report(tx, params))
    assert "  24 + 40  256 + 256  float32  64.0 KiB" in table
    report = florax.gradient_report(
        lambda params, x: jnp.mean(x @ params["w"]) + params["b"].sum(), tx, params, jnp.ones(256)
    )
    rows = {row.path: (row.sketch, row.across) for row in report.rows}
    assert rows == {"['b']": (None, None), "['w']": ((256, 24), (256, 40))}
    assert "  sketch 256×24 and 256×40" in str(report)


# --- among other transformations


PARAMS = {
    "bias": jnp.linspace(-1, 1, 12),
    "empty": jnp.zeros((0, 8)),
    "kernel": jnp.sin(jnp.arange(240.0)).reshape(12, 20),
    "none": jnp.zeros((2, 0, 5)),
    "small": jnp.ones((4, 30)),
    "square": jnp.cos(jnp.arange(169.0)).reshape(13, 13),
}
NAMES = {name: name in ("bias", "square") for name in PARAMS}
WRAPPED = {
    "plain": lambda tx: tx,
    "masked": lambda tx: optax.masked(tx, NAMES),
    "partition": lambda tx: optax.partition({True: tx, False: optax.sgd(0.1)}, NAMES),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda scale: optax.chain(tx, optax.scale(scale))
    )(scale=0.5),
    "if finite": lambda tx: optax.apply_if_finite(tx, 3),
}
DTYPES = [None, jnp.bfloat16, jnp.int8, jnp.int4]


def gradients(seed, like=PARAMS):
    return draws.normal_like(seed, like)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("name", WRAPPED)
def test_an_update_is_compiled_once_gives_up_its_state_and_changes_no_type(name, kept, dtype):
    tx, traced = WRAPPED[name](accumulate(optax.adam(0.1), accumulator_dtype=kept)), []
    params = optax.tree.cast(PARAMS, dtype)

    @functools.partial(jax.jit, donate_argnums=1)
    def update(grads, state, params):
        traced.append(1)
        return tx.update(grads, state, params)

    state, like = tx.init(params), jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, like)
    for seed in range(4):
        before = _sketches.find(state, _sketches.Sketches)[0].key
        updates, state = update(gradients(seed, params), state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes((updates, state), (params, like))
        chex.assert_tree_all_finite(updates)
        assert before.is_deleted()
    assert len(traced) == 1
    assert np.any(updates["square"]) and bool(florax.has_updated(state))


@pytest.mark.slow
@pytest.mark.parametrize("kept", [jnp.bfloat16, jnp.int8], ids=["bfloat16", "int8"])
def test_fewer_bits_are_near_to_the_update_of_float32(kept):
    """What is rounded of R, a unit of 2⁻⁸ or 1/127 of the largest, is enlarged by 20 / (5 - 2)."""

    def last(dtype):
        tx = accumulate(accumulator_dtype=dtype)
        state = tx.init(PARAMS)
        for seed in range(2):
            updates, state = jax.jit(tx.update)(gradients(seed), state, PARAMS)
        return updates

    rounded, exact = last(kept), last(None)
    for name in ("kernel", "square"):
        assert 1e-4 < reference.relative_error(rounded[name], np.asarray(exact[name])) < 0.1


@pytest.mark.slow
def test_a_skipped_micro_step_is_as_if_it_had_never_been():
    tx = accumulate(should_skip_update_fn=optax.skip_not_finite)
    update, ends = jax.jit(tx.update), []
    bad = {**gradients(0), "kernel": PARAMS["kernel"].at[0, 0].set(jnp.nan)}
    for own in ([gradients(1), bad, gradients(2)], [gradients(1), gradients(2)]):
        state = tx.init(PARAMS)
        for grads in own:
            updates, state = update(grads, state, PARAMS)
        ends.append((updates, state._replace(skip_state=())))
    chex.assert_trees_all_equal(*ends)


@pytest.mark.slow
def test_what_is_not_finite_is_forgotten_with_its_cycle():
    tx = accumulate()
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    bad = {**gradients(0), "kernel": PARAMS["kernel"].at[0, 0].set(jnp.inf)}
    for grads in (bad, gradients(1)):
        updates, state = update(grads, state, PARAMS)
    assert not np.any(np.isfinite(updates.pop("kernel")))
    chex.assert_tree_all_finite(updates)
    for seed in (2, 3):
        updates, state = update(gradients(seed), state, PARAMS)
    chex.assert_tree_all_finite(updates)


# --- meshes


WIDE = {"kernel": jnp.zeros((16, 24)), "stack": jnp.zeros((4, 24, 16))}
SPECS = {
    "rows": {"kernel": P("x"), "stack": P(None, "x")},
    "columns": {"kernel": P(None, "x"), "stack": P(None, None, "x")},
    "both": {"kernel": P("x", "y"), "stack": P("y", "x")},
    "one axis by all": {"kernel": P(("x", "y")), "stack": P(None, ("x", "y"))},
}
STACK = florax.FloraDimensionNumbers(1, 2, batch=0)
ON_MESH = accumulate(
    optax.sgd(1.0),
    rank=6,
    dimension_numbers=lambda path, leaf: STACK if leaf.ndim == 3 else None,
)
# R and C are sums of at most 24 products in another order, enlarged by up to 24 / (5 - 2).
DIVIDED = dict(rtol=1e-4, atol=2e-5)


def placed(tree, specs, mesh):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


@functools.cache
def on_one_device():
    state, updates = ON_MESH.init(WIDE), []
    for seed in range(4):
        own, state = jax.jit(ON_MESH.update)(gradients(seed, WIDE), state, WIDE)
        updates.append(own)
    return updates


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis_type, specs",
    [
        pytest.param(
            axis_type,
            SPECS[name],
            id=f"{axis_type.name}-{name}",
        )
        for axis_type in (AxisType.Explicit, AxisType.Auto)
        for name in SPECS
    ],
)
def test_on_a_mesh_updates_are_those_of_one_device(axis_type, specs):
    mesh = meshes.make((4, 2), ("x", "y"), axis_type)
    with jax.set_mesh(mesh):
        params = placed(WIDE, specs, mesh)
        state, update = jax.jit(ON_MESH.init)(params), jax.jit(ON_MESH.update)
        types = jax.tree.map(jax.typeof, state)
        for seed, expected in enumerate(on_one_device()):
            updates, state = update(placed(gradients(seed, WIDE), specs, mesh), state, params)
            chex.assert_trees_all_close(updates, expected, **DIVIDED)
            if axis_type == AxisType.Explicit:
                assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
                assert jax.tree.map(jax.typeof, state) == types


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS.keys())
def test_on_an_explicit_mesh_each_sketch_is_divided_along_its_own_side(specs):
    mesh = meshes.make((4, 2), ("x", "y"), AxisType.Explicit)
    with jax.set_mesh(mesh):
        arrays = jax.eval_shape(ON_MESH.init, placed(WIDE, specs, mesh)).sketch.arrays
        short, long = (*specs["kernel"], None)[:2]
        right, left = arrays["kernel"]
        assert (right.sharding.spec[0], left.sharding.spec[0]) == (long, short)
        layers, long, short = (*specs["stack"], None)[:3]
        right, left = arrays["stack"]
        assert right.sharding.spec[:2] == (layers, long)
        assert left.sharding.spec[:2] == (layers, short)


@pytest.mark.slow  # by day with one sketch, in `contract/test_devices`
def test_devices_may_accumulate_by_themselves_and_share_only_sketches():
    mesh = meshes.make((8,), ("data",))
    params = {"kernel": jnp.zeros((16, 24))}
    tx = accumulate(optax.sgd(1.0), rank=6)
    grads = draws.normal(0, 8, 2, 16, 24)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P())
    def step(grads, state, params):
        for i in range(2):
            state = florax.accumulate(tx, {"kernel": grads[0, i]}, state)
        shared = jax.lax.pmean(state.sketch.arrays, "data")
        state = state._replace(sketch=dataclasses.replace(state.sketch, arrays=shared))
        return florax.finish(tx, params, state)

    new, state = step(grads, tx.init(params), params)
    one = accumulate(optax.sgd(1.0), 1, 6)
    mean, _ = one.update({"kernel": grads.mean((0, 1))}, one.init(params), params)
    chex.assert_trees_all_close(new, mean, **DIVIDED)
    assert int(state.gradient_step) == 1
