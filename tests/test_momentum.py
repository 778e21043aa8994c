"""Algorithm 2: equal to its reference, stable as derived, exactly Optax on what is kept dense."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from draws import normal
from numpy.testing import assert_allclose

import florax
from florax import _projection

VARIANTS = {
    "gaussian": dict(projection="gaussian"),
    "gaussian, nesterov": dict(projection="gaussian", nesterov=True),
    "cosine": dict(residual=False),
    "cosine, residual": {},
    "cosine, residual, nesterov": dict(nesterov=True),
}
# The same, as the reference has it.
ALGORITHMS = {
    name: dict(residual="residual" in name, nesterov="nesterov" in name) for name in VARIANTS
}


def run(tx, grads):
    """The first state, and the updates and sketches of every step, from one compiled scan."""

    def step(state, grad):
        updates, state = tx.update(grad, state)
        return state, (updates, state.sketch.arrays)

    state = tx.init(jax.tree.map(lambda g: g[0], grads))
    _, outputs = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(state, grads)
    return state, *jax.tree.map(np.asarray, outputs)


def projections(state, cycles):
    """A of the only leaf, a matrix, by cycle, in float64."""
    draw = jax.jit(lambda cycle: dataclasses.replace(state.sketch, cycle=cycle).draw())
    drawn = [tuple(draw(cycle).values()) for cycle in range(cycles)]
    return [np.asarray(a, np.float64) for (a,) in drawn]


@pytest.mark.parametrize(
    ("variant", "side"),
    [
        ("cosine, residual, nesterov", "smaller"),
        *(
            pytest.param(variant, side, marks=pytest.mark.slow)
            for variant, side in [
                ("gaussian", "smaller"),
                ("gaussian, nesterov", "larger"),
                ("gaussian", "larger"),
                ("cosine, residual", "larger"),
                ("gaussian, nesterov", "smaller"),
                ("cosine", "smaller"),
                ("cosine", "larger"),
                ("cosine, residual", "smaller"),
                ("cosine, residual, nesterov", "larger"),
            ]
        ),
    ],
)
def test_states_and_updates_are_those_of_the_float64_reference(variant, side):
    options = VARIANTS[variant]
    # Ten steps a cycle are above the Gaussian's bound for both sides (6.9 and 8.7), so that
    # rounding errors stay as bounded as the momentum.
    tx = florax.flora_momentum(
        4, 0.9, 10, side=side, dimension_numbers=reference.dimension_numbers, **options
    )
    grads = {
        name: normal(seed, 50, *leaf[0])
        for seed, (name, leaf) in enumerate(reference.LEAVES.items())
    }
    state, updates, sketches = run(tx, grads)

    for name, drawn in reference.projections(state, 6).items():
        given = np.stack([reference.matrices(name, side, g) for g in grads[name]])
        emitted = np.stack([reference.matrices(name, side, u) for u in updates[name]])
        kept = sketches[name].reshape(*given.shape[:-1], 4)
        for i in range(given.shape[1]):
            expected = reference.momentum(given[:, i], drawn[:, i], 0.9, 10, **ALGORITHMS[variant])
            for t, (update, sketch) in enumerate(expected):
                assert reference.relative_error(emitted[t, i], update) < 1e-5
                assert reference.relative_error(kept[t, i], sketch) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_states_and_updates_are_within_the_derived_error_of_the_reference(variant):
    rank, decay, every, n, m = 4, 0.9, 10, 20, 12
    options = VARIANTS[variant]
    tx = florax.flora_momentum(rank, decay, every, **options)
    grads = normal(0, 50, n, m, dtype=jnp.bfloat16)
    state, updates, sketches = run(tx, grads)
    assert updates.dtype == sketches.dtype == jnp.bfloat16

    drawn = projections(state, 6)
    exact = [np.asarray(g, np.float64) for g in grads]
    expected = reference.momentum(exact, drawn, decay, every, **ALGORITHMS[variant])
    norm = functools.partial(np.linalg.norm, axis=1)  # of every row
    # bfloat16 keeps 8 bits: rounding to the nearest is off by 2⁻⁹ at most, stochastic by 2⁻⁷.
    nearest, stochastic = 2.0**-9, 2.0**-7
    error, average = np.zeros(n), np.zeros((n, rank))
    for t, (update, sketch) in enumerate(expected):
        a, grad = drawn[t // every], exact[t]
        from_projection = nearest * norm(grad) * np.linalg.norm(a)  # A is rounded to compress
        error = decay * error + (1 - decay) * from_projection
        # The emitted update comes from the sketch before it is rounded.
        emitted = (error + from_projection) * np.linalg.norm(a, 2)
        emitted += nearest * (norm(update) + emitted)
        assert np.all(norm(np.asarray(updates[t], np.float64) - update) < emitted * 1.01)
        average = decay * average + (1 - decay) * grad @ a.T
        error += stochastic * (norm(average) + error)
        if (t + 1) % every == 0:
            error *= np.linalg.norm(a @ drawn[t // every + 1].T, 2)
            error += stochastic * (norm(sketch) + error)
        assert np.all(norm(np.asarray(sketches[t], np.float64) - sketch) < error * 1.01)
        average = sketch


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_a_bfloat16_average_of_a_constant_reaches_it(decay):
    grad = normal(0, 64, 32, dtype=jnp.bfloat16)
    tx = florax.flora_momentum(8, decay, 10**6)
    state = tx.init(grad)
    steps = int(10 / (1 - decay))  # β¹⁰⸍⁽¹⁻ᵝ⁾ ≈ 5e-5
    end = jax.jit(lambda s: jax.lax.fori_loop(0, steps, lambda _, s: tx.update(grad, s)[1], s))(
        state
    )
    (target,) = state.sketch.compress([grad])
    target = np.asarray(target, np.float64)
    got = np.asarray(end.sketch.arrays, np.float64)
    assert end.sketch.arrays.dtype == jnp.bfloat16
    # A rounding has a variance of at most a quarter of a squared unit in the last place, 2⁻⁷ |C|;
    # the average sums them with weights β²ᵗ. The mean over 512 entries must not be off.
    deviation = (got - target) / abs(target)
    standard_error = 2.0**-7 / 2 / math.sqrt(1 - decay**2) / math.sqrt(target.size)
    assert abs(np.mean(deviation)) < 5 * standard_error
    assert np.mean(abs(deviation)) < 3 * standard_error * math.sqrt(target.size)


def test_rounding_to_the_nearest_would_have_stalled():
    """What the test above is there for: `optax.ema` in bfloat16 stops far from the constant."""
    tx = optax.ema(0.999, debias=False)
    grad = jnp.ones(4, jnp.bfloat16)
    end = jax.lax.fori_loop(0, 10_000, lambda _, s: tx.update(grad, s)[1], tx.init(grad))
    assert (end.ema < 0.6).all()


@pytest.mark.parametrize("projection", [pytest.param("gaussian", marks=pytest.mark.slow), "cosine"])
def test_a_constant_gradients_direction_survives_every_resampling(projection):
    n, m, rank, every, cycles = 64, 64, 32, 50, 40
    grad = normal(0, n, m)
    tx = florax.flora_momentum(rank, 0.9, every, projection=projection, residual=False)
    _, updates, _ = run(tx, jnp.broadcast_to(grad, (cycles * every, n, m)))
    inner = np.einsum("tnm,nm->t", updates, grad)
    cosine = inner / np.linalg.norm(updates, axis=(1, 2)) / np.linalg.norm(grad)
    # Right after a transfer the update is 0.9 G P P' + 0.1 G P', P = AᵀA. Its cosine with G, from
    # E‖G P‖² = s ‖G‖² and E⟨G, G P⟩ = e ‖G‖²:
    e, s = (rank / m, rank / m) if projection == "cosine" else (1.0, 1 + (m + 1) / rank)
    squares = (0.81 * s + 0.18 * e + 0.01) * s
    expected = (0.9 * e**2 + 0.1 * e) / math.sqrt(squares)
    switches = cosine[every::every]
    assert len(switches) == cycles - 1 and switches.min() > 0.8 * expected
    # The mean of a quotient is not the quotient of means; they are close where both spread little.
    spread = switches.std() / switches.mean()
    assert spread < 0.1
    assert_allclose(switches.mean(), expected, rtol=spread**2 + 5 * spread / math.sqrt(cycles - 1))


def test_the_cosine_projection_is_stable_when_resampled_at_every_step():
    grads = normal(0, 1000, 16, 12)
    tx = florax.flora_momentum(4, 0.9, 1, residual=False)
    _, updates, _ = run(tx, grads)
    longest = np.linalg.norm(grads, axis=2).max(0)  # every step is a mean of contractions
    assert np.all(np.linalg.norm(updates, axis=2) <= longest * (1 + 1e-5))


def test_the_gaussian_projection_diverges_when_resampled_at_every_step():
    grads = normal(0, 60, 16, 12)
    tx = florax.flora_momentum(4, 0.9, 1, projection="gaussian")
    _, updates, _ = run(tx, grads)
    assert np.linalg.norm(updates[-1]) > 1e6 * np.linalg.norm(grads[0])


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2, 7])
def test_gaussian_momentum_grows_from_cycle_to_cycle_exactly_as_the_bound_says(every):
    """E‖M‖² is multiplied by (1 + (m+1)/r) β²ᵏ: above 1 for κ below the bound, 5.5 here, only."""
    rank, m, decay, count = 4, 6, 0.9, 20_000
    bound = math.log(1 + (m + 1) / rank) / (2 * math.log(1 / decay))
    factor = (1 + (m + 1) / rank) * decay ** (2 * every)
    assert (factor > 1) == (every < bound)
    first = normal(0, m + 1, m)

    def squares(key):
        tx = florax.flora_momentum(rank, decay, every, key=key, projection="gaussian")
        grads = jnp.zeros((2 * every, *first.shape)).at[0].set(first)

        def step(state, grad):
            _, state = tx.update(grad, state)
            return state, (state.sketch.arrays**2).sum()

        return jax.lax.scan(step, tx.init(first), grads)[1]

    mean_square = jax.jit(jax.vmap(squares))(jnp.arange(count))
    start = (1 - decay) ** 2 * float((first**2).sum()) / decay**2
    for cycle in (1, 2):
        values = np.asarray(mean_square[:, cycle * every - 1], np.float64)
        standard_error = values.std() / math.sqrt(count)
        assert abs(values.mean() - start * factor**cycle) < 5 * standard_error


def test_dense_leaves_are_bit_equal_to_ema():
    params = {"bias": normal(0, 7), "kernel": normal(1, 6, 5), "scalar": jnp.float32(1)}
    ours, theirs = florax.flora_momentum(5, 0.9), optax.ema(0.9, debias=False)
    s, t = ours.init(params), theirs.init(params)
    for step in range(5):
        grads = jax.tree.map(lambda p: normal(step + 2, *p.shape), params)  # noqa: B023
        u, s = jax.jit(ours.update)(grads, s)
        v, t = jax.jit(theirs.update)(grads, t)
        chex.assert_trees_all_equal(u, v)
        chex.assert_trees_all_equal(s.sketch.arrays, t.ema)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("accumulator_dtype", [None, jnp.float32, jnp.bfloat16])
def test_dense_leaves_are_bit_equal_to_ema_in_every_dtype(dtype, accumulator_dtype):
    grads = normal(0, 3, 9, dtype=dtype)
    ours = florax.flora_momentum(5, 0.9, accumulator_dtype=accumulator_dtype)
    theirs = optax.ema(0.9, debias=False, accumulator_dtype=accumulator_dtype)
    s, t = ours.init(grads[0]), theirs.init(grads[0])
    for grad in grads:
        u, s = ours.update(grad, s)
        v, t = theirs.update(grad, t)
        chex.assert_trees_all_equal((u, s.sketch.arrays), (v, t.ema))
        chex.assert_trees_all_equal_dtypes((u, s.sketch.arrays), (v, t.ema))


def test_after_adafactor_dense_leaves_are_bit_equal_to_adafactors_own_momentum():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 10)
    params = {"bias": normal(0, 7), "kernel": normal(1, 130, 129)}
    ours = optax.chain(optax.adafactor(schedule), florax.flora_momentum(129, 0.9))
    theirs = optax.adafactor(schedule, momentum=0.9)
    s, t = ours.init(params), theirs.init(params)
    p = q = params
    for step in range(6):
        grads = jax.tree.map(lambda x: normal(step + 2, *x.shape), params)  # noqa: B023
        u, s = jax.jit(ours.update)(grads, s, p)
        v, t = jax.jit(theirs.update)(grads, t, q)
        p, q = optax.apply_updates(p, u), optax.apply_updates(q, v)
        chex.assert_trees_all_equal(p, q)


def test_with_residual_the_update_is_momentum_inside_and_the_plain_gradient_outside():
    grads = normal(0, 6, 20, 12)
    state, updates, sketches = run(florax.flora_momentum(4, 0.9), grads)
    (a,) = projections(state, 1)
    inside = lambda x: x @ a.T @ a  # noqa: E731
    for grad, update, sketch in zip(np.asarray(grads), updates, sketches, strict=True):
        assert_allclose(inside(update), sketch @ a, atol=2e-6)
        assert_allclose(update - inside(update), grad - inside(grad), atol=2e-6)


@pytest.mark.slow
def test_with_residual_the_distance_to_the_full_average_falls_with_the_rank_to_zero():
    grads = normal(0, 12, 20, 12)
    _, full = jax.lax.scan(lambda m, g: (0.9 * m + 0.1 * g,) * 2, jnp.zeros_like(grads[0]), grads)

    def distance(rank):
        tx = florax.flora_momentum(rank, 0.9, 5)
        return float(jnp.linalg.norm(run(tx, grads)[1] - full))

    distances = [distance(rank) for rank in (1, 4, 8, 12)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-5 < distances[-2]
    plain = float(jnp.linalg.norm(grads - full))
    assert 0.8 * plain < distances[0] < plain


def test_with_residual_full_rank_is_the_full_average_by_the_mathematics_too():
    """At rank m leaves are kept dense; this is the formula itself, M A + G − G AᵀA, at rank m."""
    grads = normal(0, 12, 20, 12)
    key = jax.random.key_data(jax.random.key(0, impl="threefry2x32"))
    a = _projection.draw("cosine", key, 12, (12,))
    average = jnp.zeros((20, 12))
    sketch = jnp.zeros((20, 12))
    for grad in grads:
        compressed = _projection.compress(grad, a)
        average, sketch = 0.9 * average + 0.1 * grad, 0.9 * sketch + 0.1 * compressed
        update = grad + _projection.decompress(sketch - compressed, a)
        assert_allclose(update, average, atol=5e-6)


def test_a_schedule_of_resample_every_never_reads_a_sketch_with_the_wrong_projections():
    """After any change of κ the state's cycle is the one its sketch was compressed with."""
    grad = normal(0, 200, 12)
    scheduled = optax.inject_hyperparams(florax.flora_momentum, static_args=("rank",))(
        rank=6,
        resample_every=optax.join_schedules([lambda _: 2, lambda _: 3], [5]),
        projection="cosine",
    )
    state = scheduled.init(grad)
    update = jax.jit(scheduled.update)
    cycles = []
    for _ in range(10):
        _, state = update(grad, state, grad)
        inner = state.inner_state
        cycles.append(int(inner.sketch.cycle))
        (leaf,) = inner.sketch.plan
        (a,) = inner.sketch.draw().values()
        # A sketch of a constant, read back, points along it: cosine √(r/m) = 0.7, and r/m = 0.5
        # right after a transfer. Read with another A it points nowhere: 0 ± 1/√2400.
        back = leaf.decompress(inner.sketch.arrays, a)
        assert jnp.vdot(back, grad) > 0.3 * jnp.linalg.norm(back) * jnp.linalg.norm(grad)
    assert cycles == [0, 1, 1, 2, 2, 3, 3, 3, 4, 4]
