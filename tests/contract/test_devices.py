"""On eight devices they do what they do on one, however the work is divided."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import florax

# The same sums of at most 12 float32 products of size 1, divided among devices.
CLOSE = dict(rtol=1e-5, atol=2e-6)

# What the leaves are divided along; the matrices of the stack are projected on their first side.
DIVISION = {"bias": P("data"), "layers": P(None, "data", "model")}
EVERY_AXIS = P(("data", "model"))


@pytest.fixture(scope="module")
def params(params):
    """Fewer leaves compile faster: a dense one and a stack of matrices."""
    return {name: params[name] for name in ("bias", "layers")}


def make_mesh(axis_type):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)


def place(tree, mesh, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def scaled(grads):
    """Eight trees of gradients whose mean is `grads`."""
    weights = jnp.arange(8) / 3.5
    return jax.tree.map(lambda g: weights.reshape(8, *[1] * g.ndim) * g, grads)


def test_data_parallel_replicas_stay_equal(tx, run, params, gradients):
    """Each device has its own gradients; their mean updates a state that all devices share."""

    @jax.jit
    @jax.shard_map(mesh=make_mesh(AxisType.Auto), in_specs=(EVERY_AXIS, P(), P()), out_specs=P())
    def step(grads, state, params):
        grads = jax.tree.map(lambda g: jax.lax.pmean(g[0], ("data", "model")), grads)
        return tx.update(grads, state, params)

    state = tx.init(params)
    for grads, expected in zip(gradients, run.updates, strict=True):
        updates, state = step(scaled(grads), state, params)
        chex.assert_trees_all_close(updates, {n: expected[n] for n in params}, **CLOSE)


def test_devices_can_accumulate_on_their_own_and_share_only_sketches(params, gradients):
    """The mean of the devices' sketches is the sketch of the mean: full gradients never travel."""
    stacked = {"bias": None, "layers": florax.FloraDimensionNumbers(rows=1, columns=2, batch=0)}
    tx = florax.flora_accumulate(
        optax.sgd(1.0), every_k_schedule=2, rank=3, dimension_numbers=stacked
    )

    @jax.jit
    @jax.shard_map(mesh=make_mesh(AxisType.Auto), in_specs=(EVERY_AXIS, P(), P()), out_specs=P())
    def step(gradients, state, params):
        for grads in gradients:
            state = florax.accumulate(jax.tree.map(lambda g: g[0], grads), state)
        state = state._replace(sketch=jax.lax.pmean(state.sketch, ("data", "model")))
        return florax.finish(tx, params, state)

    @jax.jit
    def step_on_one_device(gradients, state, params):
        for grads in gradients:
            state = florax.accumulate(grads, state)
        return florax.finish(tx, params, state)

    new_params, state = step([scaled(g) for g in gradients[:2]], tx.init(params), params)
    expected, expected_state = step_on_one_device(gradients[:2], tx.init(params), params)
    chex.assert_trees_all_close(new_params, expected, **CLOSE)
    chex.assert_trees_all_close(state, expected_state, **CLOSE)


def test_divided_parameters_are_updated_as_whole_ones_are(tx, run, params, gradients):
    mesh = make_mesh(AxisType.Auto)
    with jax.set_mesh(mesh):
        params, *gradients = (place(tree, mesh, DIVISION) for tree in (params, *gradients))
        update = jax.jit(tx.update)
        state = jax.jit(tx.init)(params)
        for grads, expected in zip(gradients, run.updates, strict=True):
            updates, state = update(grads, state, params)
            chex.assert_trees_all_close(updates, {n: expected[n] for n in params}, **CLOSE)
