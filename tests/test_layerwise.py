"""Layer by layer is the ordinary step: same losses, parameters and states."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import florax
from florax import _stacks


@pytest.fixture(scope="module", autouse=True)
def quickly(compile_quickly):
    """These tests are about values, not about speed."""


# Three steps of a handful of float32 products and an optimizer's division by a root.
CLOSE = dict(rtol=2e-5, atol=2e-6)


def normal(seed, *shape):
    return 0.2 * jax.random.normal(jax.random.key(seed), shape)


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
    "residual": florax.flora(1e-2, rank=4, projection="cosine", residual=True),
}


def layerwise(loss_fn, tx, **arguments):
    return florax.value_and_update(loss_fn, tx, layerwise=True, **arguments)


def at_once(loss_fn, tx):
    """The ordinary step: all gradients, one update."""

    def step(params, state, *batch, **extra_args):
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params, **extra_args)
        return loss, optax.apply_updates(params, updates), state

    return step


def train(step, tx, params, batches):
    """Losses of every step, and the last parameters and state."""

    def body(carry, batch):
        loss, *carry = step(*carry, batch)
        return tuple(carry), loss

    @jax.jit
    def run(params):
        (params, state), losses = jax.lax.scan(body, (params, tx.init(params)), batches)
        return losses, params, state

    return run(params)


def assert_states_are_close(state, expected):
    """What holds gradients, and is not multiplied by a learning rate, has errors of their size."""
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        size = np.max(np.abs(wanted), initial=0)
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=max(2e-6, 5e-6 * size))


@pytest.mark.parametrize(
    "name",
    [
        "adam",
        "adafactor",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("flora", "lion", "sgd", "residual")
        ),
    ],
)
def test_layer_by_layer_is_the_ordinary_step(name, params):
    tx, batches = florax.per_layer(TRANSFORMATIONS[name], STACKED), normal(7, 3, 2, 5, 12)
    losses, new, state = train(layerwise(loss_fn, tx), tx, params, batches)
    expected_losses, expected, expected_state = train(at_once(loss_fn, tx), tx, params, batches)
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


@pytest.mark.slow  # by day `test_laws` says the same of a smaller model
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


@pytest.mark.parametrize(
    "loss, found",
    [
        (lambda params, x: jnp.sum(x @ params["layers"][0]), "none"),
        (
            lambda params, x: (
                jnp.sum(params["layers"])
                + jnp.sum(jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])[0])
            ),
            r"scan at .*of length 3 over no parameters",
        ),
        (
            lambda params, x: jnp.sum(
                jax.lax.scan(lambda x, w: (x @ w, None), x, 2 * params["layers"])[0]
            ),
            r"scan at .*of length 3 over no parameters",
        ),
    ],
    ids=["no scan", "used elsewhere", "scaled before"],
)
def test_a_loss_without_a_scan_over_the_layers_is_refused(loss, found):
    message = rf"takes \['layers'\] for a stack of 3 layers, but no scan .* Found: {found}\."
    tx = florax.per_layer(optax.sgd(1.0), True)
    refuse(loss, tx, LAYERS, normal(1, 2, 4), match=message)


def test_the_state_of_other_parameters_is_refused(params):
    tx = florax.per_layer(optax.sgd(1.0, momentum=0.9), STACKED)
    state = tx.init({**params, "shared": [normal(8, 3), normal(9, 3)]})
    with pytest.raises(ValueError, match=r"per_layer was made for 8 leaves, got 7"):
        layerwise(loss_fn, tx)(params, state, normal(7, 2, 5, 12))
