"""Tiny and huge gradients, none, and such as are not finite: no number is made up, none is lost."""

import chex
import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import florax

RANK = 6
COSINE = {"projection": "cosine"}
EIGHT = {"accumulator_dtype": jnp.int8}
MOMENTA = {
    "gaussian": {"projection": "gaussian"},
    "cosine": {},
    "int8": EIGHT,
    "int4": {"projection": "gaussian", "accumulator_dtype": jnp.int4},
}
ACCUMULATORS = {
    "gaussian": {},
    "both": {"side": "both", **COSINE},
    "both, int8": {"side": "both", **COSINE, **EIGHT},
    "int4": {"accumulator_dtype": jnp.int4, **COSINE},
}
TRANSFORMATIONS = {
    **{
        f"momentum, {name}": florax.flora_momentum(RANK, 0.5, 2, key=1, **kind)
        for name, kind in MOMENTA.items()
    },
    **{
        f"accumulate, {name}": florax.flora_accumulate(optax.identity(), 2, RANK, key=1, **kind)
        for name, kind in ACCUMULATORS.items()
    },
}
BY_DAY = ("momentum, int8", "accumulate, gaussian")
each = pytest.mark.parametrize(
    "tx",
    [
        pytest.param(tx, id=name, marks=() if name in BY_DAY else pytest.mark.slow)
        for name, tx in TRANSFORMATIONS.items()
    ],
)


def gradients(dtype=jnp.float32):
    like = {"kernel": jnp.zeros((20, 12), dtype), "bias": jnp.zeros(12, dtype)}
    return [draws.normal_like(seed, like) for seed in range(6)]


def run(tx, gradients):
    """All updates, and the last state."""
    update, state, emitted = jax.jit(tx.update), tx.init(gradients[0]), []
    for grads in gradients:
        updates, state = update(grads, state, grads)
        emitted.append(updates)
    return emitted, state


@pytest.mark.slow
@each
@pytest.mark.parametrize("exponent", [-100, 100])
def test_a_power_of_two_before_is_one_behind(tx, exponent):
    """1e-30 and 1e30: all is linear, rounding in few bits too, and squares do not overflow."""
    plain, _ = run(tx, gradients())
    scaled, _ = run(tx, jax.tree.map(lambda g: jnp.ldexp(g, exponent), gradients()))
    # What is below 2⁻¹²⁶ becomes zero in each of some 240 products; all else is exact.
    slack = 240 * 2.0**-126 if exponent < 0 else 0
    for one, other in zip(plain, scaled, strict=True):
        expected = jax.tree.map(lambda u: jnp.ldexp(u, exponent), one)
        chex.assert_trees_all_close(other, expected, rtol=0, atol=slack)


@each
def test_of_nothing_comes_nothing(tx):
    emitted, state = run(tx, jax.tree.map(jnp.zeros_like, gradients()))
    assert not any(u.any() for u in jax.tree.leaves(emitted))
    chex.assert_tree_all_finite(state)


@pytest.mark.slow
@each
def test_the_largest_numbers_of_16_bits_make_no_nan(tx):
    """They may overflow, where plain sums of them do."""
    largest = jax.tree.map(
        lambda g: jnp.sign(g) * jnp.finfo(jnp.float16).max, gradients(jnp.float16)
    )
    emitted, _ = run(tx, largest)
    assert not any(jnp.isnan(u).any() for u in jax.tree.leaves(emitted))


@pytest.mark.slow
@each
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_behind_a_guard_it_is_as_if_it_had_not_happened(tx, bad):
    """`optax.apply_if_finite` around the transformation."""
    grads = gradients()
    poisoned = grads[1] | {"kernel": grads[1]["kernel"].at[3, 4].set(bad)}
    guarded = optax.apply_if_finite(tx, 5)
    clean, clean_state = run(guarded, [grads[0], *grads[2:]])
    emitted, state = run(guarded, [grads[0], poisoned, *grads[2:]])
    assert not any(u.any() for u in jax.tree.leaves(emitted[1]))
    chex.assert_trees_all_equal(emitted[:1] + emitted[2:], clean)
    chex.assert_trees_all_equal(state.inner_state, clean_state.inner_state)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=n, marks=() if f"accumulate, {n}" in BY_DAY else pytest.mark.slow)
        for n, kind in ACCUMULATORS.items()
    ],
)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_skipped_micro_step_is_as_if_it_had_not_happened(kind, bad):
    grads = gradients()
    poisoned = grads[1] | {"kernel": grads[1]["kernel"].at[3, 4].set(bad)}
    tx = florax.flora_accumulate(
        optax.identity(), 2, RANK, key=1, should_skip_update_fn=optax.skip_not_finite, **kind
    )
    clean, clean_state = run(tx, [grads[0], *grads[2:]])
    emitted, state = run(tx, [grads[0], poisoned, *grads[2:]])
    assert not any(u.any() for u in jax.tree.leaves(emitted[1]))
    chex.assert_trees_all_equal(emitted[:1] + emitted[2:], clean)
    chex.assert_trees_all_equal(state._replace(skip_state=()), clean_state._replace(skip_state=()))


@each
def test_without_a_guard_what_is_not_finite_is_seen_as_in_optax(tx):
    """It reaches the updates, and is not taken for a number; other leaves do not know of it."""
    grads = gradients()
    poisoned = grads[1] | {"kernel": grads[1]["kernel"].at[3, 4].set(jnp.nan)}
    emitted, _ = run(tx, [grads[0], poisoned])
    assert jnp.isnan(emitted[1]["kernel"]).any()
    chex.assert_tree_all_finite(emitted[1]["bias"])
    assert np.isfinite(emitted[0]["kernel"]).all()
