"""`models.llama`: the equations of the architecture, and the outputs of published checkpoints."""

import dataclasses
import functools
import gzip
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

from flax import nnx

import florax
from florax_examples.models import checkpoints
from florax_examples.models.generation import greedy
from florax_examples.models.llama import (
    PRESETS,
    Llama,
    LlamaConfig,
    RopeScaling,
    _frequencies,
    _rotate,
)

SHARED = Path(__file__).parents[2] / "shared"
REFERENCE = SHARED / "reference"
DATA = SHARED / "data"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"needs {REFERENCE}")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs {DATA}")

# Initial weights so large that attention matters and that no two logits are close.
TINY = LlamaConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=24,
    rms_norm_eps=0.1,
    initializer_range=0.3,
    attention_bias=True,
    mlp_bias=True,
)
SCALED = RopeScaling(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


def build(config):
    return draws.normal_module(lambda: Llama(config, rngs=nnx.Rngs(0)), config.initializer_range)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, ids, options):
    return nnx.merge(graphdef, params)(ids, **options)


def forward(model, ids, **options):
    logits, cache = _forward(*nnx.split(model), jnp.asarray(ids), options)
    return (logits, cache) if options.get("cache") is not None else logits


@pytest.fixture(scope="module")
def model():
    return build(TINY)


@pytest.fixture(scope="module")
def ids():
    return draws.tokens(TINY.vocab_size, 2, 9)


# The sizes.


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("60m", 58_073_600),
        ("130m", 134_105_856),
        ("350m", 367_969_280),
        ("1b", 1_339_082_752),
        ("7b", 6_738_415_616),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(name, parameters):
    # A layer counts as often as there are layers: to trace all of them takes long.
    one = dataclasses.replace(PRESETS[name], num_hidden_layers=1)
    model = nnx.eval_shape(lambda: Llama(one, rngs=nnx.Rngs(0)))
    total, layer = (
        sum(x.size for x in jax.tree.leaves(nnx.state(module)))
        for module in (model, model.layers[0])
    )
    assert total + (PRESETS[name].num_hidden_layers - 1) * layer == parameters


def test_presets_cover_the_sizes_of_c4_and_a_pretrained_model():
    assert set(PRESETS) == {"60m", "130m", "350m", "1b", "7b", "HuggingFaceTB/SmolLM2-135M"}
    assert PRESETS["7b"] == dataclasses.replace(LlamaConfig(), bos_token_id=0, eos_token_id=1)


@pytest.mark.slow
def test_initial_weights_are_normal():
    config = dataclasses.replace(TINY, hidden_size=160, num_hidden_layers=1, initializer_range=0.02)

    @jax.jit
    def scores():  # the standard deviation of n samples is known to about one part in sqrt(2 n)
        params = nnx.to_flat_state(nnx.state(Llama(config, rngs=nnx.Rngs(0))))
        matrices = {path: x[...] for path, x in params if x.ndim == 2}
        return {path: (x.std() / 0.02 - 1) * np.sqrt(2 * x.size) for path, x in matrices.items()}

    for path, score in scores().items():
        assert abs(score) < 5, path


def test_tensors_have_the_names_of_the_checkpoints():
    config = dataclasses.replace(TINY, num_hidden_layers=1)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model))
    linear = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    norms = ["input_layernorm", "post_attention_layernorm"]
    assert {Llama.tensor_name(path) for path, _ in flat} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"model.layers.0.{name}.weight" for name in linear + norms),
        *(f"model.layers.0.{name}.bias" for name in linear),
    }
    for path, param in flat:
        assert Llama.tensor_axes(path, param.ndim) == {
            "kernel": (1, 0),  # torch has rows of outputs
            "embedding": (0, 1),
            "scale": (0,),
            "bias": (0,),
        }[path[-1]]  # fmt: skip


@pytest.mark.parametrize("stacked", [False, True])
def test_florax_finds_the_matrices_of_attention_and_feed_forward(model, stacked):
    model = nnx.clone(model)
    if stacked:
        model.stack()
    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    found = {
        tuple(entry.key for entry in path if not isinstance(entry.key, int))
        for path, leaf in flat
        if florax.attention_and_feed_forward(path, leaf)
    }
    assert found == {
        *(("layers", "self_attn", f"{name}_proj", "kernel") for name in "qkvo"),
        *(("layers", "mlp", f"{name}_proj", "kernel") for name in ("gate", "up", "down")),
    }


# The settings.


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        *PRESETS.values(),
        dataclasses.replace(TINY, rope_scaling=SCALED, eos_token_id=(3, 4), rope_theta=5e5),
        dataclasses.replace(TINY, attention_bias=False, mlp_bias=False, eos_token_id=None),
    ],
)
def test_config_survives_hugging_faces_json(config):
    written = json.loads(json.dumps(config.to_huggingface()))
    resolved = dataclasses.replace(
        config, head_dim=config.head_size, num_key_value_heads=config.key_value_heads
    )
    assert LlamaConfig.from_huggingface(written) == resolved
    for unread in ("rope_parameters", "rope_scaling"):  # one of them is enough
        fields = {name: value for name, value in written.items() if name != unread}
        assert LlamaConfig.from_huggingface(fields) == resolved


def test_absent_settings_are_those_of_the_format():
    config = LlamaConfig.from_huggingface({"hidden_size": 48, "num_attention_heads": 6})
    assert config == LlamaConfig(hidden_size=48, num_attention_heads=6)
    assert (config.key_value_heads, config.head_size, config.rope_theta) == (6, 8, 10000.0)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type .* got 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type .* got 'yarn'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "'llama3' needs low_freq_factor",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor .* got 0.5"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads, got 6 and 4"),
        ({"hidden_size": 50, "num_attention_heads": 6}, "is not given, got 50 and 6"),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
    ],
)
def test_what_is_not_implemented_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_huggingface(settings)


def test_lengths_out_of_range_are_refused(model):
    for length in (0, 25):
        with pytest.raises(ValueError, match=f"max_position_embeddings=24, got {length}"):
            model(jnp.zeros((1, length), jnp.int32))
        with pytest.raises(ValueError, match=f"max_position_embeddings=24, got {length}"):
            model.init_cache(1, length)


# The equations.


def test_rotation_multiplies_complex_numbers():
    x = draws.normal(0, 1, 5, 2, 8)
    angles = jax.random.uniform(jax.random.key(1), (1, 5, 1, 4), maxval=6.0)
    turned = _rotate(x, jnp.cos(angles), jnp.sin(angles))
    expected = (x[..., :4] + 1j * x[..., 4:]) * jnp.exp(1j * angles)
    np.testing.assert_allclose(turned[..., :4], expected.real, atol=1e-6)
    np.testing.assert_allclose(turned[..., 4:], expected.imag, atol=1e-6)


def test_frequencies_fall_geometrically():
    config = LlamaConfig(head_dim=8, rope_theta=10000.0)
    np.testing.assert_allclose(_frequencies(config), [1, 0.1, 0.01, 0.001], rtol=1e-6)


def test_llama3_slows_long_wavelengths_down():
    config = LlamaConfig(head_dim=64)
    plain = _frequencies(config)
    ratio = _frequencies(dataclasses.replace(config, rope_scaling=SCALED)) / plain
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 32 / 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelength > 32 / 1], 1 / 8, rtol=1e-6)
    between = (wavelength > 32 / 4) & (wavelength < 32)
    assert between.any()
    smooth = (32 / wavelength[between] - 1) / (4 - 1)
    np.testing.assert_allclose(ratio[between], (1 - smooth) / 8 + smooth, rtol=1e-5)


@pytest.mark.slow
def test_only_distances_between_positions_matter(model, ids):
    shifted = jnp.broadcast_to(jnp.arange(9) + 11, ids.shape)
    # Rounding of angles up to 20, through three layers.
    np.testing.assert_allclose(
        forward(model, ids, positions=shifted), forward(model, ids), atol=5e-5
    )
    spread = 2 * jnp.broadcast_to(jnp.arange(9), ids.shape)
    assert jnp.abs(forward(model, ids, positions=spread) - forward(model, ids)).max() > 0.1


def test_logits_are_those_of_the_equations(model, ids):
    params = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model)))

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 0.1) * scale["scale"]

    def linear(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    def heads(x, layer):
        return linear(x, layer).reshape(9, -1, 8).swapaxes(0, 1)  # (heads, T, D)

    def rotated(x):
        angles = np.arange(9)[:, None] / 10000.0 ** (np.arange(4) / 4)
        return (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)

    x = params["embed_tokens"]["embedding"][ids[0]]
    for layer in params["layers"].values():
        attention, y = layer["self_attn"], norm(x, layer["input_layernorm"])
        q, k = (rotated(heads(y, attention[name])) for name in ("q_proj", "k_proj"))
        k, v = (array.repeat(2, axis=0) for array in (k, heads(y, attention["v_proj"])))
        scores = (q @ k.conj().swapaxes(1, 2)).real / np.sqrt(8)
        weights = np.tril(np.exp(scores))
        y = weights / weights.sum(axis=-1, keepdims=True) @ v
        x = x + linear(y.swapaxes(0, 1).reshape(9, -1), attention["o_proj"])
        mlp, y = layer["mlp"], norm(x, layer["post_attention_layernorm"])
        gate = linear(y, mlp["gate_proj"])
        y = gate / (1 + np.exp(-gate)) * linear(y, mlp["up_proj"])
        x = x + linear(y, mlp["down_proj"])
    expected = norm(x, params["norm"]) @ params["lm_head"]["kernel"]
    np.testing.assert_allclose(forward(model, ids)[0], expected, atol=2e-5)


@pytest.mark.slow
def test_tied_head_is_the_embedding(ids):
    model = build(dataclasses.replace(TINY, tie_word_embeddings=True))
    assert not hasattr(model, "lm_head")
    features, _ = nnx.jit(lambda model: model.features(ids))(model)
    expected = features @ model.embed_tokens.embedding[...].T
    np.testing.assert_allclose(forward(model, ids), expected, atol=1e-5)


def test_no_token_sees_a_later_one(model, ids):
    changed = ids.at[0, 6].add(1)
    difference = jnp.abs(forward(model, ids) - forward(model, changed)).max(axis=-1)[0]
    assert (difference[:6] == 0).all()
    assert (difference[6:] > 0).all()


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_padding_changes_nothing(model, ids, left, cached, shifted):
    padding = ((0, 0), (3, 0) if left else (0, 3))
    mask = jnp.pad(jnp.ones((1, 9), bool), padding)
    options = {"mask": mask}
    if cached or shifted:
        options["positions"] = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    if cached:
        options["cache"] = model.init_cache(1, 9)
    padded = forward(model, jnp.pad(ids[:1], padding), **options)
    padded = padded[0] if cached else padded
    np.testing.assert_allclose(padded[mask], forward(model, ids)[0], atol=2e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_token_by_token_with_a_cache_is_all_at_once(model, ids, stacked):
    expected = forward(model, ids)
    model = nnx.clone(model)
    if stacked:
        model.stack()
    cache = model.init_cache(2, 9)
    assert all(x.shape[model.cache_batch_axis] == 2 for x in jax.tree.leaves(cache))
    for t in range(9):
        positions = jnp.full((2, 1), t)
        logits, cache = forward(model, ids[:, t : t + 1], positions=positions, cache=cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=2e-5)


@pytest.mark.slow
def test_stacked_and_checkpointed_models_have_the_same_values_and_gradients(model, ids):
    def values_and_gradients(stacked, checkpoint):
        other = nnx.eval_shape(lambda: Llama(TINY, rngs=nnx.Rngs(0), checkpoint=checkpoint))
        nnx.update(other, nnx.state(model))
        if stacked:
            other.stack()
        graphdef, params = nnx.split(other)

        def loss(params):
            logits, _ = nnx.merge(graphdef, params)(ids)
            labels = jnp.roll(ids, -1, axis=1)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

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


@pytest.mark.parametrize("stacked", [False, True])
def test_checkpointed_layers_keep_only_what_enters_them(stacked):
    def kept(checkpoint):
        def pull():
            model = Llama(TINY, rngs=nnx.Rngs(0), checkpoint=checkpoint)
            if stacked:
                model.stack()
            graphdef, params = nnx.split(model)
            ids = jnp.zeros((3, 7), jnp.int32)
            return jax.vjp(lambda params: nnx.merge(graphdef, params)(ids)[0], params)[1]

        return {x.shape[-3:] for x in jax.tree.leaves(jax.eval_shape(pull))}

    inside = (3, 7, 40)  # what the feed-forward layer multiplies
    assert inside in kept(checkpoint=False)
    assert inside not in kept(checkpoint=True)
    assert (3, 7, 24) in kept(checkpoint=True)


def test_unstacking_undoes_stacking(model):
    other = nnx.clone(model)
    other.stack()
    assert other.layers.mlp.up_proj.kernel.shape == (2, 24, 40)
    other.unstack()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(other), nnx.state(model))


@pytest.mark.slow
@pytest.mark.parametrize(("stacked", "kept"), [(False, jnp.float32), (True, jnp.bfloat16)])
def test_bfloat16_computes_alike_and_gives_logits_in_float32(model, ids, stacked, kept):
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": kept}
    low = nnx.eval_shape(lambda: Llama(TINY, rngs=nnx.Rngs(0), **dtypes))
    nnx.update(low, jax.tree.map(lambda x: x.astype(kept), nnx.state(model)))
    if stacked:
        low.stack()
    logits, cache = forward(low, ids, cache=low.init_cache(2, 9, jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(low))} == {jnp.dtype(kept)}
    assert logits.dtype == jnp.float32
    assert cache[0].dtype == jnp.bfloat16 if stacked else cache[0].key.dtype == jnp.bfloat16

    # Each of a few dozen steps rounds by up to 2⁻⁹; they add up like a random walk.
    exact = forward(model, ids)
    error = jnp.sqrt(jnp.mean((logits - exact) ** 2) / jnp.mean(exact**2))
    assert 2**-10 < error < 2**-5


# Published outputs.


@functools.partial(jax.jit, static_argnums=(0, 4))
def continue_greedily(graphdef, params, prompt, mask, new_tokens, eos):
    model = nnx.merge(graphdef, params)
    cache = model.init_cache(len(prompt), prompt.shape[1] + new_tokens)
    return greedy(model, cache, prompt, mask, new_tokens, eos, pad=0)


@pytest.mark.slow
@needs_reference
@pytest.mark.parametrize(
    ("name", "stacked"),
    [
        ("llama_gqa", False),
        ("llama_mha_tied", True),
        ("llama_rope_scaled", True),
    ],
)
def test_outputs_are_those_of_transformers(name, stacked):
    expected = np.load(REFERENCE / name / "reference.npz")
    model = checkpoints.load(REFERENCE / name, Llama, stacked=stacked)
    assert model.config.tie_word_embeddings == (name == "llama_mha_tied")

    def check(logits, array, mask=np.s_[:]):
        np.testing.assert_allclose(logits[mask], expected[array][mask], atol=4e-5, rtol=0)

    check(forward(model, expected["input_ids"]), "logits")
    if "long_input_ids" in expected:
        check(forward(model, expected["long_input_ids"]), "long_logits")
    for side in ("left", "right"):
        ids, positions = expected[f"{side}_input_ids"], expected[f"{side}_position_ids"]
        mask = expected[f"{side}_mask"].astype(bool)
        logits = forward(model, ids, mask=mask)
        check(logits, f"{side}_logits_default_positions", mask)
        if side == "right":
            labels = expected["right_labels"][:, 1:]
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1], np.maximum(labels, 0)
            )
            loss = losses[labels != -100].mean()
            np.testing.assert_allclose(loss, expected["right_loss"], rtol=1e-5)
        for options in ({}, {"cache": model.init_cache(*ids.shape)}):
            logits = forward(model, ids, positions=positions, mask=mask, **options)
            check(logits[0] if options else logits, f"{side}_logits", mask)

    split = nnx.split(model)
    prompt = expected["left_input_ids"], expected["left_mask"].astype(bool), 20
    eos = model.config.eos_token_id
    never = jax.tree.map(lambda token: -1, eos)
    for array, end in (("greedy_ids", never), ("greedy_eos_ids", eos)):
        np.testing.assert_array_equal(continue_greedily(*split, *prompt, end), expected[array])


@needs_reference
@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha_tied", "llama_rope_scaled"])
def test_old_config_files_describe_the_same_model(name):
    old, new = (
        LlamaConfig.from_huggingface(json.loads((REFERENCE / name / file).read_text()))
        for file in ("config_4x.json", "config.json")
    )
    resolved = {"head_dim": old.head_size, "num_key_value_heads": old.key_value_heads}
    assert dataclasses.replace(old, **resolved) == new


@pytest.mark.slow
@needs_data
def test_trained_model_tells_its_story():
    sentencepiece = pytest.importorskip("sentencepiece")
    vocabulary = DATA / "tokenizers" / "stories512" / "tok512.model"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    model = checkpoints.load(DATA / "weights_stories260k", Llama, stacked=True)
    graphdef, params = nnx.split(model)

    bos = jnp.full((1, 1), model.config.bos_token_id)
    written = continue_greedily(graphdef, params, bos, jnp.ones((1, 1), bool), 200, -1)
    story = tokenizer.decode(np.asarray(written[0]).tolist())
    assert len(story) == 464
    assert story.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )

    with gzip.open(DATA / "lm_tinystories" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        stories = [json.loads(next(lines))["text"] for _ in range(60)]
    rows = np.zeros((60, 256), np.int32)
    for row, story in zip(rows, stories, strict=True):
        tokens = [model.config.bos_token_id, *tokenizer.encode(story)][:256]
        row[: len(tokens)] = tokens
    inputs, labels = rows[:, :-1], rows[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(forward(model, inputs), labels)
    assert abs(losses[labels > 0].mean() - 1.345) < 5e-4
