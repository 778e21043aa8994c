"""Algorithm 1: equal to its reference, exactly `optax.MultiSteps` on what is not compressed."""

import collections
import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from draws import normal
from numpy.testing import assert_allclose, assert_array_equal

import florax


def run(tx, grads):
    """The first state, and the updates and states of every step, from one compiled scan."""
    params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads)

    def step(state, grad):
        updates, state = tx.update(grad, state, params)
        return state, (updates, state)

    first = tx.init(params)
    _, outputs = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(first, grads)
    return first, *jax.tree.map(np.asarray, outputs)


def projections(state, cycles):
    """A of the only leaf, a matrix, by cycle, in float64."""
    draw = jax.jit(lambda cycle: dataclasses.replace(state.sketch, cycle=cycle).draw())
    drawn = [tuple(draw(cycle).values()) for cycle in range(cycles)]
    return [np.asarray(a, np.float64) for (a,) in drawn]


@pytest.mark.parametrize(
    ("projection", "side", "mean"),
    [
        ("gaussian", "smaller", True),
        pytest.param("cosine", "larger", False, marks=pytest.mark.slow),
        pytest.param("gaussian", "larger", False, marks=pytest.mark.slow),
        pytest.param("cosine", "larger", True, marks=pytest.mark.slow),
        pytest.param("cosine", "smaller", False, marks=pytest.mark.slow),
        pytest.param("gaussian", "smaller", False, marks=pytest.mark.slow),
        pytest.param("gaussian", "larger", True, marks=pytest.mark.slow),
        pytest.param("cosine", "smaller", True, marks=pytest.mark.slow),
    ],
)
def test_states_and_updates_are_those_of_the_float64_reference(projection, side, mean):
    tx = florax.flora_accumulate(
        optax.identity(),
        every_k_schedule=8,
        rank=4,
        use_grad_mean=mean,
        projection=projection,
        side=side,
        dimension_numbers=reference.dimension_numbers,
    )
    grads = {
        name: normal(seed, 50, *leaf[0])
        for seed, (name, leaf) in enumerate(reference.LEAVES.items())
    }
    first, updates, states = run(tx, grads)
    for name, drawn in reference.projections(first, 7).items():
        given = np.stack([reference.matrices(name, side, g) for g in grads[name]])
        emitted = np.stack([reference.matrices(name, side, u) for u in updates[name]])
        kept = states.sketch.arrays[name].reshape(*given.shape[:-1], 4)
        for i in range(given.shape[1]):
            expected = reference.accumulate(given[:, i], drawn[:, i], 8, mean=mean)
            for t, (update, sketch) in enumerate(expected):
                assert reference.relative_error(emitted[t, i], update) < 1e-5
                assert reference.relative_error(kept[t, i], sketch) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("projection", ["gaussian", "cosine"])
def test_a_bfloat16_accumulator_is_within_the_derived_error_of_the_reference(projection):
    rank, every, n, m = 4, 8, 20, 12
    tx = florax.flora_accumulate(
        optax.identity(), every, rank, projection=projection, accumulator_dtype=jnp.bfloat16
    )
    grads = normal(0, 24, n, m, dtype=jnp.bfloat16)
    first, updates, states = run(tx, grads)
    assert states.sketch.arrays.dtype == updates.dtype == jnp.bfloat16
    drawn, exact = projections(first, 3), [np.asarray(g, np.float64) for g in grads]
    norm = functools.partial(np.linalg.norm, axis=1)  # of every row
    nearest, stochastic = 2.0**-9, 2.0**-7
    error = np.zeros(n)
    for t, (update, sketch) in enumerate(reference.accumulate(exact, drawn, every)):
        a, k = drawn[t // every], t % every + 1
        if k == 1:
            error, total = np.zeros(n), np.zeros((n, rank))
        total = total + exact[t] @ a.T
        # A is rounded to compress; the mean is rounded stochastically to 8 bits, at the end too.
        error = error * (k - 1) / k + nearest * norm(exact[t]) * np.linalg.norm(a) / k
        error += stochastic * (norm(total / k) + error)
        if k < every:
            assert np.all(norm(np.float64(states.sketch.arrays[t]) - sketch) < error * 1.01)
            assert not updates[t].any()
        else:
            emitted = error * np.linalg.norm(a, 2)
            emitted += nearest * (norm(update) + emitted)
            assert np.all(norm(np.float64(updates[t]) - update) < emitted * 1.01)


def test_one_cycle_emits_rank_r_and_two_cycles_more():
    tx = florax.flora_accumulate(optax.identity(), every_k_schedule=4, rank=3)
    _, updates, _ = run(tx, normal(0, 8, 20, 12))
    first, second = updates[3], updates[7]
    assert np.linalg.matrix_rank(first) == np.linalg.matrix_rank(second) == 3
    assert np.linalg.matrix_rank(first + second) == 6


BASES = {
    "adafactor": lambda: optax.adafactor(1e-2),
    "adamw": lambda: optax.adamw(1e-2),
    "sgd on a schedule": lambda: optax.sgd(optax.linear_schedule(1.0, 0.1, 5), momentum=0.9),
}
SCHEDULES = {"constant": 3, "growing": lambda step: jnp.where(step < 2, 2, 4)}


def large(updates, gradient_step, params):
    return optax.skip_large_updates(updates, gradient_step, params, max_squared_norm=50.0)


# By day each schedule and what is skipped.
MULTISTEPS_BY_DAY = {("adamw", "constant"), ("sgd on a schedule", "growing")}


@pytest.mark.parametrize("skip", [pytest.param(None, marks=pytest.mark.slow), large])
@pytest.mark.parametrize(
    "base, every",
    [
        pytest.param(*case, marks=() if case in MULTISTEPS_BY_DAY else pytest.mark.slow)
        for case in itertools.product(BASES, SCHEDULES)
    ],
)
def test_dense_leaves_are_bit_equal_to_multisteps(base, every, skip, optimized):
    settings = dict(every_k_schedule=SCHEDULES[every], should_skip_update_fn=skip)
    ours = florax.flora_accumulate(BASES[base](), rank=20, **settings)
    theirs = optax.MultiSteps(BASES[base](), **settings)
    params = {"bias": normal(0, 7), "kernel": normal(1, 6, 5)}
    p = q = params
    s, t = ours.init(p), theirs.init(q)
    our_update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
    updated = []
    for step in range(14):
        before = int(s.gradient_step)
        scale = 10.0 if step in (3, 8) else 1.0  # skipped, where anything is
        grads = jax.tree.map(lambda x: scale * normal(step + 2, *x.shape), params)  # noqa: B023
        u, s = our_update(grads, s, p)
        v, t = their_update(grads, t, q)
        p, q = optax.apply_updates(p, u), optax.apply_updates(q, v)
        chex.assert_trees_all_equal(p, q)
        chex.assert_trees_all_equal(s.inner_opt_state, t.inner_opt_state)
        assert (s.mini_step, s.gradient_step) == (t.mini_step, t.gradient_step)
        # Optax's says of a skipped micro-step what it says of the one before.
        assert florax.has_updated(s) == (s.gradient_step > before)
        chex.assert_trees_all_equal(s.skip_state, t.skip_state)
        updated.append(bool(florax.has_updated(s)))
    assert 2 <= sum(updated) < 14


@pytest.mark.parametrize("use_grad_mean", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "accumulator_dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)]
)
def test_dense_leaves_are_bit_equal_in_every_dtype(
    use_grad_mean, dtype, accumulator_dtype, optimized
):
    settings = dict(
        every_k_schedule=3, use_grad_mean=use_grad_mean, accumulator_dtype=accumulator_dtype
    )
    ours = florax.flora_accumulate(optax.sgd(0.1), rank=9, **settings)
    theirs = optax.MultiSteps(optax.sgd(0.1), **settings)
    params = normal(0, 9, dtype=dtype)
    s, t = ours.init(params), theirs.init(params)
    for grad in normal(1, 6, 9, dtype=dtype):
        u, s = ours.update(grad, s, params)
        v, t = theirs.update(grad, t, params)
        chex.assert_trees_all_equal((u, s.sketch.arrays), (v, t.acc_grads))
        chex.assert_trees_all_equal_dtypes((u, s.sketch.arrays), (v, t.acc_grads))


def test_the_default_accumulator_is_that_of_multisteps():
    for dtype in (jnp.bfloat16, jnp.float32):
        params = normal(0, 9, dtype=dtype)
        ours = florax.flora_accumulate(optax.sgd(0.1), 2, rank=3).init(params)
        chex.assert_trees_all_equal_dtypes(
            ours.sketch.arrays, optax.MultiSteps(optax.sgd(0.1), 2).init(params).acc_grads
        )


def counting(optimizer, calls):
    """The same optimizer; every *execution* of its update adds one to `calls`."""

    def update(updates, state, params=None):
        jax.debug.callback(lambda: calls.update(["executed"]))
        return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def test_the_base_optimizer_is_executed_and_moves_once_a_cycle_only():
    calls = collections.Counter()
    tx = florax.flora_accumulate(counting(optax.adam(0.1), calls), every_k_schedule=4, rank=3)
    params = normal(0, 20, 12)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(1, 13):
        before = state.inner_opt_state
        updates, state = update(normal(step, 20, 12), state, params)
        jax.effects_barrier()
        assert calls["executed"] == step // 4
        if step % 4:
            chex.assert_trees_all_equal(state.inner_opt_state, before)
            assert not updates.any()
        else:
            assert updates.all() and florax.has_updated(state)


def test_the_base_optimizers_computation_stands_in_a_branch_of_a_conditional():
    """From the jaxpr: `tan`, which only this base optimizer uses, is nowhere but under a `cond`."""
    tx = florax.flora_accumulate(optax.stateless(lambda u, _: jnp.tan(u)), 4, rank=3)
    params = normal(0, 20, 12)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    found = []

    def walk(jaxpr, under_cond):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "tan":
                found.append(under_cond)
            for sub in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    walk(inner, under_cond or eqn.primitive.name == "cond")

    walk(jaxpr, False)
    assert found == [True]


@pytest.mark.parametrize("use_grad_mean", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "base", [pytest.param(b, marks=() if b == "adamw" else pytest.mark.slow) for b in BASES]
)
def test_accumulate_and_finish_in_one_jit_are_updates_called_every_k_times(base, use_grad_mean):
    every = 4
    tx = florax.flora_accumulate(BASES[base](), every, rank=3, use_grad_mean=use_grad_mean)
    params = {"bias": normal(0, 7), "kernel": normal(1, 20, 12)}
    batches = {"bias": normal(2, 2, every, 7), "kernel": normal(3, 2, every, 20, 12)}

    @jax.jit
    def whole_step(params, state, grads):
        state, _ = jax.lax.scan(lambda s, g: (florax.accumulate(tx, g, s), None), state, grads)
        return florax.finish(tx, params, state)

    update = jax.jit(tx.update)
    p = q = params
    s = t = tx.init(params)
    for cycle in range(2):
        grads = jax.tree.map(lambda x: x[cycle], batches)  # noqa: B023
        p, s = whole_step(p, s, grads)
        for k in range(every):
            u, t = update(jax.tree.map(lambda x: x[k], grads), t, q)  # noqa: B023
            q = optax.apply_updates(q, u)
        # The same operations, compiled in another order: 12 + 3 float32 products a cycle, of sizes
        # up to 20, are off by up to 2 · 15 · 2⁻²⁴ · 20.
        chex.assert_trees_all_close((p, s), (q, t), rtol=0, atol=4e-5)
        chex.assert_trees_all_equal(s.gradient_step, jnp.int32(cycle + 1))


@pytest.mark.slow
def test_accumulate_leaves_out_what_the_skip_function_rejects(optimized):
    tx = florax.flora_accumulate(
        optax.sgd(1.0), 4, rank=3, should_skip_update_fn=optax.skip_not_finite
    )
    params = jnp.zeros((20, 12))
    grads = normal(0, 3, 20, 12)
    poisoned = jnp.stack([grads[0], grads[1].at[0, 0].set(jnp.nan), grads[2]])
    add = lambda s, g: (florax.accumulate(tx, g, s), None)  # noqa: E731
    got, _ = jax.lax.scan(add, tx.init(params), poisoned)
    expected, _ = jax.lax.scan(add, tx.init(params), grads[jnp.array([0, 2])])
    assert got.mini_step == 2
    assert_array_equal(got.sketch.arrays, expected.sketch.arrays)
    new_params, _ = florax.finish(tx, params, got)
    assert jnp.isfinite(new_params).all() and new_params.any()


def test_extra_arguments_reach_the_base_optimizer():
    def update(updates, state, params=None, *, value, **_):
        return jax.tree.map(lambda u: u * value, updates), state

    base = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = florax.flora_accumulate(base, every_k_schedule=1, rank=20)
    grad = normal(0, 7)
    updates, _ = tx.update(grad, tx.init(grad), grad, value=jnp.float32(3))
    assert_allclose(updates, 3 * grad)
    params, _ = florax.finish(
        tx, grad, florax.accumulate(tx, grad, tx.init(grad)), value=jnp.float32(3)
    )
    assert_allclose(params, 4 * grad, rtol=1e-6)


def test_momentum_inside_accumulation_averages_once_a_cycle():
    """`flora_accumulate(chain(base, flora_momentum))`: κ counts updates, not micro-steps."""
    tx = florax.flora_accumulate(
        optax.chain(optax.sgd(1.0), florax.flora_momentum(3, 0.9, resample_every=2)), 4, rank=3
    )
    _, updates, states = run(tx, normal(0, 16, 20, 12))
    assert_array_equal(states.inner_opt_state[1].count, np.repeat([0, 1, 2, 3, 4], [3, 4, 4, 4, 1]))
    assert [bool(u.any()) for u in updates] == [False, False, False, True] * 4
