"""`examples/gpt2.py` at a size for tests, and the model, decoding and data that it stands on."""
# ruff: noqa: E402  what the examples import may not be installed

import dataclasses
import functools
import gzip
import json
import math
import os
import runpy
import signal
import string
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

for requirement in ("flax", "matplotlib", "sacrebleu", "tokenizers", "tqdm", "tyro"):
    pytest.importorskip(requirement)

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
DATA = EXAMPLES / "data" / "tatoeba_deen"
REFERENCE = REPOSITORY.parent / "shared" / "reference" / "gpt2"
SPLITS = ("train", "validation", "test")


import tyro
from flax import nnx

import gpt2
from common.comparison import format_table, human
from common.decoding import greedy
from common.losses import chunked_cross_entropy
from common.text import read_pairs, shuffled, train_tokenizer
from models.gpt2 import GPT2, GPT2Config, init_cache

# The model.

# Initial weights so large that attention matters and that no two logits are close.
TINY = GPT2Config(
    vocab_size=50, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
)


@pytest.fixture(scope="module")
def model():
    return nnx.jit(lambda: GPT2(TINY, rngs=nnx.Rngs(0)))()


def test_default_config_is_the_published_124_million_parameter_model():
    model = nnx.eval_shape(lambda: GPT2(GPT2Config(), rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == 124_439_808


def test_initial_weights_are_gpt2s():
    config = GPT2Config(vocab_size=500, n_positions=400, n_embd=128, n_layer=2, n_head=4)
    model = nnx.jit(lambda: GPT2(config, rngs=nnx.Rngs(0)))()
    block = model.h[1]
    for kernel, scale in [
        (model.wte.embedding, 0.02),
        (model.wpe.embedding, 0.02),
        (block.attn.c_attn.kernel, 0.02),
        (block.mlp.c_fc.kernel, 0.02),
        (block.attn.c_proj.kernel, 0.02 / math.sqrt(2 * 2)),
        (block.mlp.c_proj.kernel, 0.02 / math.sqrt(2 * 2)),
    ]:
        # The standard deviation of n samples is known to about one part in sqrt(2 n).
        assert abs(jnp.std(kernel[...]) / scale - 1) < 5 / math.sqrt(2 * kernel.size)


def test_no_token_sees_a_later_one(model):
    ids = jax.random.randint(jax.random.key(0), (1, 10), 0, TINY.vocab_size)
    changed = ids.at[0, 6].add(1)
    difference = jnp.abs(model(ids)[0] - model(changed)[0]).max(axis=-1)[0]
    assert (difference[:6] == 0).all()
    assert (difference[6:] > 0).all()


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_padding_changes_nothing(model, left, cached):
    ids = jax.random.randint(jax.random.key(0), (1, 5), 0, TINY.vocab_size)
    padding = ((0, 0), (3, 0) if left else (0, 3))
    mask = jnp.pad(jnp.ones((1, 5), bool), padding)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    cache = init_cache(TINY, 1, 8) if cached else None
    padded, _ = model(jnp.pad(ids, padding), positions=positions, mask=mask, cache=cache)
    np.testing.assert_allclose(padded[mask], model(ids)[0][0], atol=2e-6)


@pytest.mark.parametrize("left", [True, False])
def test_greedy_with_a_cache_equals_the_whole_forward_pass_for_every_token(model, left):
    graphdef, params = nnx.split(model)
    lengths, new_tokens = [3, 7, 5], 12
    longest = max(lengths)
    prompts = np.random.default_rng(0).integers(1, TINY.vocab_size, (3, longest))

    forward = jax.jit(lambda ids: nnx.merge(graphdef, params)(ids)[0])
    expected = np.zeros((3, new_tokens), np.int32)
    for prompt, length, written in zip(prompts, lengths, expected, strict=True):
        ids = np.zeros((1, longest + new_tokens), np.int32)  # no token sees the zeros behind it
        ids[0, :length] = prompt[:length]
        for i in range(new_tokens):
            written[i] = ids[0, length + i] = np.argmax(forward(ids)[0, length + i - 1])

    padded = np.zeros((3, longest), np.int32)
    for row, prompt, length in zip(padded, prompts, lengths, strict=True):
        row[longest - length if left else 0 :][:length] = prompt[:length]

    @jax.jit
    def decode(ids, eos):
        cache = init_cache(TINY, len(ids), longest + new_tokens)
        return greedy(nnx.merge(graphdef, params), cache, ids, ids != 0, new_tokens, eos, pad=0)

    np.testing.assert_array_equal(decode(padded, -1), expected)

    eos = expected[0, 4]
    ended = np.cumsum(expected == eos, axis=1) - (expected == eos) > 0
    np.testing.assert_array_equal(decode(padded, eos), np.where(ended, 0, expected))


def test_stacked_blocks_give_the_same_logits_and_the_same_translations(model):
    stacked = nnx.clone(model)
    stacked.stack()
    assert stacked.h.attn.c_attn.kernel.shape == (TINY.n_layer, 16, 48)
    ids = jax.random.randint(jax.random.key(0), (2, 5), 1, TINY.vocab_size)

    @nnx.jit
    def forward_and_decode(model):
        cache = init_cache(TINY, 2, 8)
        return model(ids)[0], greedy(model, cache, ids, ids > 0, 3, eos=None, pad=0)

    logits, written = forward_and_decode(stacked)
    expected_logits, expected = forward_and_decode(model)
    np.testing.assert_allclose(logits, expected_logits, atol=2e-6)
    np.testing.assert_array_equal(written, expected)

    stacked.unstack()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(stacked))


def test_stacked_blocks_keep_only_what_enters_them(model):
    def kept(model):
        graphdef, params = nnx.split(model)
        ids = jnp.zeros((3, 7), jnp.int32)

        def loss(params):
            return nnx.merge(graphdef, params)(ids)[0].sum()

        pull = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        return {x.shape for x in jax.tree.leaves(pull)}

    stacked = nnx.clone(model)
    stacked.stack()
    assert (3, 7, 64) in kept(model)  # inside the feed-forward layer, of width 4 * 16
    assert (2, 3, 7, 16) in kept(stacked)
    assert (2, 3, 7, 64) not in kept(stacked)


def test_model_refuses_what_it_has_no_positions_for(model):
    with pytest.raises(ValueError, match="25 tokens exceed n_positions=24"):
        model(jnp.zeros((1, 25), jnp.int32))
    with pytest.raises(ValueError, match="length=25 exceeds n_positions=24"):
        init_cache(TINY, 1, 25)
    with pytest.raises(ValueError, match="n_embd=16 and n_head=3"):
        GPT2Config(n_embd=16, n_head=3)


def read_safetensors(path):
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["dtype"] == "F32"
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            arrays[name] = np.frombuffer(content[begin:end], np.float32).reshape(entry["shape"])
    return arrays


def reference_model():
    fields = {field.name for field in dataclasses.fields(GPT2Config)}
    config = json.loads((REFERENCE / "config.json").read_text())
    config = GPT2Config(**{name: value for name, value in config.items() if name in fields})

    flat = {}
    for name, array in read_safetensors(REFERENCE / "model.safetensors").items():
        *path, module, kind = name.removeprefix("transformer.").split(".")
        if kind == "weight":
            embedding = "embedding" if module in ("wte", "wpe") else "kernel"
            kind = "scale" if module.startswith("ln_") else embedding
        path = (*(int(part) if part.isdigit() else part for part in path), module, kind)
        flat[path] = jnp.asarray(array)

    model = nnx.eval_shape(lambda: GPT2(config, rngs=nnx.Rngs(0)))
    state = nnx.to_flat_state(nnx.state(model))
    assert {path: x.shape for path, x in state} == {path: x.shape for path, x in flat.items()}
    nnx.update(model, nnx.from_flat_state(flat))
    return model


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"needs the reference model in {REFERENCE}")
def test_model_agrees_with_transformers():
    graphdef, params = nnx.split(reference_model())
    config = nnx.merge(graphdef, params).config
    expected = np.load(REFERENCE / "reference.npz")

    @jax.jit
    def forward(ids, **options):
        return nnx.merge(graphdef, params)(ids, **options)[0]

    @jax.jit
    def decode(ids, mask, eos):
        cache = init_cache(config, len(ids), ids.shape[1] + 20)
        return greedy(nnx.merge(graphdef, params), cache, ids, mask, 20, eos, pad=0)

    def check(logits, name, mask):
        np.testing.assert_allclose(logits[mask], expected[name][mask], atol=1e-4, rtol=0)

    check(forward(expected["input_ids"]), "logits", np.s_[:])
    for side in ("left", "right"):
        ids, positions = expected[f"{side}_input_ids"], expected[f"{side}_position_ids"]
        mask = expected[f"{side}_mask"].astype(bool)
        check(forward(ids, mask=mask), f"{side}_logits_default_positions", mask)
        for cache in (None, init_cache(config, *ids.shape)):
            logits = forward(ids, positions=positions, mask=mask, cache=cache)
            check(logits, f"{side}_logits", mask)

    ids, mask = expected["left_input_ids"], expected["left_mask"].astype(bool)
    for name, eos in (("greedy_ids", -1), ("greedy_eos_ids", 50)):
        np.testing.assert_array_equal(decode(ids, mask, eos), expected[name])


# What the scripts share.


def test_no_english_sentence_is_in_two_splits():
    def bare(text):
        return text.casefold().translate(str.maketrans("", "", string.punctuation + "’‘“”–…"))

    train, validation, test = (
        {" ".join(bare(pair.target).split()) for pair in read_pairs(DATA / f"{split}.jsonl.gz")}
        for split in SPLITS
    )
    assert len(train) > 10_000
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_tokenizer_spells_any_text_and_repeats_itself():
    texts = [text for pair in read_pairs(DATA / "test.jsonl.gz") for text in pair]
    first, second = (train_tokenizer(texts, 400, ["<pad>", "<sep>"]) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert first.get_vocab_size() == 400
    assert (first.token_to_id("<pad>"), first.token_to_id("<sep>")) == (0, 1)
    for text in [*texts, "日本語 ∑ \t\u0000"]:
        assert first.decode(first.encode(text).ids) == text


def test_every_epoch_shows_every_row_once_in_a_new_order():
    batches = shuffled(size=10, batch=5, seed=0)
    epochs = [np.concatenate([next(batches), next(batches)]) for _ in range(2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert list(epochs[0]) != list(epochs[1])
    again = shuffled(size=10, batch=5, seed=0)
    assert list(np.concatenate([next(again), next(again)])) == list(epochs[0])
    with pytest.raises(ValueError, match="batch of 11"):
        next(shuffled(size=10, batch=11, seed=0))


@pytest.mark.parametrize("chunk", [5, 14])
def test_chunked_cross_entropy_equals_the_plain_one(chunk):
    keys = jax.random.split(jax.random.key(0), 3)
    weight = jax.random.normal(keys[0], (8, 30))
    features = jax.random.normal(keys[1], (2, 7, 8))
    labels = jax.random.randint(keys[2], (2, 7), 0, 30)

    def plain(features, weight):
        return optax.softmax_cross_entropy_with_integer_labels(features @ weight, labels)

    def chunked(features, weight):
        return chunked_cross_entropy(lambda x: x @ weight, features, labels, chunk)

    @functools.partial(jax.jit, static_argnums=0)
    def losses_and_gradients(function, features, weight):
        losses, pull = jax.vjp(function, features, weight)
        return losses, pull(jnp.arange(14.0).reshape(2, 7) / 14)

    # A loss is a logarithm of 30 exponentials; a gradient sums 14 tokens.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6),
        losses_and_gradients(chunked, features, weight),
        losses_and_gradients(plain, features, weight),
    )


def test_no_array_of_chunked_cross_entropy_has_all_logits():
    def loss(features, weight):
        labels = jnp.zeros(64, jnp.int32)
        return chunked_cross_entropy(lambda x: x @ weight, features, labels, 8).sum()

    arrays = jnp.zeros((64, 16)), jnp.zeros((16, 1000))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile()
    # Some of the size of the logits of 8 tokens, where those of 64 take 256,000 bytes.
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 1000 * 4


def test_table_is_aligned():
    table = format_table(["method", "MiB"], [["a", "1.25"], ["longer", "100.00"]])
    assert table.splitlines() == [
        "method     MiB",
        "------  ------",
        "a         1.25",
        "longer  100.00",
    ]
    assert [human(n) for n in (0, 1536, 2**20, 5 * 2**19)] == [
        "0.0 KiB",
        "1.5 KiB",
        "1.00 MiB",
        "2.50 MiB",
    ]


# The script.


def script(*arguments, **options):
    path = [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, str(EXAMPLES / "gpt2.py"), *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.fixture(scope="module")
def few_pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for split, count in zip(SPLITS, (400, 40, 40), strict=True):
        with gzip.open(DATA / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            text = "".join(next(lines) for _ in range(count))
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write(text)
    return folder


SMALL = ("--vocab-size=300", "--length=48", "--n-layer=1", "--n-embd=32", "--n-head=2", "--rank=8")
TRAINING = ("--updates=30", "--learning-rate=0.01")


def results_of(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out, err, json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def comparison(few_pairs, tmp_path_factory):
    output = tmp_path_factory.mktemp("output") / "new" / "folder"
    process = script("--data", few_pairs, "--output", output, *SMALL, *TRAINING)
    return output, *results_of(process)


def test_script_shows_progress_translations_and_a_table(comparison):
    _, out, err, _ = comparison
    for method in ("none", "full", "flora"):
        assert any(line.startswith(method) and "100%" in line for line in err.splitlines())
    assert "loss=" in err

    lines = out.splitlines()
    shown = next(i for i, line in enumerate(lines) if line.startswith("  expected")) - 1
    pairs = dict(read_pairs(DATA / "test.jsonl.gz"))
    assert lines[shown + 1].split(maxsplit=1)[1] == pairs[lines[shown]]
    assert [line.split()[0] for line in lines[shown + 1 : shown + 5]] == [
        "expected",
        "none",
        "full",
        "flora",
    ]

    header = next(i for i, line in enumerate(lines) if line.startswith("method"))
    table = lines[header : header + 5]
    assert [line.split()[0] for line in table[2:]] == ["none", "full", "flora"]
    assert len({len(line) for line in table}) == 1


def test_script_writes_its_results_and_a_plot(comparison):
    output, _, _, results = comparison
    assert json.loads((output / "results.json").read_text()) == results
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_script_measures_memory_and_learns(comparison):
    *_, results = comparison
    none, full, flora = results["runs"]
    assert [run["method"] for run in (none, full, flora)] == ["none", "full", "flora"]
    assert none["accumulator_bytes"] == 0
    assert none["optimizer_bytes"] < flora["optimizer_bytes"]
    # At width 32 the matrices of a block have 12 * 32² weights, in float32. Rank 8 keeps a quarter
    # of them, in the momentum and in the accumulator; besides, FLORA has a count and a key.
    saved = 12 * 32**2 * 4 * 3 // 4
    for kind in ("optimizer_bytes", "accumulator_bytes"):
        assert 0 <= flora[kind] - (full[kind] - saved) <= 16
    for run in (none, full, flora):
        assert run["temporary_bytes"] > 0
        assert 0 <= run["bleu"] <= 100
        assert run["test_loss"] < 0.8 * math.log(300)  # a uniform guess has a loss of log(300)


@pytest.mark.slow
def test_one_row_alone_repeats_its_figures(comparison, few_pairs, tmp_path):
    *_, together = comparison
    arguments = ["--data", few_pairs, "--output", tmp_path, *SMALL, *TRAINING]
    *_, alone = results_of(script("--method", "flora", *arguments))
    first, second = alone["runs"][-1], together["runs"][-1]
    for name in first.keys() - {"seconds"}:
        assert first[name] == second[name], name


def settings_of(*arguments):
    return tyro.cli(gpt2.Settings, args=[*map(str, arguments)])


def assert_same_bytes(run, ordinary):
    assert run["accumulator_bytes"] == ordinary["accumulator_bytes"]
    # A stack of layers counts its steps by itself, and has a key of its own.
    assert 0 <= run["optimizer_bytes"] - ordinary["optimizer_bytes"] <= 32


@pytest.mark.parametrize(
    ("method", "flag"), [("flora", "--gradients=dense"), ("none", "--layerwise")]
)
def test_gradients_in_other_ways_train_alike(comparison, few_pairs, method, flag):
    *_, results = comparison
    (expected,) = (run for run in results["runs"] if run["method"] == method)
    settings = settings_of("--data", few_pairs, "--method", method, flag, *SMALL, *TRAINING)
    data = gpt2.load_data(settings)
    data.rows["validation"] = data.rows["test"]  # the script's last figure ends the curve then
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    model = GPT2(config, rngs=nnx.Rngs(settings.seed))
    if settings.layerwise:
        model.stack()
    trained = gpt2.train(settings, method, *nnx.split(model), data)
    # Updates make more of each rounding: 120 of `none`, on jax 0.10.0, 1.2 percent of the loss.
    close = {"flora": 1e-3, "none": 3e-2}[method]
    np.testing.assert_allclose(trained.curve.heldout[-1][1], expected["test_loss"], rtol=close)
    assert_same_bytes(trained._asdict(), expected)


def test_layerwise_accumulates_learns_and_translates(comparison, few_pairs, tmp_path, capsys):
    *_, results = comparison
    arguments = ["--data", few_pairs, "--output", tmp_path, *SMALL, *TRAINING]
    gpt2.main(settings_of("--method", "flora", "--layerwise", *arguments))
    (run,) = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert_same_bytes(run, results["runs"][-1])
    assert 0 <= run["bleu"] <= 100
    assert run["test_loss"] < 0.8 * math.log(300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere/train.jsonl.gz"),
        (["--rank", "0"], "rank must be at least 1, got 0"),
        (["--rank", "160"], "rank=160 saves nothing"),
        (["--n-head", "7"], "n_embd=160 is no multiple of n_head=7"),
        (["--learning-rate", "-1"], "learning_rate must be positive, got -1.0"),
        (["--warmup", "1.5"], "warmup must be in [0, 1), got 1.5"),
        (["--vocab-size", "100"], "vocab_size must be at least 259, got 100"),
        (["--length", "5"], "length=5 leaves"),
        (["--output", __file__], "cannot be a folder"),
        (["--metod", "full"], "--metod"),
        (["--layerwise"], "method=all accumulates at full size: choose --method none or"),
        (["--layerwise", "--method", "full"], "layerwise never has all gradients"),
        (["--layerwise", "--method=flora", "--gradients=dense"], "needs gradients=sketched"),
    ],
)
def test_mistakes_are_explained_in_a_sentence(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpt2.py", *arguments])
    # SystemExit with a text prints it to stderr; no other exception gets here.
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(EXAMPLES / "gpt2.py"), run_name="__main__")
    assert exit.value.code not in (None, 0)
    explained = f"{exit.value.code} {capsys.readouterr().err}"
    assert message in " ".join(explained.replace("│", " ").split())


def test_ctrl_c_ends_the_script_quietly(few_pairs, tmp_path):
    arguments = ["--data", few_pairs, "--output", tmp_path, "--updates", 10**6, *SMALL]
    process = script(*arguments)
    while "loss=" not in (line := process.stderr.read(20)):
        assert line, "it ended by itself"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err


@pytest.mark.slow
def test_default_settings_translate(tmp_path):
    *_, results = results_of(script("--method", "flora", "--output", tmp_path))
    (flora,) = results["runs"]
    assert flora["bleu"] >= 20
