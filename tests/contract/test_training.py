"""They train: to the minimum where it is known, and behind or around every base optimizer."""

import chex
import draws
import jax
import jax.numpy as jnp
import optax
import pytest

import florax

STEPS = 20_000
MINIMUM = {
    "matrix": 2 * draws.normal(0, 12, 8),
    "parabola": jnp.array([1.0, -1.0, 1.0]),
    "rosenbrock": jnp.array([1.0, 1.0]),
}
START = {
    "matrix": jnp.zeros((12, 8)),
    "parabola": jnp.array([-1.0, 10.0, 1.0]),
    "rosenbrock": jnp.zeros(2),
}


def optax_targets(params):
    """The targets of Optax's own common tests, with a matrix large enough to be compressed."""
    x, y = params["rosenbrock"]
    parabolas = sum(jnp.sum((params[name] - MINIMUM[name]) ** 2) for name in ("matrix", "parabola"))
    return parabolas + (1 - x) ** 2 + 100 * (y - x**2) ** 2


def train(tx, loss, params, steps):
    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, state), length=steps)
        return params

    return run(params, tx.init(params))


def decaying(learning_rate, updates=STEPS):
    return optax.cosine_decay_schedule(learning_rate, updates)


MOMENTUM = dict(rank=3, resample_every=10)
ACCUMULATE = dict(rank=3, every_k_schedule=2)
CONVERGING = {
    "momentum_gaussian": optax.chain(
        optax.sgd(1e-3), florax.flora_momentum(**MOMENTUM, projection="gaussian")
    ),
    "momentum_nesterov": optax.chain(
        optax.sgd(1e-3), florax.flora_momentum(**MOMENTUM, nesterov=True)
    ),
    "accumulate_sgd": florax.flora_accumulate(optax.sgd(1.5e-3), **ACCUMULATE),
    "accumulate_adam_cosine": florax.flora_accumulate(
        optax.adam(decaying(1e-2, STEPS // 2)), **ACCUMULATE, projection="cosine"
    ),
    "accumulate_adafactor": florax.flora_accumulate(
        optax.adafactor(decaying(0.1, STEPS // 2)), **ACCUMULATE
    ),
    "accumulate_adafactor_momentum": florax.flora_accumulate(
        optax.chain(optax.adafactor(decaying(0.1, STEPS // 2)), florax.flora_momentum(**MOMENTUM)),
        **ACCUMULATE,
    ),
    "flora": florax.flora(decaying(0.1), **MOMENTUM),
}


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(tx, id=name, marks=() if name == "flora" else pytest.mark.slow)
        for name, tx in CONVERGING.items()
    ],
)
def test_it_converges_to_the_minimum(tx):
    params = train(tx, optax_targets, START, STEPS)
    chex.assert_trees_all_close(params, MINIMUM, rtol=3e-2, atol=3e-2)  # Optax's own tolerance


FEW_STEPS = 600
BASES = {
    "adafactor": optax.adafactor(decaying(0.1, FEW_STEPS)),
    "adafactor_factored": optax.adafactor(decaying(0.1, FEW_STEPS), min_dim_size_to_factor=4),
    "adam": optax.adam(decaying(0.05, FEW_STEPS)),
    "adamw": optax.adamw(decaying(0.05, FEW_STEPS)),
    "lion": optax.lion(decaying(0.02, FEW_STEPS)),
    "sgd": optax.sgd(decaying(0.05, FEW_STEPS)),
    "sm3": optax.sm3(0.5),
}
WRAPPINGS = {
    "accumulate": lambda base: florax.flora_accumulate(base, **ACCUMULATE),
    "momentum": lambda base: optax.chain(base, florax.flora_momentum(rank=6, resample_every=10)),
}


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_every_base_optimizer_fits_a_regression(base, wrap):
    x = draws.normal(1, 64, 12)
    y = x @ MINIMUM["matrix"] + 1

    def loss(params):
        return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)

    # None of the 96 weights is known at the start, so a fifth of the loss is far from chance.
    start = {"bias": jnp.zeros(8), "kernel": jnp.zeros((12, 8))}
    params = train(wrap(base), loss, start, FEW_STEPS)
    assert loss(params) < loss(start) / 5


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "base",
    [
        pytest.param(base, id=name, marks=() if name == "sgd" else pytest.mark.slow)
        for name, base in BASES.items()
    ],
)
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_no_base_optimizer_changes_the_type_of_the_state(base, wrap, dtype):
    """A change would be an error in a cond or a scan."""
    tx = wrap(base)
    params = {"bias": jnp.zeros(8, dtype), "kernel": jnp.zeros((12, 8), dtype)}
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
