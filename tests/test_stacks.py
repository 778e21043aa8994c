"""Every layer of a stack is a block of its own, in the update, the state and the projections."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from draws import normal

import florax
from florax import _stacks

LAYERS = 3
STACK = florax.FloraDimensionNumbers(rows=1, columns=2, batch=0)


# Stacks of two heights, a matrix that is none, and a vector for each.
PARAMS = {
    "bias": normal(0, 8),
    "decoder": {"kernel": normal(1, 2, 8, 12), "norm": normal(2, 2, 8)},
    "encoder": {"kernel": normal(3, LAYERS, 12, 8), "norm": normal(4, LAYERS, 8)},
    "head": normal(5, 8, 12),
}
GRADIENTS = [jax.tree.map(lambda x, s=s: s * jnp.sin(9 * s * x), PARAMS) for s in (1.0, 0.5, 2.0)]
STACKED = {"bias": False, "decoder": True, "encoder": True, "head": False}
HEIGHTS = {"decoder": 2, "encoder": LAYERS}


def momentum(**arguments):
    return florax.flora_momentum(3, resample_every=2, **arguments)


def run(tx, params=PARAMS, gradients=GRADIENTS):
    """The updates of every step, and the last state."""
    return steps(tx, params, jax.tree.map(lambda *g: jnp.stack(g), *gradients))


@functools.partial(jax.jit, static_argnums=0)
def steps(tx, params, gradients):
    def step(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, updates

    state, updates = jax.lax.scan(step, tx.init(params), gradients)
    return updates, state


def one(name, layer):
    """The parameters and gradients of one layer."""
    return jax.tree.map(lambda x: x[layer], (PARAMS[name], [g[name] for g in GRADIENTS]))


# What has no projections: layer by layer is the same transformation on one layer's tree.
LEAF_WISE = {
    "adam": optax.adam(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=4),
    "lion": optax.lion(0.1),
    "clipped by block": optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(0.1, momentum=0.9)),
    "clipped by layer": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1)),
    "scaled by a schedule": optax.sgd(optax.linear_schedule(1.0, 0.1, 3)),
}


@pytest.mark.parametrize(
    "opt",
    [
        pytest.param(opt, id=name, marks=() if name == "clipped by layer" else pytest.mark.slow)
        for name, opt in LEAF_WISE.items()
    ],
)
def test_it_is_the_transformation_applied_to_each_layer_by_itself(opt):
    updates, state = run(florax.per_layer(opt, STACKED))
    alone = {"bias": PARAMS["bias"], "head": PARAMS["head"]}
    of_rest = [{name: g[name] for name in alone} for g in GRADIENTS]
    expected, rest = run(opt, alone, of_rest)
    chex.assert_trees_all_equal({name: updates[name] for name in alone}, expected)
    parts = _stacks._split(state, PARAMS)
    chex.assert_trees_all_equal(jax.tree.leaves(parts.rest), jax.tree.leaves(rest))
    for layers, (name, height) in zip(parts.layers, HEIGHTS.items(), strict=True):
        for i in range(height):
            expected, own = run(opt, *one(name, i))
            chex.assert_trees_all_equal(
                jax.tree.map(lambda x, i=i: x[:, i], updates[name]), expected
            )
            own_layer = jax.tree.leaves(jax.tree.map(lambda x, i=i: x[i], layers))
            chex.assert_trees_all_equal(own_layer, jax.tree.leaves(own))


def test_what_spans_a_whole_stack_differs_without_it():
    adafactor = optax.adafactor(0.1, min_dim_size_to_factor=4)
    per_layer, _ = run(florax.per_layer(adafactor, STACKED))
    whole, _ = run(adafactor)
    assert not jnp.allclose(per_layer["encoder"]["kernel"], whole["encoder"]["kernel"], rtol=1e-2)
    chex.assert_trees_all_equal(per_layer["head"], whole["head"])


# Sums of at most 12 products of size 1.
CLOSE = dict(rtol=1e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="paper"),
        pytest.param(dict(side="larger", nesterov=True), id="larger nesterov"),
        pytest.param(dict(projection="cosine", residual=True), id="cosine residual"),
    ],
)
def test_a_layer_has_the_projections_that_it_has_in_a_stack(arguments):
    """`per_layer(flora_momentum)` is `flora_momentum` with the layers as batch axis."""

    def dimension_numbers(path, leaf):
        return STACK if leaf.ndim == 3 else None

    layer_by_layer, state = run(florax.per_layer(momentum(**arguments), STACKED))
    whole, of_whole = run(momentum(**arguments, dimension_numbers=dimension_numbers))
    chex.assert_trees_all_close(layer_by_layer, whole, **CLOSE)
    for layers, name in zip(_stacks._split(state, PARAMS).layers, HEIGHTS, strict=True):
        chex.assert_trees_all_close(
            layers.sketch.arrays[name], of_whole.sketch.arrays[name], **CLOSE
        )
        assert layers.sketch.cycle.shape == layers.count.shape == (HEIGHTS[name],)


@pytest.mark.slow
def test_layers_have_projections_of_their_own():
    """The same gradient in every layer leaves a different sketch in each."""
    params = {"layers": jnp.zeros((LAYERS, 12, 8))}
    same = {"layers": jnp.broadcast_to(normal(7, 12, 8), (LAYERS, 12, 8))}
    _, state = run(florax.per_layer(momentum(), True), params, [same])
    (layers,) = _stacks._split(state, params).layers
    sketches = layers.sketch.arrays["layers"]
    for i in range(LAYERS):
        for j in range(i):
            assert not jnp.allclose(sketches[i], sketches[j], atol=0.1)


STATEFUL = {
    "adam": optax.adam(0.1),
    "adafactor": optax.adafactor(0.1),
    "momentum": momentum(),
    "flora": florax.flora(0.1, 3, resample_every=2),
}


@pytest.mark.parametrize("opt", STATEFUL.values(), ids=STATEFUL.keys())
def test_its_state_is_known_from_shapes_and_keeps_them(opt):
    tx = florax.per_layer(opt, STACKED)
    shapes = jax.eval_shape(lambda: PARAMS)
    expected = jax.eval_shape(tx.init, shapes)
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
    after = jax.eval_shape(tx.update, shapes, state, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, (shapes, expected))
    parts = _stacks._split(state, PARAMS)
    leading = [{x.shape[0] for x in jax.tree.leaves(layers)} for layers in parts.layers]
    assert leading == [{height} for height in HEIGHTS.values()]


def test_what_is_kept_like_the_parameters_is_a_tree_like_the_parameters():
    """And what is kept beside them is there once for every layer."""
    counts = _stacks.Parts(tuple(jnp.zeros(n, jnp.int32) for n in HEIGHTS.values()), jnp.int32(0))
    zeros = optax.tree.zeros_like(PARAMS)
    (adam, _) = florax.per_layer(optax.adam(0.1), STACKED).init(PARAMS).inner
    chex.assert_trees_all_equal(adam, optax.ScaleByAdamState(counts, zeros, zeros))
    (adam, _) = florax.per_layer(optax.adam(0.1), False).init(PARAMS).inner
    chex.assert_trees_all_equal(adam.count, _stacks.Parts((), jnp.int32(0)))


def test_it_is_compiled_once():
    tx = florax.per_layer(momentum(), STACKED)
    traces = 0

    @jax.jit
    def update(grads, state):
        nonlocal traces
        traces += 1
        return tx.update(grads, state, PARAMS)

    state = tx.init(PARAMS)
    for grads in GRADIENTS:
        _, state = update(grads, state)
    assert traces == 1


def test_layers_are_said_by_a_function_a_tree_or_a_prefix():
    by = {
        "function": lambda path, leaf: path[0].key in HEIGHTS,
        "prefix": STACKED,
        "tree": jax.tree.map(lambda _: False, PARAMS)
        | {name: {"kernel": True, "norm": True} for name in HEIGHTS},
    }
    states = [florax.per_layer(optax.adam(0.1), stacked).init(PARAMS) for stacked in by.values()]
    chex.assert_trees_all_equal(*states)


def test_a_layer_sees_the_extra_arguments():
    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda g: factor * g, updates), state

    tx = florax.per_layer(
        optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update), STACKED
    )
    updates, _ = tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS, factor=2.0)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda g: 2 * g, GRADIENTS[0]))


def test_parameters_are_not_needed_where_the_transformation_does_not():
    tx = florax.per_layer(optax.sgd(0.1, momentum=0.9), STACKED)
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal(
        tx.update(GRADIENTS[0], state), tx.update(GRADIENTS[0], state, PARAMS)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(
            lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
            id="chain",
        ),
        pytest.param(
            lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
            id="MultiSteps",
        ),
        pytest.param(
            lambda tx: optax.inject_hyperparams(lambda lr: optax.chain(tx, optax.scale(lr)))(
                lr=0.1
            ),
            id="inject_hyperparams",
        ),
    ],
)
def test_it_works_in_the_wrappers_of_optax(wrap):
    updates, _ = run(wrap(florax.per_layer(momentum(), STACKED)))
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(updates))


# --- inside of an accumulation


def test_an_accumulation_takes_its_stacks_for_batches():
    """And compresses every layer by itself, with no `dimension_numbers`."""
    tx = florax.flora_accumulate(florax.per_layer(optax.adam(0.1), STACKED), 2, rank=3)
    state = tx.init(PARAMS)
    axes = {leaf.path: leaf.batch for leaf in state.sketch.plan if leaf.rank is not None}
    assert axes == {"['decoder']['kernel']": (0,), "['encoder']['kernel']": (0,), "['head']": ()}


def test_dimension_numbers_must_name_its_stacks():
    axes = florax.FloraDimensionNumbers((0, 1), 2)
    tx = florax.flora_accumulate(
        florax.per_layer(optax.adam(0.1), STACKED),
        2,
        rank=3,
        dimension_numbers=lambda path, leaf: axes if leaf.ndim == 3 else None,
    )
    expected = re.escape("per_layer takes ['decoder']['kernel'] for a stack of layers along axis")
    with pytest.raises(ValueError, match=expected):
        tx.init(PARAMS)


# --- errors


def test_a_scalar_is_no_stack():
    with pytest.raises(ValueError, match=r"\['n'\] is said to be a stack of layers, but is a scal"):
        florax.per_layer(optax.adam(0.1), True).init({"n": jnp.ones(())})


@pytest.mark.parametrize("stacked", [{"bias": True}, [True], {**STACKED, "more": False}])
def test_the_tree_of_stacks_matches_the_parameters(stacked):
    with pytest.raises(ValueError, match="stacked is a tree that does not match the parameters"):
        florax.per_layer(optax.adam(0.1), stacked).init(PARAMS)


def test_updates_are_like_the_parameters():
    tx = florax.per_layer(optax.adam(0.1), STACKED)
    state, fewer = tx.init(PARAMS), {"bias": PARAMS["bias"], "head": PARAMS["head"]}
    with pytest.raises(ValueError, match="per_layer was made for 6 leaves, got 2: missing"):
        tx.update(fewer, state, PARAMS)
