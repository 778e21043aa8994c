"""The training loop of the examples: what every script promises of a run."""
# ruff: noqa: E402  what the examples import may not be installed

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

for requirement in ("flax", "matplotlib", "orbax.checkpoint", "tensorboardX", "tqdm", "tyro"):
    pytest.importorskip(requirement)

import safetensors.numpy
from flax import nnx

from common import batches, optimizers, training
from common.settings import Training
from models import checkpoints
from models.gpt2 import GPT2, GPT2Config

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
        learning_rates={method: 1e-2 for method in ("none", "naive", "lora", "flora")},
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


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "flora", "gradients": "dense"},
        {"method": "lora"},
        pytest.param({"method": "flora"}, marks=pytest.mark.slow),
        pytest.param({"method": "none"}, marks=pytest.mark.slow),
        pytest.param({"method": "naive", "optimizer": "adamw"}, marks=pytest.mark.slow),
        pytest.param({"method": "flora", "scan": True, "layerwise": True}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_resumed_run_ends_with_the_same_bits(changes, tmp_path, monkeypatch):
    whole = train(settings(tmp_path / "whole", **changes))

    parts = settings(tmp_path / "parts", **changes)
    whole_updates = changes["method"] == "flora" and "gradients" not in changes
    # In the dense case after 10 of 18 micro-batches: in the middle of the fourth cycle of three.
    monkeypatch.setattr(training, "Interruption", lambda: InterruptedAfter(3 if whole_updates else 10))
    with pytest.raises(SystemExit, match="interrupted at update 3: add --resume"):
        train(parts)
    monkeypatch.undo()
    resumed = train(dataclasses.replace(parts, resume=True))

    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    np.testing.assert_array_equal(resumed.curve.heldout, whole.curve.heldout)
    figures = ("optimizer_bytes", "accumulator_bytes", "last_validation_loss")
    assert [resumed.figures[f] for f in figures] == [whole.figures[f] for f in figures]
    assert not (tmp_path / "parts" / parts.method / "checkpoint").exists()
