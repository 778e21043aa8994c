"""`lora`: layers x W + x A B, of which W stays as it is."""

import functools

import draws
import extras
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

extras.need("examples")

from flax import nnx

from florax_examples.models import checkpoints, lora
from florax_examples.models.gpt2 import GPT2, GPT2Config

TINY = GPT2Config(
    vocab_size=50, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
)
RANK = 3
# Inputs and outputs of the matrices of a block.
SIZES = [(16, 48), (16, 16), (16, 64), (64, 16)]
FORMS = pytest.mark.parametrize(
    "form", [pytest.param("list", marks=pytest.mark.slow), "stacked after", "stacked before"]
)


@pytest.fixture(scope="module")
def plain():
    return draws.normal_module(lambda: GPT2(TINY, rngs=nnx.Rngs(0)), TINY.initializer_range)


@pytest.fixture(scope="module")
def ids():
    return draws.tokens(TINY.vocab_size, 2, 9)


def adapt(model, form="list", **options):
    """The model with adapters, added before or after its blocks are stacked."""
    adapted = nnx.eval_shape(lambda: GPT2(TINY, rngs=nnx.Rngs(0), **options))
    nnx.update(adapted, jax.tree.map(jnp.copy, nnx.state(model)))
    if form == "stacked before":
        adapted.stack()
    lora.add(adapted, RANK, rngs=nnx.Rngs(1))
    if form == "stacked after":
        adapted.stack()
    return adapted


def with_random_b(model):
    """As after some training, with A B as large as the kernels."""
    for i, (path, param) in enumerate(nnx.to_flat_state(nnx.state(model))):
        if path[-1] == "lora_b":
            param[...] = draws.normal(i, *param.shape, scale=0.1, dtype=param.dtype)
    return model


@nnx.jit
def forward(model, ids):
    return model(ids)[0]


def flat(model, *filters):
    return dict(nnx.to_flat_state(nnx.state(model, *filters)))


@FORMS
def test_new_adapters_change_nothing(plain, ids, form):
    expected = forward(plain, ids)
    np.testing.assert_allclose(forward(adapt(plain, form), ids), expected, atol=4e-6)


@pytest.mark.slow
@FORMS
def test_a_is_drawn_for_each_layer_as_kaiming_does_and_b_is_zero(plain, form):
    for path, param in flat(adapt(plain, form), nnx.LoRAParam).items():
        if path[-1] == "lora_b":
            assert (param[...] == 0).all()
            continue
        layers = param[...].reshape(-1, *param.shape[-2:])
        assert len({layer.tobytes() for layer in np.asarray(layers)}) == len(layers)
        # Uniform: variance 2 / inputs, fourth moment 9 / 5 of its square.
        inputs, variance = layers.shape[1], jnp.mean(layers**2)
        assert abs(variance * inputs / 2 - 1) < 5 * (0.8 / layers.size) ** 0.5


@pytest.mark.slow
@FORMS
def test_merged_weights_compute_what_the_adapted_did(plain, ids, form):
    adapted = with_random_b(adapt(plain, form))
    before = jax.tree.map(jnp.copy, nnx.state(adapted))
    merged = lora.merge(adapted)
    assert not flat(merged, nnx.LoRAParam)
    assert jnp.abs(forward(merged, ids) - forward(plain, ids)).max() > 1
    # Logits of up to 20 with an error of a few dozen roundings, through two blocks.
    np.testing.assert_allclose(forward(merged, ids), forward(adapted, ids), atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(adapted), before)

    if form != "list":
        merged.unstack()
    assert flat(merged).keys() == flat(plain).keys()
    changed = {path[-2:] for path, x in flat(merged).items() if (x[...] != flat(plain)[path]).any()}
    assert changed == {(name, "kernel") for name in ("c_attn", "c_proj", "c_fc")}


def test_merging_adds_the_product_rounded_once(plain):
    low = nnx.clone(plain)
    nnx.update(low, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(low)))
    layer = with_random_b(adapt(low)).h[1].mlp.c_fc
    assert layer.lora_a.dtype == layer.lora_b.dtype == jnp.bfloat16
    a, b, kernel = (
        np.asarray(x[...], np.float64)
        for x in (layer.lora_a, layer.lora_b, layer.base_module.kernel)
    )
    merged = np.asarray(lora.merge(nnx.List([layer]))[0].kernel[...])
    assert merged.dtype == jnp.bfloat16
    # Half a unit in the last of 8 bits, and what float32 does not tell apart.
    np.testing.assert_allclose(merged.astype(np.float64), kernel + a @ b, rtol=2**-8, atol=1e-6)


@pytest.mark.slow
def test_stacked_adapters_are_those_of_the_list(plain, ids):
    listed, stacked = (with_random_b(adapt(plain)) for _ in range(2))
    stacked.stack()
    np.testing.assert_allclose(forward(stacked, ids), forward(listed, ids), atol=1e-5)
    stacked, listed = lora.merge(stacked), lora.merge(listed)
    stacked.unstack()
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6),
        nnx.state(stacked),
        nnx.state(listed),
    )


@pytest.mark.parametrize("freeze_a", [False, True])
@FORMS
def test_all_but_the_adapted_kernels_is_trained(plain, form, freeze_a):
    adapted = adapt(plain, form)
    _, params, frozen = nnx.split(adapted, lora.trained(freeze_a), ...)

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    kernels, a, b = (
        TINY.n_layer * sum(size(inputs, outputs) for inputs, outputs in SIZES)
        for size in (lambda n, m: n * m, lambda n, _: n * RANK, lambda _, m: RANK * m)
    )
    assert count(frozen) == kernels + a * freeze_a
    assert count(params) == count(nnx.state(plain)) - kernels + b + a * (not freeze_a)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "checkpoint"), [("list", False), ("stacked after", True), ("stacked before", False)]
)
def test_a_step_leaves_the_adapted_kernels_alone(plain, ids, form, checkpoint):
    adapted = with_random_b(adapt(plain, form, checkpoint=checkpoint))
    before = jax.tree.map(jnp.copy, flat(adapted))
    optimizer = nnx.Optimizer(adapted, optax.sgd(0.1), wrt=lora.trained())

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(ids[:, :-1])[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        grads = nnx.grad(loss, argnums=nnx.DiffState(0, lora.trained()))(model)
        optimizer.update(model, grads)
        return grads

    grads = dict(nnx.to_flat_state(step(adapted, optimizer)))
    for path, param in flat(adapted).items():
        frozen = path[-2:] == ("base_module", "kernel")
        assert frozen == (path not in grads)
        assert (param[...] == before[path][...]).all() == frozen, path


@pytest.mark.slow
@pytest.mark.parametrize(("form", "checkpoint"), [("list", False), ("stacked after", True)])
def test_adapters_compute_in_the_dtype_of_their_layer(plain, ids, form, checkpoint):
    adapted = with_random_b(adapt(plain, form, dtype=jnp.bfloat16, checkpoint=checkpoint))
    assert nnx.eval_shape(lambda model: model.features(ids)[0], adapted).dtype == jnp.bfloat16
    logits, exact = forward(adapted, ids), forward(with_random_b(adapt(plain, form)), ids)
    # Each of a few dozen steps rounds by up to 2⁻⁹; they add up like a random walk.
    error = jnp.sqrt(jnp.mean((logits - exact) ** 2) / jnp.mean(exact**2))
    assert 2**-10 < error < 2**-5


def test_merged_models_are_saved_as_any_other(plain, tmp_path):
    merged = lora.merge(with_random_b(adapt(plain, "stacked after")))
    checkpoints.save(merged, tmp_path / "model")
    loaded = checkpoints.load(tmp_path / "model", GPT2, stacked=True)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(merged))


def test_layers_are_chosen_by_the_path_of_their_kernel(plain):
    adapted = nnx.clone(plain)
    lora.add(
        adapted,
        RANK,
        rngs=nnx.Rngs(0),
        where=lambda path, leaf: "mlp" in jax.tree_util.keystr(path),
    )
    assert {path[2:4] for path in flat(adapted, nnx.LoRAParam)} == {
        ("mlp", "c_fc"),
        ("mlp", "c_proj"),
    }


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank must be at least 1, got rank=0"),
        (16, r"rank=16 saves nothing in h\.0\.attn\.c_attn"),
    ],
)
def test_a_rank_that_is_none_or_saves_nothing_is_refused(plain, rank, message):
    adapted = nnx.clone(plain)
    with pytest.raises(ValueError, match=message):
        lora.add(adapted, rank, rngs=nnx.Rngs(0))
    assert not flat(adapted, nnx.LoRAParam)
    with pytest.raises(ValueError, match="where selects none"):
        lora.add(adapted, 1, rngs=nnx.Rngs(0), where=lambda path, leaf: False)
