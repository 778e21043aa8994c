"""Layer by layer is the ordinary step: same losses, parameters and states."""

import chex
import draws
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
import steps
from jax.sharding import AxisType

import florax
from florax import _stacks

# Three steps of a handful of float32 products and an optimizer's division by a root.
CLOSE = dict(rtol=2e-5, atol=2e-6)


def normal(seed, *shape):
    return draws.normal(seed, *shape, scale=0.2)


@pytest.fixture(scope="module")
def params():
    """An encoder and a decoder, a tied embedding, and a matrix that the encoder's layers share."""
    return {
        "decoder": {"cross": normal(0, 3, 16, 16), "up": normal(1, 3, 16, 24)},
        "embed": normal(2, 12, 16),
        "encoder": {
            "bias": normal(3, 4, 16),
            "down": normal(4, 4, 24, 16),
            "up": normal(5, 4, 16, 24),
        },
        "shared": normal(6, 16, 16),
    }


STACKED = {"decoder": True, "embed": False, "encoder": True, "shared": False}


def loss_fn(params, x):
    def encode(x, w):
        hidden = jnp.tanh(x @ w["up"])
        x = x + hidden @ w["down"] + w["bias"] + jnp.tanh(x @ params["shared"])
        return x, jnp.mean(hidden)

    def decode(carry, w):
        x, total = carry
        attention = jax.nn.softmax(x @ encoded.swapaxes(1, 2)) @ encoded
        x = x + attention @ w["cross"] + jnp.tanh(x @ w["up"]) @ w["up"].T
        return (x, total + jnp.sum(x**2)), None

    first = x @ params["embed"]
    encoded, outputs = jax.lax.scan(jax.checkpoint(encode), first, params["encoder"])
    start = (first[:, :3], 0.0)
    (x, total), _ = jax.lax.scan(decode, start, params["decoder"], reverse=True)
    return jnp.mean((x @ params["embed"].T) ** 2) + 1e-2 * total + jnp.sum(outputs)


TRANSFORMATIONS = {
    "adam": optax.adam(1e-2),
    "adafactor": optax.adafactor(1e-2, momentum=0.9),
    "lion": optax.lion(1e-2),
    "sgd": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "flora": florax.flora(1e-2, rank=4, resample_every=2),
    "gaussian": florax.flora(1e-2, rank=4, projection="gaussian"),
}


def layerwise(loss_fn, tx, **arguments):
    return florax.value_and_update(loss_fn, tx, layerwise=True, **arguments)


def assert_states_are_close(state, expected):
    """What holds gradients, and is not multiplied by a learning rate, has errors of their size."""
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        size = np.max(np.abs(wanted), initial=0)
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=max(2e-6, 5e-6 * size))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "sgd" else pytest.mark.slow)
        for name in TRANSFORMATIONS
    ],
)
def test_layer_by_layer_is_the_ordinary_step(name, params):
    tx, batches = florax.per_layer(TRANSFORMATIONS[name], STACKED), normal(7, 3, 2, 5, 12)
    losses, new, state = steps.train(layerwise(loss_fn, tx), tx, params, batches)
    expected_losses, expected, expected_state = steps.train(
        steps.at_once(loss_fn, tx), tx, params, batches
    )
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
    chex.assert_trees_all_close(new, expected, **CLOSE)
    assert_states_are_close(state, expected_state)
    chex.assert_trees_all_equal_shapes_and_dtypes((new, state), (params, tx.init(params)))


def test_projections_are_those_of_the_stack(params):
    """A layer's key is the stack's with the layer's number folded in."""
    momentum = florax.flora_momentum(rank=4)
    state = florax.per_layer(momentum, STACKED).init(params)
    base = jax.random.wrap_key_data(momentum.init(params).sketch.key, impl="threefry2x32")
    for layers, height in zip(_stacks._split(state, params).layers, (3, 4), strict=True):
        expected = [jax.random.key_data(jax.random.fold_in(base, i)) for i in range(height)]
        np.testing.assert_array_equal(layers.sketch.key, expected)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["adam", "flora"])
def test_with_accumulation_it_is_the_mean_gradient_compressed_and_applied_layer_by_layer(
    base, params
):
    batches = normal(7, 4, 2, 5, 12)
    opt = florax.per_layer(TRANSFORMATIONS[base], STACKED)
    tx = florax.flora_accumulate(opt, every_k_schedule=4, rank=4)

    @jax.jit
    def dense(params):
        def micro_step(state, x):
            loss, grads = jax.value_and_grad(loss_fn)(params, x)
            return florax.accumulate(tx, grads, state), loss

        state, losses = jax.lax.scan(micro_step, tx.init(params), batches)
        return jnp.mean(losses), *florax.finish(tx, params, state)

    step = jax.jit(layerwise(loss_fn, tx))
    loss, new, state = step(params, tx.init(params), batches)
    expected_loss, expected, expected_state = dense(params)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    chex.assert_trees_all_close(new, expected, **CLOSE)
    assert_states_are_close(state, expected_state)
    assert int(state.gradient_step) == 1
    assert state.sketch.arrays["encoder"]["up"].shape == (4, 24, 4)
    assert state.sketch.arrays["encoder"]["bias"].shape == (4, 16)


def test_stacked_parameters_may_be_cast_before_the_scan():
    def loss(params, x):
        layers = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params["layers"])
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x.astype(jnp.bfloat16), layers)
        return jnp.mean(x.astype(jnp.float32) ** 2)

    params = {"layers": normal(0, 3, 8, 8)}
    x = normal(1, 4, 8)
    tx = florax.per_layer(optax.sgd(1.0), True)
    _, new, _ = jax.jit(layerwise(loss, tx))(params, tx.init(params), x)
    grads = jax.jit(jax.grad(loss))(params, x)
    # The gradient is one of bfloat16 products, whichever way their sums are ordered.
    change = np.max(np.abs(grads["layers"]))
    np.testing.assert_allclose(
        new["layers"], params["layers"] - grads["layers"], atol=float(change) * 2.0**-6
    )


# --- what may stand around and inside of a scan


# In 16 bits a difference in the last bit of 32 may turn a rounding.
ROUNDED = dict(rtol=1e-3, atol=1e-3)


def is_the_ordinary_step(loss, tx, params, x, **close):
    state = tx.init(params)
    got = jax.jit(layerwise(loss, tx))(params, state, x)
    expected = jax.jit(steps.at_once(loss, tx))(params, state, x)
    chex.assert_trees_all_close(got, expected, **{**CLOSE, **close})
    return got


def test_a_checkpoint_around_a_scan_is_looked_into():
    @jax.checkpoint
    def model(params, x):
        layer = jax.jit(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)))
        return jax.jit(lambda w, x: jax.lax.scan(layer, jnp.sin(x), w)[0])(params["layers"], x)

    tx = florax.per_layer(optax.adam(0.1, eps=0.1), True)
    is_the_ordinary_step(lambda p, x: jnp.mean(jax.checkpoint(model)(p, x) ** 2), tx, LAYERS, X)


def used_in_any_way(params, x):
    """Weights scaled, transposed, in parts, joined, penalised and cast in the body."""

    def layer(carry, w):
        x, penalty = carry
        joined = jnp.concatenate([0.5 * w["up"], w["down"].T], axis=1)
        hidden = jnp.tanh(x @ joined)
        x = x + hidden[:, :24] @ w["down"] + hidden[:, 24:] @ w["up"].T * w["up"][0, 0]
        x = x + (x.astype(jnp.bfloat16) @ w["up"].astype(jnp.bfloat16)).sum(1, keepdims=True)
        return (x, penalty + jnp.sum(w["up"] ** 2) + jnp.max(jnp.abs(w["bias"]))), w["bias"].mean()

    (x, penalty), means = jax.lax.scan(layer, (x @ params["embed"], 0.0), params["encoder"])
    return jnp.mean(x.astype(jnp.float32) ** 2) + 1e-2 * penalty + jnp.sum(means)


USED = {"adam": optax.adam(0.1, eps=0.1)} | {k: TRANSFORMATIONS[k] for k in ("adafactor", "sgd")}


@pytest.mark.slow
@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("has_momentum", [False, True])
@pytest.mark.parametrize("base", USED)
def test_layers_may_use_their_weights_in_any_way(base, has_momentum, accumulates, params):
    opt = optax.chain(USED[base], florax.flora_momentum(4)) if has_momentum else USED[base]
    stacked = {"embed": False, "encoder": True}
    params = {name: params[name] for name in stacked}
    tx, x = florax.per_layer(opt, stacked), normal(7, 5, 12)
    if not accumulates:
        is_the_ordinary_step(used_in_any_way, tx, params, x, **ROUNDED)
        return
    tx = florax.flora_accumulate(tx, 1, rank=4)
    # Born compressed, products in 16 bits are rounded elsewhere than as full-size gradients.
    state = tx.init(params)
    _, grads = florax.value_and_grad(used_in_any_way, tx)(params, x, opt_state=state)
    expected = florax.finish(tx, params, florax.accumulate(tx, grads, state))
    step = jax.jit(layerwise(used_in_any_way, tx))
    _, *got = step(params, tx.init(params), x[None])
    chex.assert_trees_all_close(tuple(got), expected, **{**CLOSE, **ROUNDED})


# --- meshes with explicit axes


def in_auto(function):
    return jax.sharding.auto_axes(function, out_sharding=jax.P("d"))


def block(x, w):
    return x + jnp.tanh(x @ w["up"]) @ w["down"], None


def model(x, w, block=block):
    return jax.lax.scan(block, x, w)[0]


def with_jits_in_auto(x, w):
    inner = in_auto(lambda x, w: jax.jit(block)(x, w)[0])
    outer = jax.jit(in_auto(lambda x: jax.jit(jnp.sin)(x)))
    return outer(model(outer(x), w, jax.jit(lambda x, w: (jax.jit(inner)(x, w), None))))


def with_explicit_in_auto(x, w):
    sine = jax.sharding.explicit_axes(
        lambda x: jnp.sin(jax.jit(jnp.sin)(x)), in_sharding=jax.P("d")
    )
    return in_auto(lambda x, w: model(x, w, lambda x, w: block(jax.jit(sine)(x), w)))(x, w)


def with_shardings(x, w):
    return jax.jit(model, out_shardings=None)(jax.jit(jnp.sin, out_shardings=jax.P("d"))(x), w)


MODELS = {
    "jits in auto_axes": with_jits_in_auto,
    "auto_axes around": jax.jit(in_auto(jax.jit(model))),
    "explicit_axes in auto_axes": with_explicit_in_auto,
    "shardings of a jit": with_shardings,
    "transposed": lambda x, w: in_auto(
        lambda x, w: model(x, jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), w))
    )(x, jax.tree.map(lambda w: jnp.moveaxis(w, 0, 1), w)),
}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", MODELS)
def test_inner_programs_keep_their_mesh(name, devices):
    def loss(params, x):
        y = MODELS[name](x @ params["embed"], params["encoder"])
        return jnp.mean((y @ params["embed"].T) ** 2)

    mesh = meshes.make((devices,), ("d",), AxisType.Explicit)
    encoder = {"down": normal(4, 4, 24, 16), "up": normal(5, 4, 16, 24)}
    params = {"embed": normal(2, 12, 16), "encoder": encoder}
    tx = florax.per_layer(optax.adam(0.1, eps=0.1), {"embed": False, "encoder": True})
    with jax.set_mesh(mesh):
        divided = jax.device_put(normal(7, 8, 5, 12), jax.P("d"))
        params = jax.device_put(params, jax.P())
        new = is_the_ordinary_step(loss, tx, params, divided)[1]
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, params)


@pytest.mark.parametrize("in_body", [False, True], ids=["around", "in a layer"])
def test_a_jit_that_says_how_its_result_is_divided_still_does(in_body):
    sine = jax.jit(jnp.sin, out_shardings=jax.P("d"))

    def loss(params, x):
        def layer(x, w):
            return sine(x) @ w if in_body else x @ w, None

        x = x if in_body else sine(x)
        return jnp.sum(jax.lax.scan(layer, x, params["layers"])[0])

    mesh = meshes.make((8,), ("d",))
    tx = florax.per_layer(optax.sgd(1.0), True)
    with jax.set_mesh(mesh):
        step = jax.make_jaxpr(layerwise(loss, tx))(LAYERS, tx.init(LAYERS), normal(1, 8, 4))
    assert "out_shardings=(NamedSharding" in str(step)


# --- what is refused, when the step is called


def refuse(loss, tx, params, *batch, **match):
    with pytest.raises(ValueError, **match):
        jax.eval_shape(layerwise(loss, tx), params, jax.eval_shape(tx.init, params), *batch)


def test_what_mixes_leaves_is_refused_and_named(params):
    x = normal(7, 2, 5, 12)
    message = r"mixes leaves: the update of \['[a-z]+'\].* depends on the gradient of \['[a-z]+'\]"
    clip, opt = optax.clip_by_global_norm(1.0), florax.per_layer(optax.adam(1e-2), STACKED)
    accumulating = florax.flora_accumulate(optax.chain(clip, opt), 4, rank=4)
    for tx, batch in ((optax.chain(clip, opt), x), (accumulating, x[None])):
        refuse(loss_fn, tx, params, batch, match=message)


def test_a_state_that_mixes_leaves_later_is_refused():
    """The norm of all gradients enters the state now, and the updates only at the next step."""

    def update(updates, state, params=None):
        norm = optax.tree.norm(updates)
        return jax.tree.map(lambda g: g / (1 + state), updates), norm

    tx = optax.GradientTransformation(lambda params: jnp.zeros([]), update)
    params = {"layers": {"a": normal(0, 2, 4, 4), "b": normal(1, 2, 4, 4)}}

    def loss(params, x):
        return jnp.sum(
            jax.lax.scan(lambda x, w: (x @ w["a"] @ w["b"], None), x, params["layers"])[0]
        )

    message = r"mixes leaves: the update of .*'a'.* of .*'b'"
    refuse(loss, florax.per_layer(tx, True), params, normal(2, 3, 4), match=message)


LAYERS = {"layers": normal(0, 3, 4, 4)}
X = normal(1, 2, 4)


def scanned(w, x):
    return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])


@jax.custom_vjp
def with_its_own_gradient(w, x):
    return scanned(w, x)


with_its_own_gradient.defvjp(lambda w, x: (scanned(w, x), (w, x)), lambda kept, _: kept)
placed = jax.jit(scanned, out_shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
LINE = r"test_layerwise.py:\d+\S* \(\S+\)"
SCAN = rf"scan at {LINE} goes over axis 0"
REFUSED = {
    "not used": (lambda w, x: jnp.sum(x), "the loss does not use it. Leave it out of stacked"),
    "no scan": (lambda w, x: jnp.sum(x @ w[0]), rf"slice at {LINE} takes it whole. Use it in"),
    "used elsewhere": (
        lambda w, x: jnp.sum(w) + scanned(w, x),
        rf"reduce_sum at {LINE} takes it whole and {SCAN}. Use it in the body of one jax.lax.scan",
    ),
    "scaled before": (lambda w, x: scanned(2 * w, x), rf"mul at {LINE} takes it whole. Use it"),
    "scanned twice": (lambda w, x: scanned(w, x) * scanned(w, 2 * x), rf"{SCAN}, 2 times. Use"),
    "by number": (
        lambda w, x: jnp.sum(jax.lax.fori_loop(0, 3, lambda i, x: x @ w[i], x)),
        rf"scan at {LINE}, a loop, takes it whole. Use it",
    ),
    "in a loop": (
        lambda w, x: jax.lax.fori_loop(0, 3, lambda i, y: y + scanned(w, x), 0.0),
        rf"scan at {LINE}, a loop, takes it whole \(around scan at {LINE}\)",
    ),
    "in a conditional": (
        lambda w, x: jax.lax.cond(x[0, 0] > 0, scanned, lambda w, x: 0.0, w, x),
        rf"cond at {LINE} takes it whole \(around scan at {LINE}\)",
    ),
    "with its own gradient": (
        with_its_own_gradient,
        rf"custom_vjp_call at {LINE} takes it whole \(around scan at {LINE}\)",
    ),
    "with shardings": (
        placed,
        rf"jit at {LINE} takes it whole \(around scan at {LINE}\). .* nothing but jit without sh",
    ),
    "along another axis": (
        lambda w, x: jax.lax.scan(lambda y, w: (y + w.sum(), None), 0.0, w.swapaxes(0, 2))[0],
        rf"scan at {LINE} goes over axis 2. Pass axis=2 to per_layer",
    ),
}


@pytest.mark.parametrize("loss, problem", REFUSED.values(), ids=REFUSED.keys())
def test_a_loss_without_a_scan_over_the_layers_is_refused(loss, problem):
    message = (
        r"per_layer takes \['layers'\] for a stack of 3 layers along axis 0. For layer by layer "
        rf"the loss must scan over that axis of it once, and have no other use of it, but {problem}"
    )
    tx = florax.per_layer(optax.sgd(1.0), True)
    refuse(lambda params, x: loss(params["layers"], x), tx, LAYERS, X, match=message)


def test_a_loss_that_returns_the_layers_is_refused():
    tx = florax.per_layer(optax.sgd(1.0), True)
    step = layerwise(lambda p, x: (scanned(p["layers"], x), p), tx, has_aux=True)
    with pytest.raises(ValueError, match=rf"but {SCAN} and the loss returns it\. Use it in"):
        jax.eval_shape(step, LAYERS, tx.init(LAYERS), X)


def test_the_state_of_other_parameters_is_refused(params):
    tx = florax.per_layer(optax.sgd(1.0, momentum=0.9), STACKED)
    state = tx.init({**params, "shared": [normal(8, 3), normal(9, 3)]})
    with pytest.raises(ValueError, match=r"per_layer was made for 8 leaves, got 7"):
        layerwise(loss_fn, tx)(params, state, normal(7, 2, 5, 12))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rank, bits",
    [pytest.param(4, jnp.int8, id="sketch"), pytest.param(None, jnp.int4, id="full size")],
)
def test_in_few_bits_layer_by_layer_is_the_ordinary_step(rank, bits, params):
    """With the same gradients to the bit: every layer has the rounding of its own."""
    momentum = florax.flora_momentum(
        lambda path, leaf: rank, resample_every=2, accumulator_dtype=bits
    )
    tx = florax.per_layer(optax.chain(optax.adafactor(1e-2), momentum), STACKED)
    batches = normal(7, 3, 2, 5, 12)
    losses, new, state = steps.train(layerwise(loss_fn, tx), tx, params, batches)
    expected_losses, expected, _ = steps.train(steps.at_once(loss_fn, tx), tx, params, batches)
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-4)
    # A sum that is off by its last bits is rarely rounded to the other neighbour, an update's
    # quarter away at most.
    for own, wanted, old in zip(*map(jax.tree.leaves, (new, expected, params)), strict=True):
        moved = abs(wanted - old).max()
        assert jnp.mean(abs(own - wanted) > 1e-3 * moved) < 0.02
        assert abs(own - wanted).max() < 0.5 * moved
    chex.assert_trees_all_equal_shapes_and_dtypes((new, state), (params, tx.init(params)))
