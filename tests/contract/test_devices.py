"""On eight devices they do what they do on one, however the work is divided."""

import contextlib
import dataclasses

import chex
import draws
import jax
import jax.numpy as jnp
import meshes
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import florax

# The same sums of at most 12 float32 products of size 1, divided among devices.
CLOSE = dict(rtol=1e-5, atol=2e-6)

# What the leaves are divided along; the matrices of the stack are projected on their first side.
DIVISIONS = {
    "rows_and_columns": {"bias": P("data"), "layers": P(None, "data", "model")},
    "stack": {"bias": P(), "layers": P("data", None, None)},
}
EVERY_AXIS = P(("data", "model"))


@pytest.fixture(scope="module")
def params(params):
    """Fewer leaves compile faster: a dense one and a stack of matrices."""
    return {name: params[name] for name in ("bias", "layers")}


def make_mesh(axis_type):
    return meshes.make((2, 4), ("data", "model"), axis_type)


def place(tree, mesh, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def divisions(tree):
    """The part of JAX's types that says along which axes of the mesh each leaf is divided."""
    return jax.tree.map(lambda x: str(jax.typeof(x)), tree)  # as in float32[12@model,8]


def scaled(grads):
    """Eight trees of gradients whose mean is `grads`."""
    weights = jnp.arange(8) / 3.5
    return jax.tree.map(lambda g: weights.reshape(8, *[1] * g.ndim) * g, grads)


@pytest.fixture(params=DIVISIONS.values(), ids=DIVISIONS.keys())
def specs(request):
    return request.param


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
            state = florax.accumulate(tx, jax.tree.map(lambda g: g[0], grads), state)
        shared = jax.lax.pmean(state.sketch.arrays, ("data", "model"))
        state = state._replace(sketch=dataclasses.replace(state.sketch, arrays=shared))
        return florax.finish(tx, params, state)

    @jax.jit
    def step_on_one_device(gradients, state, params):
        for grads in gradients:
            state = florax.accumulate(tx, grads, state)
        return florax.finish(tx, params, state)

    new_params, state = step([scaled(g) for g in gradients[:2]], tx.init(params), params)
    expected, expected_state = step_on_one_device(gradients[:2], tx.init(params), params)
    chex.assert_trees_all_close(new_params, expected, **CLOSE)
    chex.assert_trees_all_close(state, expected_state, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_divided_parameters_are_updated_as_whole_ones_are(tx, run, params, gradients, axis_type):
    mesh, specs = make_mesh(axis_type), DIVISIONS["rows_and_columns"]
    with jax.set_mesh(mesh):
        params, *gradients = (place(tree, mesh, specs) for tree in (params, *gradients))
        update = jax.jit(tx.update)
        state = jax.jit(tx.init)(params)
        for grads, expected in zip(gradients, run.updates, strict=True):
            updates, state = update(grads, state, params)
            chex.assert_trees_all_close(updates, {n: expected[n] for n in params}, **CLOSE)


@pytest.fixture
def divides(name, specs):
    """JAX's scans do not: divide the layers that they go over among devices."""
    if "per_layer" in name and specs is DIVISIONS["stack"]:
        return pytest.raises(ValueError, match="0th dimension of all xs should be replicated")
    return contextlib.nullcontext()


def test_on_explicit_meshes_updates_are_divided_like_their_parameters(tx, params, specs, divides):
    mesh = make_mesh(AxisType.Explicit)

    def step(params):
        updates, _ = tx.update(params, tx.init(params), params)
        assert divisions(updates) == divisions(params)

    with divides, jax.set_mesh(mesh):
        jax.eval_shape(step, place(params, mesh, specs))


def test_on_explicit_meshes_an_update_does_not_change_how_a_state_is_divided(
    tx, params, specs, divides
):
    mesh = make_mesh(AxisType.Explicit)

    def step(params):
        state = tx.init(params)
        _, new_state = tx.update(params, state, params)
        assert divisions(new_state) == divisions(state)

    with divides, jax.set_mesh(mesh):
        jax.eval_shape(step, place(params, mesh, specs))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("side", ["smaller", "larger", "both"])
def test_born_compressed_gradients_are_those_of_one_device(axis_type, side):
    """Batches divided along one axis of the mesh, weights along the other."""
    mesh = make_mesh(axis_type)

    def product(letters, x, w, *division):
        sharding = P(*division) if jax.typeof(x).sharding.mesh.explicit_axes else None
        return jnp.einsum(letters, x, w, out_sharding=sharding)

    def loss_fn(params, x):
        def layer(x, w):
            hidden = jnp.tanh(product("btd,df->btf", x, w["up"], "data", None, "model"))
            return x + product("btf,fd->btd", hidden, w["down"], "data", None, None), None

        x = product("btd,df->btf", x, params["embed"], "data", None, None)
        return jnp.mean(jax.lax.scan(jax.checkpoint(layer), x, params["layers"])[0] ** 2)

    def normal(seed, *shape):
        return draws.normal(seed, *shape, scale=0.3)

    params = {
        "embed": normal(0, 12, 16),
        "layers": {"down": normal(1, 3, 24, 16), "up": normal(2, 3, 16, 24)},
    }
    specs = {
        "embed": P(),
        "layers": {"down": P(None, "model", None), "up": P(None, None, "model")},
    }
    base = florax.per_layer(optax.adam(1e-2), {"embed": False, "layers": True})
    tx = florax.flora_accumulate(
        base,
        every_k_schedule=4,
        rank=4,
        side=side,
        projection="cosine" if side == "both" else "gaussian",
    )
    batches = normal(3, 4, 8, 5, 12)

    def step(params, batches):
        state = tx.init(params)
        return florax.value_and_update(loss_fn, tx)(params, state, batches)[:2]

    expected_loss, expected = jax.jit(step)(params, batches)
    with jax.set_mesh(mesh):
        divided = place(params, mesh, specs)
        batches = jax.device_put(batches, NamedSharding(mesh, P(None, "data")))
        loss, new = jax.jit(step)(divided, batches)
        assert divisions(new) == divisions(divided)
    chex.assert_trees_all_close((loss, new), (expected_loss, expected), rtol=1e-5, atol=1e-5)
