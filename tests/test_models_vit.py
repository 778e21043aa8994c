"""`models.vit` against transformers, and what checkpoints and florax need of it."""

import dataclasses
import functools
import json
from pathlib import Path

import draws
import extras
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

extras.need("examples")

import safetensors.numpy
from flax import nnx

import florax
from florax_examples.models import checkpoints
from florax_examples.models.vit import PRESETS, ViT, ViTConfig, interpolate_positions

REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "vit"
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason=f"needs the reference model in {REFERENCE}"
)


# Initial weights so large that attention matters.
TINY = ViTConfig(
    image_size=(8, 12),
    patch_size=4,
    num_channels=2,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    initializer_range=0.3,
    num_labels=5,
)


@pytest.fixture(scope="module")
def model():
    return draws.normal_module(lambda: ViT(TINY, rngs=nnx.Rngs(0)), TINY.initializer_range)


def variant(model, *, stacked=False, **options):
    """The same weights in another form."""
    other = nnx.eval_shape(lambda: ViT(TINY, rngs=nnx.Rngs(0), **options))
    weights = nnx.to_flat_state(nnx.state(model))
    dtype = options.get("param_dtype", jnp.float32)
    weights = [(path, x.replace(x[...].astype(dtype))) for path, x in weights]
    nnx.update(other, nnx.from_flat_state(weights))
    if stacked:
        other.stack()
    return other


@pytest.fixture(scope="module")
def pixels():
    return draws.normal(0, 2, 8, 12, 2)


def reference_config(name="config.json"):
    return ViTConfig.from_huggingface(json.loads((REFERENCE / name).read_text()))


# The reference.


@needs_reference
def test_model_agrees_with_transformers():
    graphdef, params = nnx.split(checkpoints.load(REFERENCE, ViT))
    expected = np.load(REFERENCE / "reference.npz")

    @jax.jit
    def forward(pixels):
        model = nnx.merge(graphdef, params)
        pixels = pixels.transpose(0, 2, 3, 1)  # torch has the channels first
        return model.features(pixels), model(pixels)

    # Thirty matrix products in float32, of numbers up to 5.
    close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=0)
    features, logits = forward(expected["pixel_values"])
    close(features, expected["last_hidden"])
    close(logits, expected["logits"])
    labels = jnp.asarray(expected["labels"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    close(losses.mean(), expected["loss"])
    close(forward(expected["big_pixel_values"])[1], expected["big_logits_interpolated"])


@needs_reference
def test_configs_of_transformers_4_and_5_are_read_alike():
    assert reference_config("config.json") == reference_config("config_4x.json")
    assert reference_config().num_labels == 7


# Other labels.


@pytest.mark.slow
def test_other_labels_get_a_new_classifier(model, tmp_path):
    checkpoints.save(model, tmp_path / "saved")
    config = dataclasses.replace(TINY, num_labels=3, id2label=("cat", "dog", "ox"))
    options = {"config": config, "fresh": ViT.new_head_tensors, "stacked": True}
    other = checkpoints.load(tmp_path / "saved", ViT, **options)
    assert other.classifier.kernel.shape == (16, 3)
    assert (other.classifier.kernel[...] != 0).all()
    other.unstack()
    del other.classifier, (expected := variant(model)).classifier
    jax.tree.map(np.testing.assert_array_equal, nnx.state(other), nnx.state(expected))


@pytest.mark.slow
def test_base_model_is_loaded_without_its_pooler(model, tmp_path):
    checkpoints.save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    base = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    del base["classifier.weight"], base["classifier.bias"]
    base |= {"pooler.dense.weight": np.ones((16, 16)), "pooler.dense.bias": np.ones(16)}
    safetensors.numpy.save_file(base, file)

    with pytest.raises(checkpoints.CheckpointError, match=r"lacks .*classifier"):
        checkpoints.load(tmp_path, ViT)
    loaded = checkpoints.load(tmp_path, ViT, fresh=ViT.new_head_tensors)
    np.testing.assert_array_equal(loaded.cls_token, model.cls_token)


# Sizes and settings.


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("google/vit-base-patch16-224", 86_567_656),
        ("google/vit-large-patch16-224", 304_326_632),
        # The classifier has 21,843 labels in the place of 1,000.
        ("google/vit-base-patch16-224-in21k", 86_567_656 + 20_843 * 769),
        ("google/vit-large-patch16-224-in21k", 304_326_632 + 20_843 * 1025),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, count):
    model = nnx.eval_shape(lambda: ViT(PRESETS[name], rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == count


@pytest.mark.parametrize(
    "config",
    [*PRESETS.values(), TINY, dataclasses.replace(TINY, id2label=tuple("abcde"), qkv_bias=False)],
)
def test_written_settings_are_read_back(config):
    written = json.loads(json.dumps(config.to_huggingface()))
    assert ViTConfig.from_huggingface(written) == config


def test_number_of_labels_is_that_of_their_names_or_two():
    def labels(**config):
        return ViTConfig.from_huggingface(config).num_labels

    assert labels() == 2
    assert labels(num_labels=9) == 9
    assert labels(id2label={"1": "dog", "0": "cat", "2": "ox"}) == 3
    config = ViTConfig.from_huggingface({"id2label": {"1": "dog", "0": "cat", "2": "ox"}})
    assert config.id2label == ("cat", "dog", "ox")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
        ({"id2label": {"1": "a", "2": "b"}}, r"id2label must name labels 0, 1, .*'1', '2'"),
        ({"hidden_size": 30}, "hidden_size=30, num_attention_heads=12"),
        ({"image_size": 225}, "225x225 pixels with patch_size=16"),
    ],
)
def test_settings_that_the_model_does_not_have_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig.from_huggingface(config)


def test_names_must_be_as_many_as_labels():
    with pytest.raises(ValueError, match="id2label names 3 labels, got num_labels=5"):
        dataclasses.replace(TINY, id2label=("a", "b", "c"))


# The forms of the model.


@pytest.mark.slow
def test_stacked_or_checkpointed_layers_have_the_same_values_and_gradients(model, pixels):
    @nnx.jit
    def loss_and_gradient(model):
        return nnx.value_and_grad(lambda model: (model(pixels) ** 2).sum())(model)

    plain_loss, plain_grads = loss_and_gradient(model)
    plain_grads = nnx.to_pure_dict(plain_grads)
    layers = jax.tree.map(lambda *x: jnp.stack(x), *plain_grads["layers"].values())
    # The same sums in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    for stacked, expected in ((False, plain_grads), (True, {**plain_grads, "layers": layers})):
        for checkpoint in (False, True):
            loss, grads = loss_and_gradient(variant(model, stacked=stacked, checkpoint=checkpoint))
            close(loss, plain_loss)
            jax.tree.map(close, nnx.to_pure_dict(grads), expected)


def test_unstacking_undoes_stacking(model):
    other = variant(model, stacked=True)
    other.unstack()
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(other), nnx.state(model)))


@pytest.mark.parametrize("stacked", [False, True])
def test_florax_compresses_attention_and_feed_forward_matrices_only(model, stacked):
    params = nnx.state(variant(model, stacked=stacked))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    chosen = {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        for path, leaf in leaves
        if florax.attention_and_feed_forward(path, leaf)
    }
    matrices = [f"attention/{name}" for name in ("query", "key", "value", "output")]
    matrices += [f"feed_forward/{name}" for name in ("intermediate", "output")]
    layers = ["layers"] if stacked else [f"layers/{i}" for i in range(TINY.num_hidden_layers)]
    assert chosen == {f"{layer}/{matrix}/kernel" for layer in layers for matrix in matrices}


@pytest.mark.slow
def test_bfloat16_computes_nearly_the_same(model, pixels):
    expected = nnx.jit(ViT.__call__)(model, pixels)
    for options in ({"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}):
        # A scan wants one dtype for what goes from layer to layer.
        half = variant(model, stacked=True, **options)
        logits = nnx.jit(ViT.__call__)(half, pixels)
        assert logits.dtype == jnp.float32
        # A bfloat16 has 8 bits: about ten roundings in a row are off by a few percent.
        assert jnp.linalg.norm(logits - expected) < 0.1 * jnp.linalg.norm(expected)


@pytest.mark.slow
def test_an_image_is_seen_through_all_its_patches(model, pixels):
    @nnx.jit
    def gradient(model, pixels):
        return jax.grad(lambda pixels: (model(pixels) ** 2).sum())(pixels)

    assert (gradient(model, pixels) != 0).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 8, 12), "float32", r"\(batch, height, width, num_channels=2\), got \(1, 8, 12\)"),
        ((1, 2, 8, 12), "float32", r"num_channels=2\), got \(1, 2, 8, 12\)"),
        ((1, 8, 12, 2), "uint8", "floating numbers, got uint8"),
        ((1, 8, 10, 2), "float32", "8x10 pixels with patch_size=4"),
        ((1, 0, 12, 2), "float32", "0x12 pixels"),
    ],
)
def test_what_is_no_image_is_refused(model, shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        model(jnp.zeros(shape, dtype))


# The interpolation.


def test_positions_of_twice_the_size_have_the_weights_of_a_cubic_kernel():
    # At a quarter between two of the four points around, with a = -0.75; derived by hand.
    quarter = np.array([-0.10546875, 0.87890625, 0.26171875, -0.03515625], np.float32)
    positions = draws.normal(0, 1, 1 + 6, 3)
    larger = interpolate_positions(positions, (6, 1), (12, 1))
    np.testing.assert_array_equal(larger[:, 0], positions[:, 0])  # the class token's
    np.testing.assert_allclose(larger[0, 1 + 5], quarter @ positions[0, 2:6], rtol=1e-5, atol=1e-6)


def test_flat_positions_stay_flat_and_the_same_grid_is_left_alone():
    flat = jnp.ones((1, 1 + 12, 2))
    for new_grid in ((3, 4), (5, 9), (2, 1)):
        np.testing.assert_allclose(interpolate_positions(flat, (3, 4), new_grid), 1, rtol=1e-6)
    positions = draws.normal(0, 1, 1 + 12, 2)
    assert interpolate_positions(positions, (3, 4), (3, 4)) is positions
