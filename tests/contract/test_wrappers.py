"""Optax's wrappers do with the transformations what they do with Optax's own."""

import chex
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import florax

# The same sums of at most 12 float32 products of size 1, twice, in another order or fused.
CLOSE = dict(rtol=1e-5, atol=2e-6)


@pytest.fixture(scope="module")
def params(params):
    """Fewer leaves compile faster: a dense one and a matrix."""
    return {name: params[name] for name in ("bias", "kernel")}


def call(tx, params, gradients):
    """Updates of each call, and the last state."""
    update = jax.jit(tx.update)
    state, updates = tx.init(params), []
    for grads in gradients:
        new, state = update(grads, state, params)
        updates.append(new)
    return updates, state


# --- optax.tree.map_params


def test_map_params_with_the_identity_changes_nothing(tx, params):
    state = tx.init(params)
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)


def test_map_params_does_not_take_sketches_for_parameters(tx, name, params):
    state = tx.init(params)
    marked = optax.tree.map_params(
        tx,
        lambda _, name: name,
        state,
        {name: f"like {name}" for name in params},
        transform_non_params=lambda _: "other",
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    sketches = optax.tree.get_all_with_path(marked, "sketch")
    assert bool(sketches) == (name != "per_layer_adam")
    assert all(value == "other" for _, value in sketches)


ADAM = optax.adam(0.1)
SHARDED = {
    "accumulate": florax.flora_accumulate(ADAM, every_k_schedule=2, rank=3),
    "per_layer": florax.per_layer(ADAM, {"bias": False, "kernel": False, "layers": True}),
    "accumulate_per_layer": florax.flora_accumulate(
        florax.per_layer(ADAM, {"bias": False, "kernel": False, "layers": True}), 2, rank=3
    ),
}


@pytest.mark.parametrize("tx", SHARDED.values(), ids=SHARDED.keys())
def test_map_params_gives_a_tree_of_shardings_that_places_the_state(tx):
    """Adam's moments as the parameters, be it of layers; the sketches like the counts."""
    mesh = meshes.make((4,), ("x",))
    params = {"bias": jnp.ones(8), "kernel": jnp.ones((12, 8)), "layers": jnp.ones((2, 8, 12))}
    like_params = {
        "bias": NamedSharding(mesh, PartitionSpec("x")),
        "kernel": NamedSharding(mesh, PartitionSpec("x", None)),
        "layers": NamedSharding(mesh, PartitionSpec(None, None, "x")),
    }
    replicated = NamedSharding(mesh, PartitionSpec())
    state = tx.init(params)
    shardings = optax.tree.map_params(
        tx, lambda _, s: s, state, like_params, transform_non_params=lambda _: replicated
    )
    placed = jax.jit(lambda state: state, out_shardings=shardings)(state)
    chex.assert_trees_all_equal(placed, state)
    for moments in (optax.tree.get(placed, "mu"), optax.tree.get(placed, "nu")):
        assert jax.tree.map(lambda x: x.sharding, moments) == like_params
    kept = [value for _, value in optax.tree.get_all_with_path(placed, "sketch")]
    kept += [value for _, value in optax.tree.get_all_with_path(placed, "count")]
    assert kept and all(x.sharding == replicated for x in jax.tree.leaves(kept))


# --- optax.inject_hyperparams

SCHEDULE = optax.linear_schedule(0.9, 0.5, 4)
ACCUMULATE = dict(opt=optax.adam(0.1), every_k_schedule=2, rank=3)
FACTORIES = {
    "flora_momentum": (florax.flora_momentum, dict(rank=3, decay=0.8, resample_every=2)),
    "flora_momentum_gaussian": (
        florax.flora_momentum,
        dict(rank=3, resample_every=2, projection="gaussian", nesterov=True),
    ),
    "flora_accumulate": (florax.flora_accumulate, ACCUMULATE),
    "flora": (florax.flora, dict(learning_rate=0.1, rank=3, resample_every=2)),
    "flora_scheduled": (
        florax.flora,
        dict(learning_rate=optax.linear_schedule(0.1, 0.0, 5), rank=3, weight_decay_rate=0.1),
    ),
}
INJECTED_BY_DAY = {"flora_accumulate"}


@pytest.mark.parametrize(
    "factory, arguments",
    [
        pytest.param(*made, id=name, marks=() if name in INJECTED_BY_DAY else pytest.mark.slow)
        for name, made in FACTORIES.items()
    ],
)
def test_injected_hyperparameters_are_the_plain_ones(factory, arguments, params, gradients):
    injected = optax.inject_hyperparams(factory, static_args="rank")(**arguments)
    plain_updates, plain_state = call(factory(**arguments), params, gradients)
    updates, state = call(injected, params, gradients)
    chex.assert_trees_all_close(updates, plain_updates, **CLOSE)
    chex.assert_trees_all_close(
        optax.tree.get(state, "sketch"), optax.tree.get(plain_state, "sketch"), **CLOSE
    )


@pytest.mark.parametrize("factory, arguments", FACTORIES.values(), ids=FACTORIES.keys())
def test_a_rank_that_is_injected_must_be_named_static(factory, arguments, params):
    injected = optax.inject_hyperparams(factory)(**arguments)
    with pytest.raises(TypeError, match=r"rank must be known.*static_args=\('rank',\)"):
        injected.init(params)


@pytest.mark.slow
def test_an_injected_decay_can_be_scheduled(params, gradients):
    injected = optax.inject_hyperparams(florax.flora_momentum, static_args="rank")(3, SCHEDULE)
    updates, _ = call(injected, params, gradients)

    @jax.jit
    def update_with(decay, grads, state):
        return florax.flora_momentum(3, decay).update(grads, state)

    state = florax.flora_momentum(3).init(params)
    for count, grads in enumerate(gradients):
        expected, state = update_with(SCHEDULE(count), grads, state)
        chex.assert_trees_all_close(updates[count], expected, **CLOSE)


def test_an_injected_decay_can_be_set_by_hand(params, gradients):
    injected = optax.inject_hyperparams(florax.flora_momentum, static_args="rank")(3, decay=0.9)
    state = injected.init(params)
    state.hyperparams["decay"] = jnp.float32(0)
    updates, _ = jax.jit(injected.update)(gradients[0], state, params)
    chex.assert_trees_all_close(updates["bias"], gradients[0]["bias"])  # decay 0: no momentum


# --- optax.masked, optax.partition


def test_masked_leaves_pass_and_the_others_are_as_without_mask(tx, run, params, gradients):
    masked = optax.masked(tx, {"bias": False, "kernel": True})
    updates, _ = call(masked, params, gradients)
    for new, grads, expected in zip(updates, gradients, run.updates, strict=True):
        chex.assert_trees_all_equal(new["bias"], grads["bias"])
        chex.assert_trees_all_close(new["kernel"], expected["kernel"], **CLOSE)


def test_a_partition_is_each_transformation_on_its_own_leaves(tx, run, params, gradients):
    partition = optax.partition(
        {"flora": tx, "sgd": optax.sgd(1.0)}, {"bias": "sgd", "kernel": "flora"}
    )
    updates, _ = call(partition, params, gradients)
    for new, grads, expected in zip(updates, gradients, run.updates, strict=True):
        chex.assert_trees_all_equal(new["bias"], -grads["bias"])
        chex.assert_trees_all_close(new["kernel"], expected["kernel"], **CLOSE)


# --- optax.MultiSteps, optax.apply_if_finite


def test_multi_steps_around_it_hold_still_and_then_update_with_the_mean(tx, run, params, gradients):
    multi_steps = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()
    halves = [
        half
        for grads in gradients
        for half in (jax.tree.map(lambda g: 2 * g, grads), optax.tree.zeros_like(grads))
    ]
    updates, _ = call(multi_steps, params, halves)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(updates[::2]))
    for new, expected in zip(updates[1::2], run.updates, strict=True):
        chex.assert_trees_all_close(new, {name: expected[name] for name in params}, **CLOSE)


def test_apply_if_finite_skips_what_is_not_finite_as_if_it_had_never_come(
    tx, run, params, gradients
):
    wrapped = optax.apply_if_finite(tx, max_consecutive_errors=3)
    broken = jax.tree.map(lambda g: g.at[0].set(jnp.nan), gradients[0])
    (skipped, *updates), _ = call(wrapped, params, [broken, *gradients])
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(skipped))
    for new, expected in zip(updates, run.updates, strict=True):
        chex.assert_trees_all_close(new, {name: expected[name] for name in params}, **CLOSE)
