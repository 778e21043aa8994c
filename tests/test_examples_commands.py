"""Every command line of the READMEs: its flags are understood, and at a tiny size it runs."""

import dataclasses
import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import extras
import numpy as np
import pytest

extras.need("examples")

from tiny import write_folders

from florax_examples import settings
from florax_examples.models import checkpoints
from florax_examples.models.gpt2 import GPT2
from florax_examples.models.llama import Llama
from florax_examples.models.t5 import T5
from florax_examples.models.vit import ViT

# Runs of a few steps: most of their time is that of the compiler.

REPOSITORY = Path(__file__).parents[1]
READMES = (REPOSITORY / "README.md", REPOSITORY / "examples/README.md")
SCRIPTS = ("t5", "gpt2", "vit", "llama")


def commands():
    """The arguments of every `python examples/...` in the READMEs, as bash expands them."""
    found = []
    for readme in READMES:
        blocks = re.findall(r"^```sh\n(.*?)^```", readme.read_text(), re.M | re.S)
        # One after the other: what two print at once is mixed.
        blocks = [re.sub(r" &$", "", block, flags=re.M) for block in blocks]
        defined = "pip() { :; }; pytest() { :; }; python() { printf '%s\\0' \"$@\" $'\\n'; }\n"
        printed = subprocess.run(
            ["bash", "-eu", "-c", defined + "\n".join(blocks)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        found += [command.split("\0") for command in printed.split("\0\n\0")[:-1]]
    return [(Path(path).stem, tuple(arguments)) for path, *arguments in found]


def test_the_readmes_have_commands_for_every_script_and_setting():
    found = commands()
    assert {script for script, _ in found} >= {*SCRIPTS, "projections", "convert_gguf"}
    ranks = {
        arguments[arguments.index("--rank") + 1] for _, arguments in found if "--rank" in arguments
    }
    assert ranks >= {"8", "16", "32", "64", "128", "256", "512"}


@pytest.mark.parametrize("script", [*SCRIPTS, "projections"])
def test_the_settings_of_every_command_are_understood(script):
    module = importlib.import_module(script)
    for name, arguments in commands():
        if name == script:
            parsed = settings.parse(module.Settings, None, arguments)
            assert isinstance(parsed, module.Settings)


SMALL = {
    "updates": 2,
    "steps": 20,
    "accumulate": 2,
    "micro_batch": 2,
    "rank": 3,
    "hidden": 16,
    "resample_every": 1,
    "evaluations": 1,
    "heldout_batch": 4,
    "scored": 2,
    "length": 96,
    "new_tokens": 2,
    "source_length": 16,
    "target_length": 6,
    "texts": 12,
}


def flags_of(script, arguments):
    """What tells commands apart at a tiny size: all but numbers, models and data."""
    words = [word for word in arguments if not re.fullmatch(r"[\d.e-]+", word)]
    for named in ("--model", "--data", "--tokenizer"):
        if named in words:
            at = words.index(named)
            del words[at : at + 2]
    flags = re.findall(r"--\S+(?: [^-]\S*)?", " ".join(words))
    return script, frozenset(flags), "--accumulate" in arguments


def different():
    """A command of each kind."""
    kinds = {}
    for script, arguments in commands():
        if script in SCRIPTS:
            kinds.setdefault(flags_of(script, arguments), (script, arguments))
    return [*kinds.values()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_folders(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("script, arguments", different())
def test_every_command_runs_at_a_tiny_size(script, arguments, folders, tmp_path, capsys):
    module = importlib.import_module(script)
    chosen = settings.parse(module.Settings, None, arguments)
    fields = {field.name for field in dataclasses.fields(module.Settings)}
    small = {name: value for name, value in SMALL.items() if name in fields}
    for name in ("accumulate", "rank"):  # where it is one there is no accumulation
        small[name] = min(small[name], getattr(chosen, name))
    kind = {"vit": "images", "llama": "texts"}.get(script, "pairs")
    if "scitldr" in chosen.data and script == "llama":
        kind = "pairs"
    chosen = dataclasses.replace(
        chosen,
        model=str(folders / "models" / script),
        data=str(folders / kind),
        output=tmp_path,
        **small,
    )
    if chosen.tokenizer:
        chosen = dataclasses.replace(chosen, tokenizer=chosen.model)
    module.main(chosen)

    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [run["method"] for run in results["runs"]] == list(chosen.methods())
    for run in results["runs"]:
        assert np.isfinite(run["test_loss"])
        assert checkpoints.load(tmp_path / run["method"] / "best", type_of(script))
    assert (tmp_path / "loss.png").is_file()


def type_of(script):
    return {"t5": T5, "gpt2": GPT2, "llama": Llama, "vit": ViT}[script]


FEW = ["--model", "{gpt2}", "--data", "{pairs}", "--length", "96"]  # nothing to be trained first
OTHERS_TOKENS = ["--data", "{pairs}", "--tokenizer", "{stories}"]
MISTAKES = [
    ("gpt2", ["--data", "nowhere"], "there is no folder nowhere"),
    ("gpt2", ["--model", "nowhere/nothing/at/all"], "there is no folder nowhere/nothing/at/all"),
    ("gpt2", ["--rank", "0"], "rank must be at least 1, got 0"),
    ("gpt2", ["--rank", "2"], "accumulator=both has two sketches, got rank=2: add --rank 3"),
    ("gpt2", ["--learning-rate", "-1"], "learning_rate must be positive, got -1.0"),
    ("gpt2", ["--warmup", "1.5"], "warmup must be in [0, 1), got 1.5"),
    ("gpt2", ["--data", "{pairs}", "--length", "5"], "length=5 leaves none of"),
    ("gpt2", ["--length", "2000"], "n_positions=96"),
    (
        "gpt2",
        ["--model", "{gpt2}", "--length", "96", *OTHERS_TOKENS],
        "vocab_size=300",
    ),
    ("t5", ["--model", "{t5}", *OTHERS_TOKENS], "vocab_size=300"),
    ("llama", ["--model", "{llama}", *OTHERS_TOKENS], "vocab_size=300"),
    ("gpt2", [*FEW, "--micro-batch", "99999"], "micro_batch=99999 is more than the"),
    ("gpt2", ["--metod", "naive"], "--metod"),
    ("gpt2", ["--method", "full"], "full"),
    ("gpt2", ["--freeze-a"], "freeze_a is LoRA's, got method=flora"),
    ("gpt2", ["--projection", "gaussian"], "residual needs orthonormal rows"),
    ("gpt2", ["--weight-decay", "0.1"], "weight_decay=0.1 is AdamW's"),
    ("gpt2", ["--layerwise"], "layerwise finds the layers in their scan: add --scan"),
    ("gpt2", ["--layerwise", "--scan", "--method", "lora"], "layerwise is for full weights"),
    ("gpt2", ["--layerwise", "--scan", "--method", "naive"], "layerwise never has all gradients"),
    (
        "gpt2",
        ["--layerwise", "--scan", "--gradients", "dense"],
        "layerwise needs gradients=sketched",
    ),
    ("gpt2", [*FEW, "--micro-batch", "4", "--rank", "160"], "rank=160 compresses nothing"),
    (
        "gpt2",
        [*FEW, "--micro-batch", "4", "--rank", "160", "--method", "lora"],
        "rank=160 saves nothing in",
    ),
    ("gpt2", [*FEW, "--micro-batch", "4", "--output", __file__], "cannot be a folder"),
    ("t5", ["--model", "{gpt2}"], "describes a model of type 'gpt2', not 't5'"),
    ("vit", ["--data", "{pairs}"], "has no train split: it needs a file train.npz"),
    ("llama", ["--data", "{images}"], "no train"),
    ("llama", ["--length", "2000"], "max_position_embeddings=1024 of the model has no room for"),
    (
        "llama",
        ["--data", "{texts}", "--new-tokens", "1020"],
        "has no room for prompt=16 and new_tokens=1020",
    ),
    ("projections", ["--rank", "1000"], "rank=1000 must be below hidden=768"),
    ("convert_gguf", ["nowhere.gguf", "{pairs}"], "nowhere.gguf"),
]


@pytest.mark.parametrize(("script", "arguments", "message"), MISTAKES)
def test_mistakes_are_explained_in_a_sentence(
    script, arguments, message, folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    places = {name: folders / "models" / name for name in ("t5", "gpt2", "llama")}
    places |= {kind: folders / kind for kind in ("images", "pairs", "texts")}
    places["stories"] = REPOSITORY / "examples/data/stories260k"
    arguments = [argument.format(**places) for argument in arguments]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    # SystemExit with a text prints it to stderr; no other exception gets here.
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(REPOSITORY / f"examples/{script}.py"), run_name="__main__")
    assert exit.value.code not in (None, 0)
    explained = f"{exit.value.code} {capsys.readouterr().err}"
    assert message in " ".join(explained.replace("│", " ").split())
    assert "Traceback" not in explained
