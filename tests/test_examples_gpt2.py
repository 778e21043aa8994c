"""`examples/gpt2.py` as a person runs it, at a size for tests."""

import functools
import json
import math
import signal
import string

import extras
import pytest

extras.need("examples")

from tiny import PAIRS_OF_THE_REPOSITORY as DATA
from tiny import start, write_few_pairs

from florax_examples.datasets import SPLITS, load_pairs
from florax_examples.models.gpt2 import GPT2, GPT2Config


def test_no_english_sentence_is_in_two_splits():
    def bare(text):
        return text.casefold().translate(str.maketrans("", "", string.punctuation + "’‘“”–…"))

    train, validation, test = (
        {" ".join(bare(pair.target).split()) for pair in load_pairs(DATA, split)}
        for split in SPLITS
    )
    assert len(train) > 10_000
    assert not train & validation
    assert not train & test
    assert not validation & test


script = functools.partial(start, "gpt2")


@pytest.fixture(scope="module")
def few_pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_few_pairs(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory, few_pairs):
    """Arguments for a small model and few pairs."""
    folder = tmp_path_factory.mktemp("model")
    config = GPT2Config(vocab_size=300, n_positions=128, n_embd=32, n_layer=1, n_head=2)
    described = {"model_type": GPT2.model_type, **config.to_huggingface()}
    (folder / "config.json").write_text(json.dumps(described))
    return ("--model", folder, "--no-pretrained", "--data", few_pairs, "--length=96", "--rank=8")


TRAINING = ("--updates=30", "--learning-rate=0.01", "--heldout-batch=40")


def results_of(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out, err, json.loads(out.splitlines()[-1])


METHODS = ["none", "naive", "paper", "flora"]


@pytest.fixture(scope="module")
def comparison(small, tmp_path_factory):
    output = tmp_path_factory.mktemp("output") / "new" / "folder"
    process = script("--method", "all", "--output", output, *small, *TRAINING)
    return output, *results_of(process)


@pytest.mark.slow
def test_script_shows_progress_translations_and_a_table(comparison):
    _, out, err, _ = comparison
    for method in METHODS:
        assert any(line.startswith(method) and "100%" in line for line in err.splitlines())
    assert "tokens/s" in err and "loss" in err and "iB" in err

    lines = out.splitlines()
    shown = next(i for i, line in enumerate(lines) if line.startswith("  expected")) - 1
    pairs = {pair.source: pair.target for pair in load_pairs(DATA, "test")}
    assert lines[shown + 1].split(maxsplit=1)[1] == pairs[lines[shown]]
    names = [line.split()[0] for line in lines[shown + 1 : shown + 6]]
    assert names == ["expected", *METHODS]

    header = next(i for i, line in enumerate(lines) if line.startswith("method"))
    table = lines[header : header + 6]
    assert [line.split()[0] for line in table[2:]] == METHODS
    assert len({len(line) for line in table}) == 1


@pytest.mark.slow
def test_script_writes_its_results_and_a_plot(comparison):
    output, _, _, results = comparison
    assert json.loads((output / "results.json").read_text()) == results
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    for method in METHODS:
        assert (output / method / "best" / "model.safetensors").is_file()
        assert list((output / method / "tensorboard").iterdir())


@pytest.mark.slow
def test_script_measures_memory_and_learns(comparison):
    *_, results = comparison
    assert [run["method"] for run in results["runs"]] == METHODS
    none, naive, paper, flora = results["runs"]
    assert none["accumulator_bytes"] == 0
    assert none["optimizer_bytes"] < flora["optimizer_bytes"]
    # At width 32 the matrices of a block have 12 * 32² weights, in float32. Rank 8 keeps a quarter
    # of them, in the momentum and in the accumulator; besides, each has a key, a digest, a
    # cycle, and for each of the 4 matrices two words; the momentum a count as well.
    saved = 12 * 32**2 * 4 * 3 // 4
    for kind in ("optimizer_bytes", "accumulator_bytes"):
        assert 0 <= paper[kind] - (naive[kind] - saved) <= 8 + 8 + 4 + 4 * 8 + 4
    # As many entries in 4 and in 8 bits, with a float32 scale for 33 of them or more; 1 KiB for
    # words that are filled in part, and for what each sketch is drawn from.
    for kind, bits, other in (("accumulator", 4, 0), ("optimizer", 8, none["optimizer_bytes"])):
        sizes = [run[f"{kind}_bytes"] - other for run in (flora, paper)]
        assert sizes[0] < sizes[1] * (bits + 32 / 33) / 32 + 1024
    for run in results["runs"]:
        assert run["temporary_bytes"] > 0
        assert 0 <= run["BLEU"] <= 100
        assert run["test_loss"] < 0.8 * math.log(300)  # a uniform guess has a loss of log(300)


@pytest.mark.slow
def test_one_row_alone_repeats_its_figures(comparison, small, tmp_path):
    *_, together = comparison
    *_, alone = results_of(script("--method", "flora", "--output", tmp_path, *small, *TRAINING))
    first, second = alone["runs"][-1], together["runs"][-1]
    of_the_machine = {"seconds", "compile_seconds", "micro_batch_ms", "peak_bytes"}
    for name in first.keys() - of_the_machine - {"tokens_per_second"}:
        assert first[name] == second[name], name


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint(small, tmp_path):
    process = script("--method", "none", "--output", tmp_path, "--updates", 10**6, *small)
    while "loss " not in (line := process.stderr.read(20)):
        assert line, "it ended by itself"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "add --resume to go on from there" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert (tmp_path / "none" / "checkpoint").is_dir()


@pytest.mark.slow
def test_default_settings_translate(tmp_path):
    *_, results = results_of(script("--output", tmp_path))
    (flora,) = results["runs"]
    assert flora["BLEU"] >= 20
