"""Optax's contract for `init` and `update`: stable types, at home in JAX's transformations."""

import copy

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import florax

# The same sums of at most 12 float32 products of size 1, twice, in another order or fused.
CLOSE = dict(rtol=1e-5, atol=2e-6)

DTYPES = [
    jnp.bfloat16,
    jnp.float64,
    *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (jnp.float16, jnp.float32)),
]


@pytest.fixture(params=DTYPES, ids=lambda dtype: dtype.__name__)
def shapes(request, params):
    """Shapes of the parameters in a dtype that may need 64 bits."""
    with jax.enable_x64(request.param == jnp.float64):
        yield jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, request.param), params)


def types(tree):
    """Structure, shapes, dtypes and weak types: what decides whether JAX compiles again."""
    return jax.tree.map(jax.typeof, tree)


def test_a_second_call_compiles_nothing(run):
    assert run.traces == 1


def test_unknown_extra_arguments_are_accepted(tx, params):
    def update(state):
        return tx.update(params, state, params, value=1.0, unknown="anything")

    updates, _ = jax.eval_shape(update, jax.eval_shape(tx.init, params))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_init_needs_no_more_than_shapes(tx, shapes):
    state = jax.eval_shape(tx.init, shapes)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(zeros))


def test_init_is_the_same_under_jit(tx, params):
    chex.assert_trees_all_equal(jax.jit(tx.init)(params), tx.init(params))


def test_an_update_does_not_change_the_type_of_the_state(tx, shapes):
    def step(params):
        state = tx.init(params)
        assert types(tx.update(params, state, params)[1]) == types(state)

    jax.eval_shape(step, shapes)


def test_updates_have_the_dtype_of_the_parameters(tx, shapes):
    updates, _ = jax.eval_shape(tx.update, shapes, jax.eval_shape(tx.init, shapes), shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, shapes)


def test_an_update_may_be_one_branch_of_a_cond(tx, shapes):
    def step(pred, grads, state, params):
        return jax.lax.cond(pred, lambda: tx.update(grads, state, params), lambda: (params, state))

    state = jax.eval_shape(tx.init, shapes)
    jax.eval_shape(step, jax.ShapeDtypeStruct((), bool), shapes, state, shapes)


def test_16_bit_parameters_are_updated_as_32_bit_ones_are(tx, run, params, gradients):
    params, *gradients = (
        {"layers": tree["layers"].astype(jnp.bfloat16)} for tree in (params, *gradients)
    )
    update = jax.jit(tx.update)
    state = tx.init(params)
    for grads, expected in zip(gradients, run.updates, strict=True):
        updates, state = update(grads, state, params)
        error = jnp.linalg.norm(updates["layers"].astype(jnp.float32) - expected["layers"])
        # Some ten roundings to 16 bits, each off by up to eps, of states and gradients.
        assert error < 10 * jnp.finfo(jnp.bfloat16).eps * (1 + jnp.linalg.norm(expected["layers"]))


@pytest.mark.slow
def test_without_jit_it_does_the_same(tx, run, params, gradients):
    updates, state = tx.update(gradients[0], tx.init(params), params)
    chex.assert_trees_all_close((updates, state), (run.updates[0], run.states[0]), **CLOSE)


def test_it_can_be_scanned(tx, run, params, gradients):
    @jax.jit
    def scan(gradients, state):
        def step(state, grads):
            updates, state = tx.update(grads, state, params)
            return state, updates

        return jax.lax.scan(step, state, gradients)

    state, updates = scan(jax.tree.map(lambda *g: jnp.stack(g), *gradients), tx.init(params))
    chex.assert_trees_all_close(state, run.states[-1], **CLOSE)
    chex.assert_trees_all_close(
        updates, jax.tree.map(lambda *u: jnp.stack(u), *run.updates), **CLOSE
    )


def test_replicas_under_vmap_are_as_if_alone(tx, run, params, gradients):
    """Two replicas, one of which is a call ahead, and so in another cycle."""
    step = jax.jit(jax.vmap(tx.update, in_axes=(0, 0, None)))
    grads, states = (
        jax.tree.map(lambda a, b: jnp.stack([a, b]), *pair)
        for pair in ((gradients[1], gradients[2]), (run.states[0], run.states[1]))
    )
    updates, states = step(grads, states, params)
    for i, call in enumerate((1, 2)):
        alone = (run.updates[call], run.states[call])
        together = jax.tree.map(lambda x, i=i: x[i], (updates, states))
        chex.assert_trees_all_close(together, alone, **CLOSE)


def test_parameters_and_state_can_be_donated(tx, run, params, gradients):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    given = (jax.tree.map(jnp.copy, params), tx.init(params))
    new_params, state = step(*given, gradients[0])
    expected = (optax.apply_updates(params, run.updates[0]), run.states[0])
    chex.assert_trees_all_close((new_params, state), expected, **CLOSE)
    # Adafactor keeps stand-ins of size 1 that never change; XLA returns those as they are. And no
    # step reads whether the one before has updated.
    donated = [x for x in jax.tree.leaves(given) if x.shape[-1:] != (1,) and x.dtype != jnp.bool_]
    assert all(x.is_deleted() for x in donated)


@pytest.mark.parametrize(
    "key",
    [
        jax.random.key(3, impl="threefry2x32"),
        jax.random.PRNGKey(3, impl="threefry2x32"),
        jax.random.key(3, impl="rbg"),
    ],
    ids=["typed", "raw", "rbg"],
)
def test_donating_a_state_leaves_the_users_key_alone(key):
    tx = florax.flora_momentum(rank=2, key=key)
    params = jnp.ones(3)
    jax.jit(tx.update, donate_argnums=1)(params, tx.init(params))
    assert not key.is_deleted()
    assert not any(x.is_deleted() for x in jax.tree.leaves(tx.init(params)))


def test_it_is_a_pair_of_functions_that_can_be_copied_and_mapped(tx, params):
    expected = jax.eval_shape(tx.init, params)
    for again in (copy.copy(tx), copy.deepcopy(tx), jax.tree.map(lambda f: f, tx)):
        assert isinstance(again, type(tx))
        chex.assert_trees_all_equal(jax.eval_shape(again.init, params), expected)


def test_it_works_where_rank_promotion_is_an_error(tx, params):
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
