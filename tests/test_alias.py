"""`flora` is the chain that its docstring names, and `optax.adafactor` on what is kept dense."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import florax

PARAMS = {"bias": jnp.arange(8.0), "kernel": jnp.sin(jnp.arange(96.0)).reshape(12, 8)}
GRADS = [jax.tree.map(lambda p, t=t: jnp.cos(3 * p + t), PARAMS) for t in range(5)]


def program(tx, dtype=jnp.float32):
    """What `tx` computes, as text: the same text, the same bits."""
    params = optax.tree.cast(PARAMS, dtype)
    init = jax.make_jaxpr(tx.init)(params)
    update = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params), params)
    return str(init), str(update)


GAUSSIAN = dict(projection="gaussian")
MOMENTUM_ARGUMENTS = [
    {},
    dict(decay=0.5),
    dict(resample_every=7),
    dict(key=3),
    GAUSSIAN,
    dict(residual=False),
    dict(side="larger"),
    dict(nesterov=True),
    dict(dimension_numbers=lambda path, leaf: None),
    dict(accumulator_dtype=jnp.bfloat16),
]


@pytest.mark.parametrize("arguments", MOMENTUM_ARGUMENTS, ids=lambda a: ",".join(a) or "defaults")
def test_flora_is_adafactor_and_then_flora_momentum(arguments):
    chain = optax.chain(optax.adafactor(0.1), florax.flora_momentum(3, **arguments))
    assert program(florax.flora(0.1, 3, **arguments)) == program(chain)


@pytest.mark.parametrize("arguments", MOMENTUM_ARGUMENTS[1:-2], ids=",".join)
def test_every_argument_of_flora_matters(arguments):
    assert program(florax.flora(0.1, 3, **arguments)) != program(florax.flora(0.1, 3))


@pytest.mark.parametrize(
    "arguments, same",
    [({}, dict(projection="cosine", residual=True)), (GAUSSIAN, dict(residual=False, **GAUSSIAN))],
    ids=["cosine", "gaussian"],
)
def test_the_residual_is_there_where_the_projection_allows_it(arguments, same):
    ours, theirs = (florax.flora_momentum(3, **own) for own in (arguments, same))
    assert program(ours) == program(theirs)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(multiply_by_parameter_scale=False),
        dict(weight_decay_rate=0.01),
        dict(weight_decay_rate=0.01, weight_decay_mask={"bias": False, "kernel": True}),
    ],
    ids=lambda a: ",".join(a) or "defaults",
)
def test_on_dense_leaves_flora_is_adafactor_with_momentum_bit_for_bit(arguments):
    learning_rate = optax.linear_schedule(0.1, 0.01, 4)
    ours = florax.flora(learning_rate, lambda path, leaf: None, decay=0.8, **arguments)
    theirs = optax.adafactor(learning_rate, momentum=0.8, **arguments)
    states = ours.init(PARAMS), theirs.init(PARAMS)

    @jax.jit
    def both(grads, states):
        (a, ours_state), (b, theirs_state) = (
            tx.update(grads, state, PARAMS)
            for tx, state in zip((ours, theirs), states, strict=True)
        )
        return (a, b), (ours_state, theirs_state)

    for grads in GRADS:
        (a, b), states = both(grads, states)
        chex.assert_trees_all_equal(a, b)
