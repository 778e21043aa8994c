"""Layer by layer is the ordinary step: same losses, parameters and states, in less memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import florax

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


@pytest.mark.parametrize(
    "name",
    [
        "adam",
        "adafactor",
        "flora",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("lion", "sgd", "residual")),
    ],
)
def test_layer_by_layer_is_the_ordinary_step_of_per_layer(name, params):
    opt, batches = TRANSFORMATIONS[name], normal(7, 3, 2, 5, 12)
    init, step = florax.layerwise_value_and_update(loss_fn, opt)
    ordinary = florax.per_layer(opt, STACKED)

    @jax.jit
    def layer_by_layer(params):
        def body(carry, x):
            loss, *carry = step(*carry, x)
            return tuple(carry), loss

        return jax.lax.scan(body, (params, init(params, batches[0])), batches)

    @jax.jit
    def at_once(params):
        def body(carry, x):
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, x)
            updates, state = ordinary.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(body, (params, ordinary.init(params)), batches)

    (new, _), losses = layer_by_layer(params)
    (expected, _), expected_losses = at_once(params)
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
    chex.assert_trees_all_close(new, expected, **CLOSE)


def test_projections_are_those_of_the_stack(params):
    """A layer's key is the stack's with the layer's number folded in."""
    init, _ = florax.layerwise_value_and_update(loss_fn, florax.flora_momentum(rank=4))
    state = init(params, normal(7, 2, 5, 12))
    stacked = florax.flora_momentum(rank=4, key=0).init(params)
    for keys, height in zip([layers.key for layers in state.layers], (4, 3), strict=True):
        expected = [
            jax.random.key_data(
                jax.random.fold_in(jax.random.wrap_key_data(stacked.key, impl="threefry2x32"), i)
            )
            for i in range(height)
        ]
        np.testing.assert_array_equal(keys, expected)


@pytest.mark.parametrize("base", ["adam", pytest.param("flora", marks=pytest.mark.slow)])
def test_with_accumulation_it_is_the_mean_gradient_compressed_and_applied_layer_by_layer(
    base, params
):
    opt = TRANSFORMATIONS[base]
    batches = normal(7, 4, 2, 5, 12)
    tx = florax.flora_accumulate(opt, every_k_schedule=4, rank=4)
    init, step = florax.layerwise_value_and_update(loss_fn, tx)
    ordinary = florax.flora_accumulate(florax.per_layer(opt, STACKED), every_k_schedule=4, rank=4)

    @jax.jit
    def dense(params):
        def micro_step(state, x):
            loss, grads = jax.value_and_grad(loss_fn)(params, x)
            return florax.accumulate(grads, state), loss

        state, losses = jax.lax.scan(micro_step, ordinary.init(params), batches)
        return jnp.mean(losses), *florax.finish(ordinary, params, state)

    loss, new, state = jax.jit(step)(params, init(params, batches), batches)
    expected_loss, expected, _ = dense(params)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    chex.assert_trees_all_close(new, expected, **CLOSE)
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
    init, step = florax.layerwise_value_and_update(loss, optax.sgd(1.0))
    state = init(params, x)
    _, new, _ = jax.jit(step)(params, state, x)
    grads = jax.jit(jax.grad(loss))(params, x)
    # The gradient is one of bfloat16 products, whichever way their sums are ordered.
    change = np.max(np.abs(grads["layers"]))
    np.testing.assert_allclose(
        new["layers"], params["layers"] - grads["layers"], atol=float(change) * 2.0**-6
    )


def test_the_compiled_step_updates_parameters_and_state_in_place():
    """No second copy of either: all results but the loss take the place of arguments."""
    size, height = 128, 12

    def loss(params, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.mean(jax.lax.scan(layer, x, params)[0] ** 2)

    params = jax.ShapeDtypeStruct((height, size, size), jnp.float32)
    x = jax.ShapeDtypeStruct((4, size), jnp.float32)
    init, step = florax.layerwise_value_and_update(loss, optax.adam(1e-3))
    state = jax.eval_shape(init, params, x)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x).compile()
    memory = compiled.memory_analysis()
    layer_bytes = 4 * size**2
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 100
    assert memory.alias_size_in_bytes >= 3 * height * layer_bytes
    # A layer's weight, gradient, moments and their successors; a copy of any stack is 12 layers.
    # XLA for CPUs of jax 0.10 does make copies, and takes 29.
    if jax.__version_info__ >= (0, 11):
        assert memory.temp_size_in_bytes < 10 * layer_bytes


def test_shapes_suffice_for_init(params):
    x = normal(7, 2, 5, 12)
    init, _ = florax.layerwise_value_and_update(loss_fn, optax.adam(1e-2))
    shapes = jax.eval_shape(init, params, x)
    from_shapes = init(params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, from_shapes)


def test_what_mixes_leaves_is_refused_and_named(params):
    x = normal(7, 2, 5, 12)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    message = r"mixes leaves: the update of \['embed'\] depends on the gradient of \['shared'\]"
    for tx, batch in ((clipped, x), (florax.flora_accumulate(clipped, 4, rank=4), x[None])):
        init, _ = florax.layerwise_value_and_update(loss_fn, tx)
        with pytest.raises(ValueError, match=message):
            init(params, batch)


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

    init, _ = florax.layerwise_value_and_update(loss, tx)
    with pytest.raises(ValueError, match=r"mixes leaves: the update of .*'a'.* of .*'b'"):
        init(params, normal(2, 3, 4))


@pytest.mark.parametrize(
    "loss",
    [
        lambda params, x: jnp.sum(x @ params["layers"][0]),
        lambda params, x: (
            jnp.sum(params["layers"])
            + jnp.sum(jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])[0])
        ),
    ],
    ids=["no_scan", "used_elsewhere"],
)
def test_a_loss_without_a_scan_over_layers_is_refused(loss):
    init, _ = florax.layerwise_value_and_update(loss, optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"looks for a jax\.lax\.scan"):
        init({"layers": normal(0, 3, 4, 4)}, normal(1, 2, 4))


def test_a_state_of_other_stacks_is_refused(params):
    init, step = florax.layerwise_value_and_update(loss_fn, optax.sgd(1.0))
    state = init(params, normal(7, 2, 5, 12))
    other = state._replace(stacks=type(state.stacks)((None,) * 6, ()))
    with pytest.raises(ValueError, match="Call init with this loss"):
        step(params, other, normal(7, 2, 5, 12))
