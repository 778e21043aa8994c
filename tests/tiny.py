"""Tiny models, data and runs of the examples."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import extras
import numpy as np
import optax

extras.need("examples")

import safetensors.numpy
from flax import nnx

from florax_examples import tokenization, training
from florax_examples.datasets import SPLITS
from florax_examples.models import checkpoints
from florax_examples.models.gpt2 import GPT2, GPT2Config
from florax_examples.models.llama import Llama, LlamaConfig
from florax_examples.models.t5 import T5, T5Config
from florax_examples.models.vit import ViT, ViTConfig
from florax_examples.settings import Training

REPOSITORY = Path(__file__).parents[1]
PAIRS_OF_THE_REPOSITORY = REPOSITORY / "examples/data/tatoeba_deen"

# For the scripts.

PAIRS = [("Ein Hund schläft.", "A dog sleeps."), ("Die Katze frisst.", "The cat eats.")] * 6


def write_folders(folder):
    """Per script a model with weights and a tokenizer in `models`; `pairs`, `texts`, `images`."""
    tokenizer = tokenization.train([" ".join(pair) for pair in PAIRS], 300)
    width, layers = 8, 1
    models = {
        "t5": T5(
            T5Config(vocab_size=300, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2),
            rngs=nnx.Rngs(0),
        ),
        "gpt2": GPT2(
            GPT2Config(vocab_size=300, n_positions=128, n_embd=width, n_layer=layers, n_head=2),
            rngs=nnx.Rngs(0),
        ),
        "llama": Llama(
            LlamaConfig(
                vocab_size=300,
                hidden_size=width,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=128,
            ),
            rngs=nnx.Rngs(0),
        ),
        "vit": ViT(
            ViTConfig(
                image_size=8,
                patch_size=4,
                hidden_size=width,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
            ),
            rngs=nnx.Rngs(0),
        ),
    }
    for name, model in models.items():
        files = {} if name == "vit" else tokenizer.files
        checkpoints.save(model, folder / "models" / name, files)

    lines = {
        "pairs": [{"source": source, "target": target} for source, target in PAIRS],
        "texts": [{"text": " ".join(8 * pair)} for pair in PAIRS],
    }
    for kind, objects in lines.items():
        (folder / kind).mkdir()
        for split in ("train", "validation", "test"):
            text = "".join(json.dumps(item) + "\n" for item in objects)
            (folder / kind / f"{split}.jsonl").write_text(text)
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        np.savez(
            folder / "images" / f"{split}.npz",
            images=rng.integers(0, 256, (20, 8, 8, 3)).astype(np.uint8),
            labels=np.arange(20) % 2,
            class_names=np.array(["left", "right"]),
        )


def write_few_pairs(folder):
    """The first of the repository's pairs."""
    for split, count in zip(SPLITS, (400, 40, 40), strict=True):
        name = f"{split}.jsonl.gz"
        with gzip.open(PAIRS_OF_THE_REPOSITORY / name, "rt", encoding="utf-8") as lines:
            text = "".join(next(lines) for _ in range(count))
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.write(text)


def command_of(script, *arguments):
    return [sys.executable, str(REPOSITORY / f"examples/{script}.py"), *map(str, arguments)]


def environment(**variables):
    """That of a process which runs a script, with these variables in it."""
    path = [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)} | variables


def start(script, *arguments, **variables):
    """A process that runs a script."""
    return subprocess.Popen(
        command_of(script, *arguments),
        env=environment(**variables),
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def end_of(output):
    """The best weights and the curve of a run by `flora`."""
    results = json.loads((output / "flora" / "results.json").read_text())
    return (output / "flora" / "best" / "model.safetensors").read_bytes(), results["curve"]


# For the loop alone.

CONFIG = GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2)


def losses(model, rows):
    inputs, labels = rows[:, :-1], rows[:, 1:]
    logits, _ = model(inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), labels >= 0


def task():
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 4, (80, 1))
    rows = ((rng.integers(0, 20, (80, 1)) + steps * np.arange(6)) % 20).astype(np.int32)
    return training.Task(
        losses=losses,
        train=rows[:70],
        validation=rows[70:],
        unit="tokens",
        units=5,
        learning_rates=dict.fromkeys(("none", "naive", "lora", "flora"), 0.01),
        files={"vocabulary.txt": b"0 1 2"},
    )


def settings(tmp_path, **changes):
    return Training(
        **{
            "output": tmp_path,
            "updates": 6,
            "micro_batch": 4,
            "accumulate": 3,
            "rank": 4,
            "resample_every": 4,
            "evaluations": 2,
            "heldout_batch": 8,
        }
        | changes
    )


def train(s):
    # The loop does not look at `method`, so that "all" can hand it one after the other.
    return training.train(s, s.method, GPT2(CONFIG, rngs=nnx.Rngs(0)), task())


def weights(trained):
    return safetensors.numpy.load_file(trained.best / "model.safetensors")


class InterruptedAfter(training.Interruption):
    """Ctrl-C after some steps; the loop looks once a step."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    @property
    def asked(self):
        self.left -= 1
        return self.left <= 0

    @asked.setter
    def asked(self, value):
        pass
