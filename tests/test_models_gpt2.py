"""`models.gpt2`: the equations of the architecture, its caches and stacks, published outputs."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import draws
import extras
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

extras.need("examples")

from flax import nnx

import florax
from florax_examples.models import checkpoints
from florax_examples.models.generation import greedy
from florax_examples.models.gpt2 import GPT2, PRESETS, GPT2Config

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"needs {REFERENCE}")


# Initial weights so large that attention matters and that no two logits are close.
TINY = GPT2Config(
    vocab_size=50, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
)


def build(config, **options):
    scale = config.initializer_range
    return draws.normal_module(lambda: GPT2(config, rngs=nnx.Rngs(0), **options), scale)


def in_form(model, stacked, **options):
    """The same weights in a model with other options, stacked or not."""
    other = nnx.eval_shape(lambda: GPT2(model.config, rngs=nnx.Rngs(0), **options))
    nnx.update(other, jax.tree.map(jnp.copy, nnx.state(model)))
    if stacked:
        other.stack()
    return other


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, ids, options):
    return nnx.merge(graphdef, params)(ids, **options)


def forward(model, ids, **options):
    return _forward(*nnx.split(model), jnp.asarray(ids), options)[0]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _decode(graphdef, params, prompt, mask, new_tokens, eos):
    model = nnx.merge(graphdef, params)
    cache = model.init_cache(len(prompt), prompt.shape[1] + new_tokens)
    return greedy(model, cache, prompt, mask, new_tokens, eos, pad=0)


def decode(model, prompt, mask, new_tokens, eos=-1):
    return _decode(*nnx.split(model), prompt, mask, new_tokens, eos)


@pytest.fixture(scope="module")
def model():
    return build(TINY)


@pytest.fixture(scope="module")
def untied():
    return build(dataclasses.replace(TINY, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def ids():
    return draws.tokens(TINY.vocab_size, 2, 9)


# The sizes and the settings.


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(name, parameters):
    # A layer counts as often as there are layers: to trace all of them takes long.
    one = dataclasses.replace(PRESETS[name], n_layer=1)
    model = nnx.eval_shape(lambda: GPT2(one, rngs=nnx.Rngs(0)))
    total, layer = (
        sum(x.size for x in jax.tree.leaves(nnx.state(module))) for module in (model, model.h[0])
    )
    assert total + (PRESETS[name].n_layer - 1) * layer == parameters


@pytest.mark.slow
def test_initial_weights_are_gpt2s():
    config = GPT2Config(vocab_size=500, n_positions=400, n_embd=128, n_layer=2, n_head=4)
    config = dataclasses.replace(config, tie_word_embeddings=False)
    model = nnx.jit(lambda: GPT2(config, rngs=nnx.Rngs(0)))()
    block = model.h[1]
    for kernel, scale in [
        (model.wte.embedding, 0.02),
        (model.wpe.embedding, 0.02),
        (model.lm_head.kernel, 0.02),
        (block.attn.c_attn.kernel, 0.02),
        (block.mlp.c_fc.kernel, 0.02),
        (block.attn.c_proj.kernel, 0.02 / math.sqrt(2 * 2)),
        (block.mlp.c_proj.kernel, 0.02 / math.sqrt(2 * 2)),
    ]:
        # The standard deviation of n samples is known to about one part in sqrt(2 n).
        assert abs(jnp.std(kernel[...]) / scale - 1) < 5 / math.sqrt(2 * kernel.size)


@pytest.mark.parametrize("stacked", [False, True])
def test_florax_finds_the_matrices_of_attention_and_feed_forward(model, stacked):
    params = nnx.to_pure_dict(nnx.state(in_form(model, stacked)))
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    found = {
        tuple(entry.key for entry in path if not isinstance(entry.key, int))
        for path, leaf in flat
        if florax.attention_and_feed_forward(path, leaf)
    }
    assert found == {
        *(("h", "attn", name, "kernel") for name in ("c_attn", "c_proj")),
        *(("h", "mlp", name, "kernel") for name in ("c_fc", "c_proj")),
    }


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        *PRESETS.values(),
        dataclasses.replace(TINY, n_inner=40, eos_token_id=(3, 4), pad_token_id=0),
        dataclasses.replace(TINY, tie_word_embeddings=False, eos_token_id=None),
    ],
)
def test_config_survives_hugging_faces_json(config):
    written = json.loads(json.dumps(config.to_huggingface()))
    assert GPT2Config.from_huggingface(written) == config


def test_absent_settings_are_those_of_the_format():
    assert GPT2Config.from_huggingface({}) == GPT2Config()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_function": "relu"}, "activation_function must be 'gelu_new' or .* 'relu'"),
        ({"scale_attn_weights": False}, "scale_attn_weights must be True, got False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx must be False, got True"),
        ({"add_cross_attention": True}, "add_cross_attention must be False, got True"),
        ({"n_embd": 16, "n_head": 3}, "n_embd=16 and n_head=3"),
    ],
)
def test_what_is_not_implemented_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config.from_huggingface(settings)


def test_what_has_no_positions_is_refused(model):
    for length in (0, 25):
        with pytest.raises(ValueError, match=f"1 to n_positions=24, got {length}"):
            model(jnp.zeros((1, length), jnp.int32))
        with pytest.raises(ValueError, match=f"1 to n_positions=24, got {length}"):
            model.init_cache(1, length)
    with pytest.raises(ValueError, match=r"positions \+ 1 must be 1 to n_positions=24, got 25"):
        model(jnp.zeros((1, 1), jnp.int32), positions=jnp.array([[24]]))


# The equations.


@pytest.mark.slow
def test_tied_head_is_the_embedding_and_another_is_not(model, untied, ids):
    assert not hasattr(model, "lm_head")
    for own, head in ((model, model.wte.embedding[...].T), (untied, untied.lm_head.kernel[...])):
        features, _ = nnx.jit(lambda model: model.features(ids))(own)
        np.testing.assert_allclose(forward(own, ids), features @ head, atol=2e-6)


def test_norms_are_exact_where_the_mean_is_large(model):
    x = 1000 + np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    expected = x.astype(np.float64) - x.mean(axis=1, keepdims=True, dtype=np.float64)
    expected /= np.sqrt((expected**2).mean(axis=1, keepdims=True) + 1e-5)
    for norm in (model.ln_f, model.h[0].ln_1, model.h[0].ln_2):
        # The mean is known to 2⁻²⁴ of itself, or 6e-5.
        scaled = expected * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
        np.testing.assert_allclose(norm(x), scaled, atol=3e-4)


def test_no_token_sees_a_later_one(model, ids):
    changed = ids.at[0, 6].add(1)
    difference = jnp.abs(forward(model, ids) - forward(model, changed)).max(axis=-1)[0]
    assert (difference[:6] == 0).all()
    assert (difference[6:] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_padding_changes_nothing(model, ids, left, cached):
    padding = ((0, 0), (3, 0) if left else (0, 3))
    mask = jnp.pad(jnp.ones((1, 9), bool), padding)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    cache = model.init_cache(1, 9) if cached else None
    ids = ids[:1]
    padded = forward(model, jnp.pad(ids, padding), positions=positions, mask=mask, cache=cache)
    np.testing.assert_allclose(padded[mask], forward(model, ids)[0], atol=4e-6)


@pytest.mark.slow
@pytest.mark.parametrize("left", [True, False])
def test_greedy_with_a_cache_equals_the_whole_forward_pass_for_every_token(model, left):
    lengths, new_tokens = [3, 7, 5], 12
    longest = max(lengths)
    prompts = np.random.default_rng(0).integers(1, TINY.vocab_size, (3, longest))

    expected = np.zeros((3, new_tokens), np.int32)
    for prompt, length, written in zip(prompts, lengths, expected, strict=True):
        ids = np.zeros((1, longest + new_tokens), np.int32)  # no token sees the zeros behind it
        ids[0, :length] = prompt[:length]
        for i in range(new_tokens):
            written[i] = ids[0, length + i] = np.argmax(forward(model, ids)[0, length + i - 1])

    padded = np.zeros((3, longest), np.int32)
    for row, prompt, length in zip(padded, prompts, lengths, strict=True):
        row[longest - length if left else 0 :][:length] = prompt[:length]
    np.testing.assert_array_equal(decode(model, padded, padded != 0, new_tokens), expected)

    eos = expected[0, 4]
    ended = np.cumsum(expected == eos, axis=1) - (expected == eos) > 0
    np.testing.assert_array_equal(
        decode(model, padded, padded != 0, new_tokens, eos), np.where(ended, 0, expected)
    )


# Stacks, checkpoints, dtypes.


@pytest.mark.slow
def test_stacked_blocks_give_the_same_logits_and_the_same_translations(model, ids):
    stacked = in_form(model, stacked=True)
    assert stacked.h.attn.c_attn.kernel.shape == (TINY.n_layer, 16, 48)
    np.testing.assert_allclose(forward(stacked, ids), forward(model, ids), atol=4e-6)

    mask = jnp.ones(ids.shape, bool)
    written = decode(stacked, ids, mask, 3)
    np.testing.assert_array_equal(written, decode(model, ids, mask, 3))
    for form in (model, stacked):
        cache = form.init_cache(5, 7)
        assert {x.shape[form.cache_batch_axis] for x in jax.tree.leaves(cache)} == {5}

    stacked.unstack()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(stacked))


def test_decoding_of_stacked_blocks_is_one_scan_over_weights_and_caches(model):
    stacked = in_form(model, stacked=True)
    graphdef, params = nnx.split(stacked)

    def step(params, cache):
        positions = jnp.zeros((1, 1), jnp.int32)
        return nnx.merge(graphdef, params)(positions, positions=positions, cache=cache)

    equations = jax.make_jaxpr(step)(params, stacked.init_cache(1, 4)).eqns
    scans = [equation for equation in equations if equation.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [TINY.n_layer]
    # The twelve arrays of a block's weights, keys and values: whole, no layer is taken out before.
    layered = [x for x in scans[0].invars if x.aval.shape[:1] == (TINY.n_layer,)]
    assert len(layered) == 12 + 2


@pytest.mark.slow
def test_stacked_and_checkpointed_models_have_the_same_values_and_gradients(model, ids):
    def values_and_gradients(stacked, checkpoint):
        graphdef, params = nnx.split(in_form(model, stacked, checkpoint=checkpoint))

        def loss(params):
            logits, _ = nnx.merge(graphdef, params)(ids[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        value, grads = jax.jit(jax.value_and_grad(loss))(params)
        other = nnx.merge(graphdef, grads)
        if stacked:
            other.unstack()
        return value, nnx.to_pure_dict(nnx.state(other))

    expected = values_and_gradients(False, False)
    for form in ((True, False), (False, True), (True, True)):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4),
            values_and_gradients(*form),
            expected,
        )


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_checkpointed_blocks_keep_only_what_enters_them(model, stacked):
    def kept(checkpoint):
        graphdef, params = nnx.split(in_form(model, stacked, checkpoint=checkpoint))
        ids = jnp.zeros((3, 7), jnp.int32)

        def loss(params):
            return nnx.merge(graphdef, params)(ids)[0].sum()

        pull = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        return {x.shape for x in jax.tree.leaves(pull)}

    layers = (TINY.n_layer,) if stacked else ()
    inside = (*layers, 3, 7, 64)  # of the feed-forward layer, of width 4 * 16
    assert inside in kept(False)
    assert inside not in kept(True)
    assert (*layers, 3, 7, 16) in kept(True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "stacked", "kept"), [(True, True, jnp.float32), (False, False, jnp.bfloat16)]
)
def test_bfloat16_computes_alike_and_gives_logits_in_float32(
    model, untied, ids, tied, stacked, kept
):
    exact = model if tied else untied
    low = in_form(exact, stacked, dtype=jnp.bfloat16)
    nnx.update(low, jax.tree.map(lambda x: x.astype(kept), nnx.state(low)))
    cache = low.init_cache(2, 9)
    positions = jnp.broadcast_to(jnp.arange(9), ids.shape)
    logits = forward(low, ids, positions=positions, cache=cache)
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16)).any()

    # Each of a few dozen steps rounds by up to 2⁻⁹; they add up like a random walk.
    expected = forward(exact, ids)
    error = jnp.sqrt(jnp.mean((logits - expected) ** 2) / jnp.mean(expected**2))
    assert 2**-10 < error < 2**-5


def test_parameters_are_kept_in_the_dtype_asked_for():
    model = nnx.eval_shape(lambda: GPT2(TINY, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}


# Published outputs.


@needs_reference
def test_configs_of_both_versions_of_transformers_say_the_same():
    folder = REFERENCE / "gpt2"
    old = json.loads((folder / "config_4x.json").read_text())
    assert GPT2Config.from_huggingface(old) == checkpoints.read_config(folder, GPT2)


@pytest.mark.slow
@needs_reference
@pytest.mark.parametrize("stacked", [False, True])
def test_outputs_are_those_of_transformers(stacked):
    expected = np.load(REFERENCE / "gpt2" / "reference.npz")
    model = checkpoints.load(REFERENCE / "gpt2", GPT2, stacked=stacked)

    def check(logits, array, mask=np.s_[:]):
        np.testing.assert_allclose(logits[mask], expected[array][mask], atol=4e-5, rtol=0)

    check(forward(model, expected["input_ids"]), "logits")
    for side in ("left", "right"):
        ids, positions = expected[f"{side}_input_ids"], expected[f"{side}_position_ids"]
        mask = expected[f"{side}_mask"].astype(bool)
        logits = forward(model, ids, mask=mask)
        check(logits, f"{side}_logits_default_positions", mask)
        for cache in (None, model.init_cache(*ids.shape)):
            logits = forward(model, ids, positions=positions, mask=mask, cache=cache)
            check(logits, f"{side}_logits", mask)

    labels = expected["right_labels"][:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], np.maximum(labels, 0))
    np.testing.assert_allclose(losses[labels != -100].mean(), expected["right_loss"], rtol=1e-5)

    ids, mask = expected["left_input_ids"], expected["left_mask"].astype(bool)
    for array, eos in (("greedy_ids", -1), ("greedy_eos_ids", model.config.eos_token_id)):
        np.testing.assert_array_equal(decode(model, ids, mask, 20, eos), expected[array])
