"""A hundred thousand steps: nothing drifts, nothing repeats, and counts do not overflow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import florax

STEPS, BLOCK = 100_000, 1000  # a block is long against a cycle and a decay: blocks are independent
ROWS, COLUMNS, RANK, KAPPA, DECAY = 6, 8, 4, 20, 0.9  # the paper's bound is κ > 5.6
COSINE = {"projection": "cosine"}
GAUSSIAN = {"projection": "gaussian"}
KINDS = {
    "gaussian": GAUSSIAN,
    "cosine with residual": {},
    "int8": {"accumulator_dtype": jnp.int8},
    "int4": {"accumulator_dtype": jnp.int4},
    "bfloat16": {"accumulator_dtype": jnp.bfloat16, **GAUSSIAN},
}
KEPT = RANK / ROWS  # of a matrix, by a cosine projection of its smaller side


def cosine_share():
    """Of a dense average, what one with residual has on average.

    A new subspace has KEPT of the old one's momentum: e of the gradient at a cycle's end, where
    e = KEPT (βᵏ e + 1 − βᵏ). Outside of the subspace all of the gradient passes.
    """
    powers = DECAY ** np.arange(1, KAPPA + 1)
    end = KEPT * (1 - powers[-1]) / (1 - KEPT * powers[-1])
    return 1 - KEPT + KEPT * (powers * end + 1 - powers).mean()


def gradients(step):
    """Ones that turn, with a mean that stays."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(7), step % 97))
    return {
        "kernel": 1 + jax.random.normal(keys[0], (ROWS, COLUMNS)),
        "bias": 1 + jax.random.normal(keys[1], (COLUMNS,)),
    }


def block_means(tx, every=1):
    """The means over blocks of what `tx` emits, and the state at the end."""
    params = jax.eval_shape(gradients, 0)

    def step(state, number):
        updates, state = tx.update(gradients(number), state, params)
        return state, updates

    def block(state, number):
        state, updates = jax.lax.scan(step, state, number * BLOCK + jnp.arange(BLOCK))
        return state, jax.tree.map(lambda u: every * u.mean(0, dtype=jnp.float32), updates)

    @jax.jit
    def run():
        state = tx.init(jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params))
        return jax.lax.scan(block, state, jnp.arange(STEPS // BLOCK))

    state, means = run()
    return jax.tree.map(lambda x: np.asarray(x, np.float64), means), state


def agree(means, expected, share=1.0):
    """To five standard errors of the blocks' mean, after the first block, which begins at zero."""
    for name in expected:
        apart = means[name][1:] - (share if name == "kernel" else 1) * expected[name][1:]
        error = apart.std(0, ddof=1) / np.sqrt(len(apart))
        assert (abs(apart.mean(0)) < 5 * error + 1e-6).all()
        assert error.max() < 0.05  # of entries of one: else this says nothing


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_momentum_does_not_drift_from_a_dense_one(kind):
    tx = florax.flora_momentum(RANK, DECAY, KAPPA, key=3, **KINDS[kind])
    means, state = block_means(tx)
    expected, _ = block_means(optax.ema(DECAY, debias=False))
    if kind == "bfloat16":  # in which Optax's own averages stall: those of leaves kept dense
        del expected["bias"]
    agree(means, expected, 1.0 if "projection" in KINDS[kind] else cosine_share())
    assert int(state.count) == STEPS
    assert int(state.sketch.cycle) == STEPS // KAPPA


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, share",
    [
        ({}, 1),
        (COSINE, RANK / COLUMNS),  # a shrunken mean
        ({"accumulator_dtype": jnp.int8, **COSINE}, RANK / COLUMNS),
        ({"accumulator_dtype": jnp.int4}, 1),
    ],
    ids=["gaussian", "cosine", "cosine, int8", "gaussian, int4"],
)
def test_an_accumulation_does_not_drift_from_a_dense_one(kind, share):
    every = 4
    tx = florax.flora_accumulate(optax.identity(), every, RANK, key=3, side="larger", **kind)
    means, state = block_means(tx, every)
    dense = optax.MultiSteps(optax.identity(), every).gradient_transformation()
    expected, _ = block_means(dense, every)
    agree(means, expected, share)
    assert int(state.gradient_step) == STEPS // every


def test_keys_of_cycles_do_not_repeat():
    tx = florax.flora_momentum(RANK, key=3, projection="gaussian")
    state = tx.init({"kernel": jnp.ones((ROWS, COLUMNS))})

    def first_entries(cycle):
        a = dataclasses.replace(state.sketch, cycle=cycle).draw()["['kernel']"]
        return a.ravel()[:3]

    cycles = jnp.arange(STEPS, dtype=jnp.int32)
    entries = np.asarray(jax.jit(lambda c: jax.lax.map(first_entries, c, batch_size=1000))(cycles))
    assert len(np.unique(entries.view(np.uint32), axis=0)) == STEPS


LAST = np.iinfo(np.int32).max


@pytest.mark.slow
@pytest.mark.parametrize("projection", ["gaussian", "cosine"])
def test_counts_stay_at_the_last_number(projection):
    params = {"kernel": jnp.ones((ROWS, COLUMNS))}
    momentum = florax.flora_momentum(RANK, resample_every=2, projection=projection)
    accumulate = florax.flora_accumulate(optax.identity(), 2, RANK, projection=projection)
    state = momentum.init(params)
    state = state._replace(
        count=jnp.int32(LAST - 1), sketch=dataclasses.replace(state.sketch, cycle=jnp.int32(LAST))
    )
    update = jax.jit(momentum.update)
    for _ in range(5):
        updates, state = update(params, state, params)
        assert np.isfinite(updates["kernel"]).all()
        assert LAST - 1 <= int(state.count) <= LAST and int(state.sketch.cycle) == LAST
    state = accumulate.init(params)
    state = state._replace(sketch=dataclasses.replace(state.sketch, cycle=jnp.int32(LAST - 1)))
    update = jax.jit(accumulate.update)
    for _ in range(8):
        updates, state = update(params, state, params)
        assert np.isfinite(updates["kernel"]).all()
        assert LAST - 1 <= int(state.gradient_step) <= LAST
