"""Layers along another axis than the first: the same training, of parameters stored otherwise."""

import chex
import draws
import jax
import jax.numpy as jnp
import optax
import pytest
import steps

import florax

LAYERS, WIDTH, INNER = 3, 8, 12
# Two updates of sums of some 60 products of size 1, divided by roots.
CLOSE = dict(rtol=2e-5, atol=5e-6)


def normal(seed, *shape):
    return draws.normal(seed, *shape, scale=0.3)


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
        if axis == -1:  # the same in two transposes
            layers["up"] = params["layers"]["up"].T.swapaxes(1, 2)
        x, _ = jax.lax.scan(layer, x @ params["embed"], layers)
        return jnp.mean((x - 1) ** 2)

    return loss


def experts(path, leaf):
    """Whatever is in front of their matrices, with or without layers."""
    if "experts" in jax.tree_util.keystr(path):
        return florax.FloraDimensionNumbers(-2, -1, tuple(range(leaf.ndim - 2)))


def rank(path, leaf):
    return 2 if leaf.ndim > 1 and min(leaf.shape[-2:]) > 2 else None


BASES = {
    "adam": optax.adam(0.1, eps=0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=4),
    "momentum": optax.chain(
        optax.sgd(0.1), florax.flora_momentum(rank, 0.8, 2, dimension_numbers=experts)
    ),
}


def halves(loss, tx):
    def step(params, state, batch):
        def micro_step(state, x):
            value, grads = jax.value_and_grad(loss)(params, x)
            return florax.accumulate(tx, grads, state), value

        state, values = jax.lax.scan(micro_step, state, batch)
        return jnp.mean(values), *florax.finish(tx, params, state)

    return step


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_at_once_and_layer_by_layer_it_is_the_training_of_stacks_along_the_first_axis(base):
    params, loss, x = moved(FIRST, -1), loss_at(-1), X[:, 0]
    first = florax.per_layer(BASES[base], STACKED)
    tx = florax.per_layer(BASES[base], STACKED, axis=-1)
    expected = steps.train(steps.at_once(loss_at(0), first), first, FIRST, x)
    at_once = steps.train(steps.at_once(loss, tx), tx, params, x)
    by_layer = steps.train(florax.value_and_update(loss, tx, layerwise=True), tx, params, x)
    chex.assert_trees_all_close(by_layer, at_once, **CLOSE)
    chex.assert_trees_all_equal_shapes_and_dtypes(by_layer[1:], (params, tx.init(params)))
    values, params, _ = at_once
    chex.assert_trees_all_close((values, moved(params, 0, -1)), expected[:2], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "side, projection", [("smaller", "gaussian"), ("both", "cosine")], ids=["one side", "both"]
)
@pytest.mark.parametrize("base", BASES)
def test_all_ways_to_accumulate_are_those_of_stacks_along_the_first_axis(base, side, projection):
    def accumulated(axis):
        opt = florax.per_layer(BASES[base], STACKED, axis)
        settings = dict(dimension_numbers=experts, side=side, projection=projection)
        return florax.flora_accumulate(opt, 3, rank_of_layers, **settings)

    def rank_of_layers(path, leaf):
        return (
            (3 if side == "both" else 2)
            if leaf.ndim > 1 + ("layers" in jax.tree_util.keystr(path))
            else None
        )

    tx, first, params, loss = accumulated(1), accumulated(0), moved(FIRST, 1), loss_at(1)
    expected = steps.train(halves(loss_at(0), first), first, FIRST, X)
    got, *others = (
        steps.train(step, tx, params, X)
        for step in (
            halves(loss, tx),
            florax.value_and_update(loss, tx),
            florax.value_and_update(loss, tx, layerwise=True),
        )
    )
    for other in others:
        chex.assert_trees_all_close(other, got, **CLOSE)
    values, params, state = got
    chex.assert_trees_all_close((values, moved(params, 0, 1)), expected[:2], **CLOSE)
    # What is compressed is kept by layers first.
    kept, wanted = (own.sketch.arrays["layers"] for own in (state, expected[2]))
    for name in ("experts", "square", "up"):
        chex.assert_trees_all_close(kept[name], wanted[name], **CLOSE)


@pytest.mark.slow
def test_every_layer_is_a_block_of_its_own():
    """Counted from the end, the axis is that of matrices and vectors alike."""
    params = {"down": normal(7, WIDTH, INNER, LAYERS), "norm": normal(8, WIDTH, LAYERS)}
    updates = jax.tree.map(jnp.sin, params)
    opt = optax.chain(optax.adafactor(0.1, min_dim_size_to_factor=4), optax.clip_by_block_rms(0.01))
    tx = florax.per_layer(opt, True, axis=-1)
    got, _ = tx.update(updates, tx.init(params), params)
    for i in range(LAYERS):
        own, own_updates = jax.tree.map(lambda x, i=i: x[..., i], (params, updates))
        expected, _ = opt.update(own_updates, opt.init(own), own)
        one = jax.tree.map(lambda x, i=i: x[..., i], got)
        chex.assert_trees_all_close(one, expected, rtol=1e-6)


def test_a_state_is_laid_out_as_the_parameters_are():
    params = moved(FIRST, 1)
    (adam, *_) = florax.per_layer(optax.adam(0.1), STACKED, axis=1).init(params).inner
    chex.assert_trees_all_equal(adam.mu, optax.tree.zeros_like(params))
    factored = florax.per_layer(BASES["adafactor"], STACKED, axis=1).init(params).inner[0].v_row
    assert factored["layers"]["up"].shape == (LAYERS, WIDTH)  # an axis fewer than the matrix


@pytest.mark.slow
def test_stacks_along_several_axes_are_parts_of_a_partition():
    """Even of one scan."""
    names = {"embed": "first", "layers": dict.fromkeys(FIRST["layers"], "first")}
    names["layers"] |= {"up": "second", "norm": "second"}
    params = {**FIRST, "layers": {**FIRST["layers"]}}
    for name in ("up", "norm"):
        params["layers"][name] = jnp.moveaxis(FIRST["layers"][name], 0, 1)

    def loss(params, x):
        layers = {
            name: jnp.moveaxis(w, 1, 0) if names["layers"][name] == "second" else w
            for name, w in params["layers"].items()
        }
        return loss_at(0)({**params, "layers": layers}, x)

    base = optax.sgd(0.1, momentum=0.9)
    parts = {
        part: florax.per_layer(base, STACKED, axis) for part, axis in (("first", 0), ("second", 1))
    }
    tx, x = optax.partition(parts, names), X[:, 0]
    by_layer = steps.train(florax.value_and_update(loss, tx, layerwise=True), tx, params, x)
    chex.assert_trees_all_close(
        by_layer, steps.train(steps.at_once(loss, tx), tx, params, x), **CLOSE
    )


@pytest.mark.slow
def test_a_flax_linen_scan_along_another_axis():
    nn = pytest.importorskip("flax.linen", reason="flax comes with the extra `examples`")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            scale = self.param("scale", nn.initializers.ones, (WIDTH,))
            return x + nn.Dense(WIDTH)(jnp.tanh(nn.Dense(INNER)(x * scale))), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                nn.remat(Block, prevent_cse=False),
                variable_axes={"params": 1},
                split_rngs={"params": True},
                length=LAYERS,
            )
            return nn.Dense(1)(layers(name="layers")(nn.Dense(WIDTH)(x), None)[0])

    model, x = Model(), X[:, 0]
    params = model.init(jax.random.key(0), x[0])["params"]
    assert params["layers"]["scale"].shape == (WIDTH, LAYERS)

    def loss(params, x):
        return jnp.mean((model.apply({"params": params}, x) - 1) ** 2)

    tx = florax.per_layer(BASES["adam"], lambda path, leaf: path[0].key == "layers", axis=1)
    by_layer = steps.train(florax.value_and_update(loss, tx, layerwise=True), tx, params, x)
    chex.assert_trees_all_close(
        by_layer, steps.train(steps.at_once(loss, tx), tx, params, x), **CLOSE
    )


# --- errors


@pytest.mark.parametrize("axis", [True, 1.0, (0, 1), {"layers": 1}])
def test_the_axis_is_an_int(axis):
    with pytest.raises(TypeError, match="axis must be an int, that of the layers in every stack"):
        florax.per_layer(optax.adam(0.1), STACKED, axis=axis)


def test_which_leaves_are_stacks_is_not_said_by_an_axis():
    tx = florax.per_layer(optax.adam(0.1), {"embed": False, "layers": 1})
    with pytest.raises(TypeError, match=r"stacked says 1 of \['layers'\]\['experts'\], no bool\. "):
        tx.init(FIRST)


def test_a_stack_has_the_axis():
    tx = florax.per_layer(optax.adam(0.1), STACKED, axis=2)
    message = (
        r"\['norm'\] is said to be a stack of layers, but has no axis 2, its shape is \(3, 8\)"
    )
    with pytest.raises(ValueError, match=message):
        tx.init(FIRST)
