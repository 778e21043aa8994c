"""The training loop of the examples: what every script promises of a run."""

import dataclasses
import functools

import extras
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

extras.need("examples")

from tiny import InterruptedAfter, settings, train, weights

from florax_examples import batches, training
from florax_examples.losses import chunked_cross_entropy
from florax_examples.report import format_table, human

# Runs of a few steps: most of their time is that of the compiler.


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"method": "flora", "gradients": "dense"}, marks=pytest.mark.slow),
        pytest.param({"method": "lora"}, marks=pytest.mark.slow),
        pytest.param({"method": "flora"}, marks=pytest.mark.slow),
        pytest.param({"method": "none"}, marks=pytest.mark.slow),
        pytest.param({"method": "naive", "optimizer": "adamw"}, marks=pytest.mark.slow),
        pytest.param({"method": "flora", "scan": True, "layerwise": True}, marks=pytest.mark.slow),
        pytest.param({"method": "flora", "mesh": "data=2,model=2"}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_resumed_run_ends_with_the_same_bits(changes, tmp_path, monkeypatch):
    whole = train(settings(tmp_path / "whole", **changes))

    parts = settings(tmp_path / "parts", **changes)
    whole_updates = changes["method"] == "flora" and "gradients" not in changes
    # In the dense case after 10 of 18 micro-batches: in the middle of the fourth cycle of three.
    monkeypatch.setattr(
        training, "Interruption", lambda: InterruptedAfter(3 if whole_updates else 10)
    )
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 3}, "was trained with rank=4, got rank=3: resume with the same settings"),
        ({"resume": False}, "holds a run that was interrupted: add --resume to go on with it"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_only(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "Interruption", lambda: InterruptedAfter(1))
    s = settings(tmp_path, method="none", accumulate=1)
    with pytest.raises(SystemExit, match="interrupted at update 1"):
        train(s)
    with pytest.raises(SystemExit, match=message):
        train(dataclasses.replace(s, **{"resume": True} | changes))


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    s = settings(tmp_path, method="none", accumulate=1, resume=True)
    first = train(s)
    monkeypatch.setattr(training, "_Run", None)
    again = train(s)
    assert again.figures == first.figures
    assert again.best == first.best


# On several devices, of which the tests have eight.

FLOAT = {"accumulator_dtype": "float32", "momentum_dtype": "float32"}  # which rounds alike


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, changes",
    [
        ("data=2,model=2", FLOAT | {"method": "flora", "accumulator": "sketch"}),
        ("data=2,model=2", FLOAT | {"method": "flora", "scan": True}),
        ("data=4", FLOAT | {"method": "flora"}),
        ("model=4", {"method": "naive"}),
        ("model=2", {"method": "lora"}),
        ("data=2,model=2", FLOAT | {"method": "flora", "scan": True, "layerwise": True}),
    ],
)
def test_a_run_on_several_devices_is_that_on_one(mesh, changes, tmp_path, monkeypatch):
    changes = changes | {"updates": 3, "accumulate": 2, "evaluations": 1}
    one = train(settings(tmp_path / "one", **changes)).curve
    runs = []

    class Watched(training._Run):
        def figures(self):
            runs.append(self)
            return super().figures()

    monkeypatch.setattr(training, "_Run", Watched)
    several = train(settings(tmp_path / "several", mesh=mesh, **changes)).curve
    # Not the weights: a key's bias changes no attention, and Adafactor enlarges the roundings that
    # are its gradient. Losses are sums of float32 numbers, and see roundings of each step.
    np.testing.assert_allclose(several.train, one.train, rtol=1e-4)
    np.testing.assert_allclose(several.heldout, one.heldout, rtol=1e-4)
    (run,) = runs
    for arrays in (run.params, run.state):
        divided = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(arrays)]
        assert any(divided) == ("model" in mesh)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesh": "data"}, "mesh must be like data=2,model=1, got 'data'"),
        ({"mesh": "rows=2"}, "mesh must be like"),
        ({"mesh": "data=0"}, "mesh must be like"),
        (
            {"mesh": "data=3"},
            "micro_batch=4 cannot be divided among 3 devices, those of mesh=data=3",
        ),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


def test_more_devices_than_there_are_end_the_script_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"mesh=data=16 has 16 devices, here are 8"):
        train(settings(tmp_path, mesh="data=16", micro_batch=16))


def test_every_epoch_shows_every_example_once_in_a_new_order():
    data = {"x": np.arange(10)}
    shuffled = batches.Shuffled(data, size=5, seed=0)
    epochs = [np.concatenate([shuffled[i]["x"], shuffled[i + 1]["x"]]) for i in (0, 2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert list(epochs[0]) != list(epochs[1])
    np.testing.assert_array_equal(shuffled.stacked(2, 2)["x"].ravel(), epochs[1])
    # What a micro-batch holds does not depend on those before it.
    alone = batches.Shuffled(data, size=5, seed=0)[3]["x"]
    np.testing.assert_array_equal(alone, shuffled[3]["x"])
    with pytest.raises(ValueError, match="micro-batch of 11 needs as many examples, got 10"):
        batches.Shuffled(data, size=11, seed=0)


def test_the_last_batch_of_held_out_examples_is_filled_up_and_says_so():
    found = list(batches.in_order(np.arange(7), 3))
    assert [rows[real].tolist() for rows, real in found] == [[0, 1, 2], [3, 4, 5], [6]]
    assert {len(rows) for rows, _ in found} == {3}


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
