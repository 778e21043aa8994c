"""Layers along another axis than the first: the same training, of parameters stored otherwise."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import florax

LAYERS, WIDTH, INNER = 3, 8, 12
# Two updates of sums of some 60 products of size 1, divided by roots.
CLOSE = dict(rtol=2e-5, atol=5e-6)


@pytest.fixture(scope="module", autouse=True)
def quickly(compile_quickly):
    """These tests are about values, not about speed."""


def normal(seed, *shape):
    return 0.3 * jax.random.normal(jax.random.key(seed), shape)


# One axis fewer, as many, and two batch axes; `square` could be a stack along either.
FIRST = {
    "embed": normal(0, 5, WIDTH),
    "layers": {
        "experts": normal(1, LAYERS, 2, WIDTH, INNER),
        "norm": normal(2, LAYERS, WIDTH),
        "square": normal(3, LAYERS, LAYERS, WIDTH),
        "up": normal(4, LAYERS, WIDTH, INNER),
        "vector": normal(5, LAYERS, LAYERS),
    },
}
STACKED = {"embed": False, "layers": True}
EXPERTS = florax.FloraDimensionNumbers(rows=2, columns=3, batch=(0, 1))
MOVED_EXPERTS = florax.FloraDimensionNumbers(rows=-2, columns=-1, batch=(0, 1))
X = normal(6, 2, 3, 4, 5)  # updates, micro-batches


def moved(tree, axis, source=0):
    """`tree` with the layers' axis moved from `source`."""
    return {
        **tree,
        "layers": jax.tree.map(lambda x: jnp.moveaxis(x, source, axis), tree["layers"]),
    }


def layer(x, w):
    hidden = jnp.tanh(x @ w["up"]) + jnp.einsum("td,edf->tf", x, w["experts"])
    x = x + jnp.tanh(hidden @ w["up"].T) * (1 + w["norm"])
    return x + jnp.tanh(x @ w["square"].T) @ w["square"] * jnp.mean(w["vector"]), None


def loss_at(axis):
    def loss(params, x):
        layers = moved(params, 0, axis)["layers"]
        x, _ = jax.lax.scan(layer, x @ params["embed"], layers)
        return jnp.mean((x - 1) ** 2)

    return loss


def rank(path, leaf):
    return 2 if leaf.ndim >= 2 and min(leaf.shape[-2:]) > 2 else None


def experts(path, leaf):
    if "experts" not in jax.tree_util.keystr(path):
        return None
    return florax.FloraDimensionNumbers(-2, -1, tuple(range(leaf.ndim - 2)))


MOMENTUM = florax.flora_momentum(rank, 0.8, 2, dimension_numbers=experts)
BASES = {
    "adam": optax.adam(0.1, eps=0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=4),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "momentum": optax.chain(optax.sgd(0.1), MOMENTUM),
}
SLOW = {"sgd"}
bases = pytest.mark.parametrize(
    "base",
    [
        pytest.param(base, id=name, marks=pytest.mark.slow if name in SLOW else ())
        for name, base in BASES.items()
    ],
)


def ordinary(loss, tx):
    def step(params, state, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    return step


def halves(loss, tx):
    def step(params, state, batch):
        def micro_step(state, x):
            value, grads = jax.value_and_grad(loss)(params, x)
            return florax.accumulate(tx, grads, state), value

        state, values = jax.lax.scan(micro_step, state, batch)
        return jnp.mean(values), *florax.finish(tx, params, state)

    return step


def train(step, tx, params, batches):
    def body(carry, batch):
        value, *carry = step(*carry, batch)
        return tuple(carry), value

    @jax.jit
    def run(params):
        (params, state), values = jax.lax.scan(body, (params, tx.init(params)), batches)
        return values, params, state

    return run(params)


def without_axes(state, params, axis):
    """The state of stacks along `axis` as that of stacks along the first."""
    like = jax.tree.structure(params)

    def move(node):
        if jax.tree.structure(node) != like:
            return node
        return jax.tree.map(
            lambda x, own: jnp.moveaxis(x, axis, 0) if x.ndim == own.ndim else x, node["layers"], params["layers"]
        )
    return jax.tree.leaves(
        jax.tree.map(move, state, is_leaf=lambda node: jax.tree.structure(node) == like)
    )


@bases
def test_layer_by_layer_and_at_once_they_are_what_stacks_along_the_first_axis_are(base):
    params, x = moved(FIRST, 1), X[:, 0]
    first = florax.per_layer(base, STACKED)
    expected = train(ordinary(loss_at(0), first), first, FIRST, x)
    tx = florax.per_layer(base, STACKED, axis=1)
    loss = loss_at(1)
    of_update = train(ordinary(loss, tx), tx, params, x)
    by_layer = train(florax.value_and_update(loss, tx, layerwise=True), tx, params, x)
    chex.assert_trees_all_close(by_layer, of_update, **CLOSE)
    chex.assert_trees_all_equal_shapes_and_dtypes(by_layer[1:], (params, tx.init(params)))
    values, params, _ = of_update
    chex.assert_trees_all_close((values, moved(params, 0, 1)), expected[:2], **CLOSE)


@bases
def test_accumulated_they_are_what_stacks_along_the_first_axis_are(base):
    def accumulated(axis):
        return florax.flora_accumulate(
            florax.per_layer(base, STACKED, axis), 3, rank_of_layers, dimension_numbers=numbers
        )

    def rank_of_layers(path, leaf):
        return 2 if leaf.ndim > 1 + ("layers" in jax.tree_util.keystr(path)) else None

    def numbers(path, leaf):
        return florax.FloraDimensionNumbers(-2, -1, (0, 1)) if leaf.ndim == 4 else None

    tx, first, params = accumulated(1), accumulated(0), moved(FIRST, 1)
    expected = train(halves(loss_at(0), first), first, FIRST, X)
    loss = loss_at(1)
    results = [
        train(step, tx, params, X)
        for step in (
            halves(loss, tx),
            florax.value_and_update(loss, tx),
            florax.value_and_update(loss, tx, layerwise=True),
        )
    ]
    for result in results[1:]:
        chex.assert_trees_all_close(result, results[0], **CLOSE)
    values, params, state = results[0]
    chex.assert_trees_all_close((values, moved(params, 0, 1)), expected[:2], **CLOSE)
    # What is compressed is kept by layers first.
    got, wanted = (s.sketch.arrays["layers"] for s in (state, expected[2]))
    for name in ("experts", "square", "up"):
        np.testing.assert_allclose(got[name], wanted[name], **CLOSE)
    np.testing.assert_allclose(got["norm"], wanted["norm"].T, **CLOSE)
