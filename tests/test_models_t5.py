"""`models.t5` against transformers, and against what T5 is."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

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
from florax_examples.models.generation import beam_search, greedy
from florax_examples.models.t5 import PRESETS, T5, T5Config, relative_position_bucket, shift_right

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
VARIANTS = ("t5_v10_tied", "t5_v11_untied_gated")
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason=f"needs the reference models in {REFERENCE}"
)


BUCKETS = {"num_buckets": 8, "max_distance": 12}

# Heads as wide together as the model is not, stacks of two depths, few buckets.
TINY = T5Config(
    vocab_size=50,
    d_model=16,
    d_kv=4,
    d_ff=24,
    num_layers=1,
    num_decoder_layers=2,
    num_heads=3,
    relative_attention_num_buckets=BUCKETS["num_buckets"],
    relative_attention_max_distance=BUCKETS["max_distance"],
)
GATED = dataclasses.replace(
    TINY,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    scale_decoder_outputs=False,
)


def with_weights(config, weight, **options):
    return draws.module(lambda: T5(config, rngs=nnx.Rngs(0), **options), weight)


def random_model(config):
    # So large that attention matters, and that no two logits are close.
    random, scales = np.random.default_rng(0), {"embedding": 1.0, "scale": 1.0, "kernel": 0.4}
    return with_weights(config, lambda path, shape: random.normal(0, scales[path[-1]], shape))


def variant(model, *, stacked=False, **options):
    """The same weights in another form."""
    weights = dict(nnx.to_flat_state(nnx.state(model)))
    other = with_weights(model.config, lambda path, _: weights[path][...], **options)
    if stacked:
        other.stack()
    return other


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(function, graphdef, params, *args, **options):
    return function(nnx.merge(graphdef, params), *args, **options)


def apply(function, model, *args, **options):
    """`function(model, *args, **options)`, compiled."""
    return _apply(function, *nnx.split(model), *args, **options)


class Batch(NamedTuple):
    ids: jax.Array  # (2, 7)
    decoder_ids: jax.Array  # (2, 5)
    mask: jax.Array  # the second row of each is two tokens shorter
    decoder_mask: jax.Array


def logits_of(model, batch):
    options = dict(mask=batch.mask, decoder_mask=batch.decoder_mask)
    return model(batch.ids, batch.decoder_ids, **options)


def cached_logits_of(model, batch):
    encoded = model.encode(batch.ids, batch.mask)
    cache = model.init_cache(*batch.decoder_ids.shape, encoded.dtype, encoded=encoded)
    mask = batch.decoder_mask
    options = dict(positions=positions_of(mask), mask=mask, cache=cache)
    return model.decode(batch.decoder_ids, None, batch.mask, **options)[0]


@pytest.fixture(scope="module")
def model():
    return random_model(TINY)


@pytest.fixture(scope="module")
def batch():
    ids, decoder_ids = tokens((2, 7)), tokens((2, 5), seed=1)
    mask, decoder_mask = (jnp.arange(n) < jnp.array([[n], [n - 2]]) for n in (7, 5))
    return Batch(ids, decoder_ids, mask, decoder_mask)


def positions_of(mask):
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def tokens(shape, seed=0):
    return draws.tokens(TINY.vocab_size, *shape, seed=seed)


# The configuration and the names.


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("t5-small", 60_506_624),
        ("t5-base", 222_903_552),
        ("t5-large", 737_668_096),
        ("t5-3b", 2_851_598_336),
        ("google/t5-v1_1-small", 76_961_152),
        ("google/t5-v1_1-base", 247_577_856),
        ("google/flan-t5-large", 783_150_080),
        ("google/flan-t5-xl", 2_849_757_184),
    ],
)
def test_presets_have_as_many_parameters_as_the_published_models(name, count):
    config = PRESETS[name]

    def size(layers):
        # A layer more is as large as any; so the deep models need not be built.
        few = dataclasses.replace(config, num_layers=layers)
        model = nnx.eval_shape(lambda: T5(few, rngs=nnx.Rngs(0)))
        return sum(x.size for x in jax.tree.leaves(nnx.state(model)))

    assert size(1) + (config.num_layers - 1) * (size(2) - size(1)) == count


@pytest.mark.slow
def test_initial_weights_are_t5s():
    config = T5Config(vocab_size=300, d_model=64, d_kv=32, d_ff=256, num_layers=1, num_heads=4)
    config = dataclasses.replace(config, tie_word_embeddings=False, initializer_factor=0.5)
    model = nnx.jit(lambda: T5(config, rngs=nnx.Rngs(0)))()
    block = model.decoder.block[0]
    expected = [
        (model.shared.embedding, 1),
        (model.lm_head.kernel, 1 / math.sqrt(64)),
        (model.encoder.relative_attention_bias.embedding, 1 / math.sqrt(64)),
        (block.feed_forward.wi.kernel, 1 / math.sqrt(64)),
        (block.feed_forward.wo.kernel, 1 / math.sqrt(256)),
    ]
    for attention in (block.self_attention, block.cross_attention):
        expected += [
            (attention.q.kernel, 1 / math.sqrt(64 * 32)),
            (attention.k.kernel, 1 / math.sqrt(64)),
            (attention.v.kernel, 1 / math.sqrt(64)),
            (attention.o.kernel, 1 / math.sqrt(4 * 32)),
        ]
    for weight, scale in expected:
        # The standard deviation of n samples is known to about one part in sqrt(2 n).
        deviation = jnp.std(weight[...]) / (0.5 * scale) - 1
        assert abs(deviation) < 5 / math.sqrt(2 * weight.size)
    assert (block.feed_forward_norm.scale == 0.5).all()


def test_config_survives_the_way_to_hugging_face_and_back():
    for config in (T5Config(), PRESETS["google/flan-t5-xl"], TINY, GATED):
        written = json.loads(json.dumps(config.to_huggingface()))
        depth = config.num_decoder_layers or config.num_layers
        expected = dataclasses.replace(config, num_decoder_layers=depth)
        assert T5Config.from_huggingface(written) == expected
    written = dataclasses.replace(TINY, eos_token_id=(1, 2)).to_huggingface()
    assert T5Config.from_huggingface(json.loads(json.dumps(written))).eos_token_id == (1, 2)


def test_config_knows_what_old_files_leave_out():
    read = T5Config.from_huggingface
    sizes = {"d_model": 768, "num_layers": 12, "num_heads": 12, "d_ff": 3072}
    assert read({**sizes, "n_positions": 512, "dropout_rate": 0.1}) == PRESETS["t5-base"]
    v1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    config = read(v1_1)
    assert (config.activation, config.is_gated) == ("gelu_new", True)
    assert not config.scale_decoder_outputs
    # transformers 5 says tied whatever the model is, and has the scale apart.
    config = read({"tie_word_embeddings": True, "scale_decoder_outputs": False})
    assert (config.tie_word_embeddings, config.scale_decoder_outputs) == (True, False)
    assert read({"decoder_start_token_id": None, "pad_token_id": 3}).decoder_start_token_id == 3


def test_config_refuses_what_the_model_does_not_do():
    for settings, message in [
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj must be .* got 'gated-tanh'"),
        ({"dense_act_fn": "silu"}, "dense_act_fn must be 'relu' .* got 'silu'"),
        ({"is_gated_act": True}, "is_gated_act must be False .* got True"),
        ({"pad_token_id": None}, "pad_token_id is null"),
        ({"relative_attention_max_distance": 16}, "relative_attention_max_distance.* 32 and 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            T5Config.from_huggingface(settings)


def test_parameters_have_the_names_of_the_checkpoints():
    for path, name in [
        (("shared", "embedding"), "shared.weight"),
        (("lm_head", "kernel"), "lm_head.weight"),
        (("decoder", "final_layer_norm", "scale"), "decoder.final_layer_norm.weight"),
        (
            ("encoder", "relative_attention_bias", "embedding"),
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        (
            ("encoder", "block", 2, "feed_forward", "wi_1", "kernel"),
            "encoder.block.2.layer.1.DenseReluDense.wi_1.weight",
        ),
        (
            ("decoder", "block", 1, "cross_attention", "q", "kernel"),
            "decoder.block.1.layer.1.EncDecAttention.q.weight",
        ),
        (
            ("decoder", "block", 0, "feed_forward_norm", "scale"),
            "decoder.block.0.layer.2.layer_norm.weight",
        ),
    ]:
        assert T5.tensor_name(path) == name


@pytest.mark.parametrize("stacked", [False, True])
def test_florax_finds_attention_and_feed_forward_and_nothing_else(stacked):
    model = variant(random_model(GATED), stacked=stacked)
    params = nnx.to_pure_dict(nnx.state(model))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        in_a_block = path[-1].key == "kernel" and path[0].key != "lm_head"
        assert florax.attention_and_feed_forward(path, leaf) == in_a_block


# Positions.


def bucket_by_counting(distance, *, bidirectional, num_buckets, max_distance):
    if bidirectional:
        num_buckets //= 2
        start = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        start, distance = 0, max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return start + distance
    steps = math.log(distance / exact) / math.log(max_distance / exact)
    return start + min(exact + int(steps * (num_buckets - exact)), num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (4, 3)])
def test_buckets_are_those_of_the_formula(bidirectional, num_buckets, max_distance):
    options = dict(bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
    distances = np.arange(-300, 301)
    expected = [bucket_by_counting(int(distance), **options) for distance in distances]
    np.testing.assert_array_equal(relative_position_bucket(distances, **options), expected)


# What is computed.


def plain_logits(model, ids, decoder_ids):
    """T5 in NumPy, of a row without padding, from a checkpoint's tensors."""
    config, w = model.config, {}
    for path, param in nnx.to_flat_state(nnx.state(model)):
        w[T5.tensor_name(path)] = np.float64(param[...]).transpose(T5.tensor_axes(path, param.ndim))

    def linear(name, x):
        return x @ w[f"{name}.weight"].T

    def norm(name, x):
        return w[f"{name}.weight"] * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    def attention(name, x, seen, bias):
        heads = (-1, config.num_heads, config.d_kv)
        inputs = {"q": x, "k": seen, "v": seen}
        q, k, v = (linear(f"{name}.{n}", y).reshape(heads) for n, y in inputs.items())
        scores = np.exp(np.einsum("thd,shd->hts", q, k) + bias)
        y = np.einsum("hts,shd->thd", scores / scores.sum(axis=-1, keepdims=True), v)
        return linear(f"{name}.o", y.reshape(len(x), -1))

    def feed_forward(name, x):
        if config.is_gated:
            y = linear(f"{name}.wi_0", x)
            gate = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
            return linear(f"{name}.wo", gate * linear(f"{name}.wi_1", x))
        return linear(f"{name}.wo", np.maximum(linear(f"{name}.wi", x), 0))

    def bias(stack, length):
        table = w[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        options = dict(bidirectional=stack == "encoder", **BUCKETS)
        values = np.full((config.num_heads, length, length), -np.inf)
        for t, s in np.ndindex(length, length):
            if s <= t or stack == "encoder":
                values[:, t, s] = table[bucket_by_counting(s - t, **options)]
        return values

    def run(stack, depth, ids, encoded=None):
        x, own_bias = w["shared.weight"][ids], bias(stack, len(ids))
        for block in range(depth):
            name = f"{stack}.block.{block}.layer"
            y = norm(f"{name}.0.layer_norm", x)
            x = x + attention(f"{name}.0.SelfAttention", y, y, own_bias)
            if encoded is not None:
                y = norm(f"{name}.1.layer_norm", x)
                x = x + attention(f"{name}.1.EncDecAttention", y, encoded, 0)
            last = f"{name}.{1 if encoded is None else 2}"
            x = x + feed_forward(f"{last}.DenseReluDense", norm(f"{last}.layer_norm", x))
        return norm(f"{stack}.final_layer_norm", x)

    x = run("decoder", config.decoder_layers, decoder_ids, run("encoder", config.num_layers, ids))
    if config.scale_decoder_outputs:
        x = x / np.sqrt(config.d_model)
    return linear("shared" if config.tie_word_embeddings else "lm_head", x)


@pytest.mark.slow
@pytest.mark.parametrize("config", [TINY, GATED], ids=["tied", "gated"])
def test_logits_are_those_of_a_plain_program(batch, config):
    model = random_model(config)
    logits = apply(logits_of, model, batch)[0]
    expected = plain_logits(model, np.asarray(batch.ids[0]), np.asarray(batch.decoder_ids[0]))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


# What is seen.


@pytest.mark.slow
def test_the_encoder_sees_all_and_the_decoder_no_later_token(model, batch):
    logits = apply(logits_of, model, batch)

    def change(**tokens):
        return jnp.abs(apply(logits_of, model, batch._replace(**tokens)) - logits).max(axis=-1)[0]

    later = change(decoder_ids=batch.decoder_ids.at[0, 3].add(1))
    assert (later[:3] == 0).all()
    assert (later[3:] > 0).all()
    assert (change(ids=batch.ids.at[0, 6].add(1)) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("logits_of", [logits_of, cached_logits_of])
def test_padding_changes_nothing_on_either_side(model, batch, logits_of):
    def check(other):
        logits = apply(logits_of, model, other)[other.decoder_mask]
        np.testing.assert_allclose(logits, expected, atol=1e-5)

    expected = apply(logits_of, model, batch)[batch.decoder_mask]
    paddings = ~batch.mask, ~batch.decoder_mask
    changed = (x + padding for x, padding in zip(batch[:2], paddings, strict=True))
    check(Batch(*changed, *batch[2:]))
    check(Batch(*(x.at[1].set(jnp.roll(x[1], 2)) for x in batch)))


def test_no_mask_means_no_padding(model, batch):
    whole = batch._replace(mask=batch.mask | True, decoder_mask=batch.decoder_mask | True)
    none = batch._replace(mask=None, decoder_mask=None)
    logits = apply(logits_of, model, none)
    np.testing.assert_allclose(logits, apply(logits_of, model, whole), atol=1e-5)


# Other forms of the same model.


def loss_of(model, batch):
    logits = logits_of(model, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.decoder_ids)
    return losses.mean(where=batch.decoder_mask)


def loss_and_gradients(model, batch):
    return nnx.value_and_grad(loss_of)(model, batch)


@pytest.mark.slow
def test_stacked_checkpointed_blocks_have_the_same_loss_and_gradients(model, batch):
    expected_loss, expected_gradients = apply(loss_and_gradients, model, batch)
    other = variant(model, stacked=True, checkpoint=True)
    loss, gradients = apply(loss_and_gradients, other, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    other = nnx.merge(nnx.graphdef(other), gradients)
    other.unstack()
    gradients, expected_gradients = map(nnx.to_pure_dict, (nnx.state(other), expected_gradients))
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, gradients, expected_gradients)
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(gradients))


def test_unstacking_undoes_stacking(model):
    other = variant(model, stacked=True)
    assert other.decoder.block.cross_attention.q.kernel.shape == (2, 16, 12)
    other.unstack()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(other), nnx.state(model))


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_checkpointing_keeps_only_what_enters_the_blocks(model, batch, stacked):
    def kept(checkpoint):
        graphdef, params = nnx.split(variant(model, stacked=stacked, checkpoint=checkpoint))

        def loss(params):
            return loss_of(nnx.merge(graphdef, params), batch)

        pull = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        return {x.shape[-3:] for x in jax.tree.leaves(pull)}

    inside = {(2, 7, TINY.d_ff), (2, 5, TINY.d_ff)}  # the feed-forward layers
    assert inside <= kept(False)
    assert not inside & kept(True)
    assert {(2, 7, TINY.d_model), (2, 5, TINY.d_model)} <= kept(True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"),
    [(TINY, {"dtype": jnp.bfloat16}), (GATED, {"param_dtype": jnp.bfloat16})],
    ids=["tied, float32 parameters", "untied, bfloat16 parameters"],
)
def test_bfloat16_changes_little_and_never_the_dtype_of_parameters_and_logits(
    batch, config, options
):
    model = random_model(config)
    exact = apply(logits_of, model, batch)[batch.decoder_mask]
    other = variant(model, stacked=True, **options)
    _, gradients = nnx.eval_shape(loss_and_gradients, other, batch)
    dtype = jnp.dtype(options.get("param_dtype", jnp.float32))
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {dtype}
    logits = apply(cached_logits_of, other, batch)[batch.decoder_mask]
    assert jnp.std(logits - exact) < 0.1 * jnp.std(exact)  # numbers of 8 bits
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16)).any()


# Writing.


def write(search, model, ids, mask, new_tokens, **options):
    """What `search` writes for `ids`: run by `apply`."""
    batch = len(ids)
    return search(
        functools.partial(model.decode, encoded=None, encoder_mask=mask),
        model.init_cache(batch, new_tokens, encoded=model.encode(ids, mask)),
        jnp.full((batch, 1), model.config.decoder_start_token_id),
        jnp.ones((batch, 1), bool),
        new_tokens,
        pad=model.config.pad_token_id,
        **options,
    )


@pytest.mark.slow
def test_greedy_with_a_cache_equals_the_whole_forward_pass_for_every_token(model, batch):
    search = functools.partial(write, greedy, new_tokens=12, eos=None)
    written = apply(search, variant(model, stacked=True), batch.ids, batch.mask)
    decoder_ids = jnp.pad(written, ((0, 0), (1, 0)))[:, :-1]  # the start token is 0
    logits = apply(T5.__call__, model, batch.ids, decoder_ids, mask=batch.mask)
    np.testing.assert_array_equal(written, jnp.argmax(logits, axis=-1))
    assert len(jnp.unique(written)) > 3


@pytest.mark.slow
def test_beams_that_share_an_encoded_text_write_as_if_each_had_its_own(model, batch):
    def search(model, ids):
        def with_axes(axes):
            options = dict(beams=3, num_return=3, batch_axis=axes, eos=None)
            return write(beam_search, model, ids, None, 8, **options)

        axes = model.cache_batch_axis
        return with_axes(axes), with_axes(axes._replace(encoded=axes.own))

    shared, own = apply(search, variant(model, stacked=True), batch.ids)
    np.testing.assert_array_equal(shared[0], own[0])
    np.testing.assert_allclose(shared[1], own[1], rtol=2e-6)


def test_labels_shifted_right_begin_with_the_start_token():
    labels = jnp.array([[5, 6, 7, 1], [8, 1, -100, -100]])
    shifted = [[9, 5, 6, 7], [9, 8, 1, 3]]
    np.testing.assert_array_equal(shift_right(labels, start=9, pad=3), shifted)


def test_model_refuses_what_it_cannot_read(model):
    nothing, encoded = jnp.zeros((2, 0), jnp.int32), jnp.zeros((2, 3, 16))
    with pytest.raises(ValueError, match=r"at least one token a row, got shape \(2, 0\)"):
        model.encode(nothing)
    with pytest.raises(ValueError, match=r"at least one token a row, got shape \(2, 0\)"):
        model.decode(nothing, encoded, None)
    with pytest.raises(ValueError, match="encoded has 2 rows, but batch=3"):
        model.init_cache(3, 5, encoded=encoded)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        model.init_cache(2, 0, encoded=encoded)


# The reference.


@pytest.fixture(
    scope="module",
    params=[pytest.param("t5_v10_tied", marks=pytest.mark.slow), "t5_v11_untied_gated"],
)
def reference(request):
    """A model that transformers wrote, stacked, and what it made of some arrays there."""
    folder = REFERENCE / request.param
    return checkpoints.load(folder, T5, stacked=True), np.load(folder / "reference.npz")


@needs_reference
def test_model_agrees_with_transformers(reference):
    model, arrays = reference
    ids, decoder_ids = arrays["input_ids"], arrays["decoder_input_ids"]
    mask, decoder_left_mask = (arrays[name] > 0 for name in ("mask", "decoder_left_mask"))
    close = functools.partial(np.testing.assert_allclose, atol=4e-5, rtol=0)

    def forward(model, ids, mask, decoder_ids, decoder_mask):
        encoded = model.encode(ids, mask)
        return encoded, model.decode(decoder_ids, encoded, mask, mask=decoder_mask)[0]

    def check(name, mask, decoder_mask):
        encoded, logits = apply(forward, model, ids, mask, decoder_ids, decoder_mask)
        close(logits[decoder_mask], arrays[name][decoder_mask])
        return encoded, logits

    whole, decoder_whole = np.ones_like(mask), np.ones_like(decoder_left_mask)
    encoded, logits = check("logits", mask, decoder_whole)
    close(encoded[mask], arrays["encoder_last_hidden"][mask])
    check("logits_no_mask", whole, decoder_whole)
    check("logits_decoder_left_mask", mask, decoder_left_mask)

    labels, config = arrays["labels"], model.config
    shifted = shift_right(labels, config.decoder_start_token_id, config.pad_token_id)
    np.testing.assert_array_equal(shifted, decoder_ids)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    close(losses.mean(where=labels != -100), arrays["loss"])

    if "long_logits" in arrays:
        ids, decoder_ids = arrays["long_input_ids"], arrays["long_decoder_input_ids"]
        close(apply(T5.__call__, model, ids, decoder_ids)[:, -8:], arrays["long_logits"])


@needs_reference
def test_buckets_are_those_of_transformers(reference):
    model, arrays = reference
    for name, bidirectional in (("bucket_bidirectional", True), ("bucket_causal", False)):
        buckets = relative_position_bucket(
            arrays["distance"],
            bidirectional=bidirectional,
            num_buckets=model.config.relative_attention_num_buckets,
            max_distance=model.config.relative_attention_max_distance,
        )
        np.testing.assert_array_equal(buckets, arrays[name])


@needs_reference
@pytest.mark.parametrize("name", VARIANTS)
def test_configs_of_transformers_4_and_5_are_read_alike(name):
    new, old = (
        T5Config.from_huggingface(json.loads((REFERENCE / name / file).read_text()))
        for file in ("config.json", "config_4x.json")
    )
    assert old.tie_word_embeddings == ("untied" not in name)
    assert new.tie_word_embeddings  # transformers 5 says so of every T5
    assert new == dataclasses.replace(old, tie_word_embeddings=True)


def up_to_eos(ids, eos):
    ends = np.asarray(ids) == eos
    return np.where(np.cumsum(ends, axis=-1) - ends > 0, 0, ids)


@needs_reference
def test_greedy_writes_what_transformers_does(reference):
    model, arrays = reference

    def search(model, ids, mask, eos):
        return write(greedy, model, ids, mask, 20, eos=eos)

    for name, eos in (("greedy_ids", -1), ("greedy_eos_ids", model.config.eos_token_id)):
        written = apply(search, model, arrays["input_ids"], arrays["mask"] > 0, eos)
        np.testing.assert_array_equal(written, arrays[name][:, 1:])


@needs_reference
@pytest.mark.slow
@pytest.mark.parametrize(
    ("early_stopping", "names"),
    [
        (False, ["beam4_noeos", "beam4", "beam4_return4", "beam4_alt", "beam4_alt_lp2"]),
        (True, ["beam4_alt_early"]),
        ("never", ["beam4_alt_lp2_never"]),
    ],
)
def test_beams_write_and_score_what_those_of_transformers_do(reference, early_stopping, names):
    model, arrays = reference
    axes = model.cache_batch_axis

    def search(model, ids, mask, eos, length_penalty):
        options = dict(beams=4, num_return=4, batch_axis=axes, early_stopping=early_stopping)
        return write(
            beam_search, model, ids, mask, 20, eos=eos, length_penalty=length_penalty, **options
        )

    for name in names:
        eos = int(arrays["alt_eos"]) if "alt" in name else model.config.eos_token_id
        eos = -1 if "noeos" in name else eos
        penalty = 2.0 if "lp2" in name else 1.0
        tokens, scores = apply(search, model, arrays["input_ids"], arrays["mask"] > 0, eos, penalty)
        # Of some the reference has the best text of each row only.
        expected = arrays[f"{name}_ids"].reshape(3, -1, 21)[..., 1:]
        count = expected.shape[1]
        np.testing.assert_array_equal(up_to_eos(tokens[:, :count], eos), up_to_eos(expected, eos))
        expected = arrays[f"{name}_scores"].reshape(3, count)
        np.testing.assert_allclose(scores[:, :count], expected, atol=1e-5)
