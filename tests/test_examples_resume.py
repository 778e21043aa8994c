"""Nothing is lost when training is interrupted: killed, out of room, or with damaged files."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import extras
import jax
import jax.numpy as jnp
import numpy as np
import pytest

extras.need("examples")

from flax import nnx
from tiny import (
    InterruptedAfter,
    command_of,
    end_of,
    environment,
    settings,
    start,
    train,
    weights,
    write_few_pairs,
)

from florax_examples import resume, tokenization, training
from florax_examples.datasets import load_pairs
from florax_examples.models import checkpoints
from florax_examples.models.checkpoints import CheckpointError
from florax_examples.models.gpt2 import GPT2, GPT2Config
from florax_examples.report import as_json
from florax_examples.resume import Checkpoints

# Runs of a few steps: most of their time is that of the compiler.


def assert_same_end(found, expected):
    """The best weights and the curve, to the bit."""
    own, others = weights(found), weights(expected)
    assert own.keys() == others.keys()
    for name, array in others.items():
        np.testing.assert_array_equal(own[name], array, strict=True)
    for losses in ("train", "heldout"):
        np.testing.assert_array_equal(getattr(found.curve, losses), getattr(expected.curve, losses))
    assert found.figures["validation_loss"] == expected.figures["validation_loss"]


# A checkpoint.


def state(step):
    key = jax.random.key(step)
    return {"params": jax.random.normal(key, (64, 64)), "count": jnp.int32(step)}


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
    # Orbax reads it without an error, and other numbers.
    "a changed bit": lambda path: path.write_bytes(
        bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]
    ),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "checkpoint"
    for step in (10, 20):
        Checkpoints(folder).save(step, state(step), {"step": step})
    return folder


def test_of_a_checkpoint_that_is_cut_short_the_one_before_it_is_used(two, tmp_path, capsys):
    files = [path.relative_to(two) for path in (two / "20").rglob("*") if path.is_file()]
    assert len(files) > 5
    copy = tmp_path / "checkpoint"
    shutil.copytree(two, copy)
    for file in files:
        content = (copy / file).read_bytes()
        for name, damage in DAMAGES.items():
            damage(copy / file)
            assert Checkpoints(copy).latest() == 10, (file, name)
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"passing over the checkpoint {copy}/20: ")
            (copy / file).write_bytes(content)
    assert Checkpoints(copy).latest() == 20


def test_a_step_that_was_cut_short_is_saved_again(two, tmp_path, capsys):
    copy = tmp_path / "checkpoint"
    shutil.copytree(two, copy)
    shutil.rmtree(copy / "20")
    (copy / "20").mkdir()
    saved = Checkpoints(copy)
    assert saved.latest() == 10
    jax.tree.map(np.testing.assert_array_equal, saved.restore(10, state(0)), state(10))
    saved.save(20, state(20), {"step": 20})
    assert saved.latest() == 20
    assert saved.notes(20) == {"step": 20}
    jax.tree.map(np.testing.assert_array_equal, saved.restore(20, state(0)), state(20))


def test_without_a_whole_checkpoint_there_is_nothing_to_go_on_from(two, tmp_path):
    copy = tmp_path / "checkpoint"
    assert Checkpoints(copy).latest() is None
    (copy / "10").mkdir(parents=True)
    assert Checkpoints(copy).latest() is None  # it was cut short in the first save
    shutil.copytree(two, copy, dirs_exist_ok=True)
    for step in ("10", "20"):
        (copy / step / "notes.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: remove that folder"):
        Checkpoints(copy).latest()


def test_the_last_two_checkpoints_are_kept(two, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(two, copy)
    Checkpoints(copy).save(30, state(30), {})
    assert sorted(path.name for path in copy.iterdir()) == ["20", "30"]


def test_a_checkpoint_that_is_there_is_not_written_again_nor_removed(two, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(two, copy)
    with pytest.raises(CheckpointError, match="20 is there already"):
        Checkpoints(copy).save(20, state(30), {})
    assert Checkpoints(copy).latest() == 20


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where, name, replacement, reason",
    [
        # Before Orbax writes anything, after it has, and where a folder is made.
        (shutil, "disk_usage", lambda _: SimpleNamespace(free=0), "it needs 16.0 KiB"),
        (resume, "write_json", full, "No space left on device"),
        (Path, "mkdir", full, "No space left on device"),
    ],
)
def test_a_save_that_fails_leaves_the_last_checkpoint(
    where, name, replacement, reason, two, tmp_path, monkeypatch
):
    copy = tmp_path / "checkpoint"
    shutil.copytree(two, copy)
    saved = Checkpoints(copy)
    monkeypatch.setattr(where, name, replacement)
    with pytest.raises(CheckpointError, match=f"30 cannot be written: .*{reason}"):
        saved.save(30, state(30), {})
    monkeypatch.undo()
    assert not (copy / "30").exists()
    assert saved.latest() == 20
    saved.save(30, state(30), {})
    jax.tree.map(np.testing.assert_array_equal, saved.restore(30, state(0)), state(30))


# A run.

EVERY_UPDATE = {
    "method": "none",
    "accumulate": 1,
    "save_every": 1,
    "updates": 3,
    "evaluations": 3,
    # So large that the second of the three validation losses is the best.
    "learning_rate": 3.0,
    "schedule": "constant",
    "warmup": 0.0,
}


@contextlib.contextmanager
def copies(monkeypatch, folder, to):
    """Copies of a folder as it was before each change in it: what a kill then would have left."""
    made = []
    lock = threading.RLock()  # Orbax makes changes in several threads: one at a time, each copied

    def seen():
        found = {}
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                found[path] = status.st_ino, status.st_size, status.st_mtime_ns
        return found

    def copied():
        """As it was at one moment: TensorStore's threads, which no lock holds up, write meanwhile.

        A copy that met a change may lack a file, or have a new one beside an old one, which no kill
        would have left: it is made again.
        """
        to_here = to / str(len(made))
        while True:
            before, failed = seen(), None
            try:
                shutil.copytree(folder, to_here)
            except shutil.Error as error:
                failed = error
            if seen() == before:
                if failed:
                    raise failed
                return to_here
            shutil.rmtree(to_here)

    def copying(change):
        def wrapped(path, *args, **kwargs):
            with lock:
                if not made or made[-1] is not None:
                    made.append(None)  # a copy changes nothing that is to be copied
                    made[-1] = copied()
                return change(path, *args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "rmdir", "unlink"):
            patch.setattr(os, name, copying(getattr(os, name)))
        yield made


def progress(s, output):
    """The updates that need not be made again."""
    if (output / "none" / "results.json").is_file():
        return s.updates
    return Checkpoints(output / "none" / "checkpoint").latest() or 0


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.02, 1], ids=["some", "all"])
def test_a_run_goes_on_from_whatever_is_there(share, tmp_path, monkeypatch):
    """As if it had been killed before a change of the file system: some of them, or each."""
    s = settings(tmp_path / "run", **EVERY_UPDATE)
    (tmp_path / "run").mkdir()
    with copies(monkeypatch, tmp_path / "run", tmp_path) as made:
        whole = train(s)
    assert np.argmin([loss for _, loss in whole.curve.heldout]) == 1
    reached = [progress(s, copy) for copy in made]
    assert reached == sorted(reached)
    assert {*reached} == {0, 1, 2, 3}
    for copy in random.Random(0).sample(made, int(share * len(made))):
        assert_same_end(train(dataclasses.replace(s, output=copy, resume=True)), whole)
        left = sorted(path.name for path in (copy / "none").iterdir())
        assert left == ["best", "results.json", "tensorboard"]


FREE = ("resume", "output", "save_every", "method", "mesh", "distributed")  # `method` has folders
SETTINGS = [name for name in as_json(settings(Path())) if name not in FREE]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_changes_the_numbers_must_be_that_of_before(name, tmp_path):
    s = settings(tmp_path, method="none", resume=True)
    earlier = as_json(s) | {name: "another"}
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "results.json").write_text(json.dumps({"settings": earlier}))
    message = f"was trained with {name}=another, got {name}={getattr(s, name)}: resume with the"
    with pytest.raises(SystemExit, match=re.escape(message)):
        train(s)


FLOAT = {"accumulator_dtype": "float32", "momentum_dtype": "float32"}  # which rounds alike


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flora", "naive"])
@pytest.mark.parametrize("other", ["data=2,model=2", ""])
def test_a_run_goes_on_on_another_mesh(method, other, tmp_path, monkeypatch):
    s = settings(tmp_path / "whole", method=method, mesh="data=2", evaluations=6, **FLOAT)
    whole = train(s)
    parts = dataclasses.replace(s, output=tmp_path / "parts")
    monkeypatch.setattr(training, "Interruption", lambda: InterruptedAfter(3))
    with pytest.raises(SystemExit, match="add --resume"):
        train(parts)
    monkeypatch.undo()
    resumed = train(dataclasses.replace(parts, resume=True, mesh=other))
    # Losses are sums of float32 numbers, and see the roundings of each step.
    for losses in ("train", "heldout"):
        own, others = getattr(resumed.curve, losses), getattr(whole.curve, losses)
        np.testing.assert_allclose(own[-1], others[-1], rtol=1e-4)
        assert len(own) >= len(others)


# A script.

SAVING = ("--accumulate=1", "--save-every=1", "--micro-batch=4", "--scored=4", "--heldout-batch=40")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Arguments for a small model with a tokenizer, and few pairs."""
    folder = tmp_path_factory.mktemp("small")
    write_few_pairs(folder)
    texts = (f"{pair.source} {pair.target}" for pair in load_pairs(folder, "train"))
    config = GPT2Config(vocab_size=300, n_positions=128, n_embd=32, n_layer=1, n_head=2)
    model = GPT2(config, rngs=nnx.Rngs(0))
    checkpoints.save(model, folder / "model", tokenization.train(texts, 300).files)
    return ("--model", folder / "model", "--data", folder, "--length=96", "--rank=8")


def uninterrupted(output, small, length):
    """The end of a run that nothing interrupts."""
    process = start("gpt2", "--output", output, *small, *SAVING, *length)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return end_of(output)


KILLS = 10  # of a run
LONG = ("--updates=150", "--evaluations=30")


@pytest.fixture(scope="module")
def never_killed(small, tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("never_killed"), small, LONG)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_script_killed_at_any_time_ends_with_the_same_bits(seed, small, never_killed, tmp_path):
    rng = random.Random(seed)
    command = ("gpt2", "--resume", "--output", tmp_path, *small, *SAVING, *LONG)
    for _ in range(KILLS):
        process = start(*command)
        while "loss " not in (text := process.stderr.read(20)):
            assert text, "it ended by itself"
        time.sleep(rng.uniform(0, 1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended by itself"
    process = start(*command)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert end_of(tmp_path) == never_killed


SHORT = ("--updates=20", "--evaluations=5")
# In a mount namespace of its own: a disk that is full, and later is not.
FULL_DISK = """
mount -t tmpfs -o size={kib}k tmpfs {disk}
{command} 2> {disk}.first
status=$?
ls {disk}/flora/checkpoint > {disk}.left
mount -o remount,size=100m {disk}
{command} --resume 2> {disk}.second && cp -r {disk}/flora {disk}.end
exit $status
"""


@pytest.fixture(scope="module")
def never_full(small, tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("never_full"), small, SHORT)


@pytest.mark.slow
# A checkpoint takes about 350 KiB, as soon as there are two of them they stay two.
@pytest.mark.parametrize("kib", [400, 820, 900])
def test_a_run_goes_on_once_a_full_disk_has_room(kib, small, never_full, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"unshare -rm mount -t tmpfs tmpfs {disk}"
    if not shutil.which("unshare") or subprocess.run(mount.split()).returncode:
        pytest.skip("needs a system where a user may mount")
    command = shlex.join(command_of("gpt2", "--output", disk, *small, *SAVING, *SHORT))
    shell = FULL_DISK.format(kib=kib, disk=disk, command=command)
    process = subprocess.run(["unshare", "-rm", "sh", "-c", shell], env=environment(), timeout=600)
    assert process.returncode == 1
    lines = re.split(r"[\r\n]+", disk.with_suffix(".first").read_text())
    others = [line for line in lines if line and "micro-batches" not in line]
    assert len(others) == 1, others
    assert re.match(r"error: .* cannot be written: .*(No space left on device|are free)", others[0])
    assert disk.with_suffix(".left").read_text()
    second = disk.with_suffix(".second").read_text()
    assert " 0/20" not in second  # it did go on
    (tmp_path / "disk.end").rename(tmp_path / "flora")
    assert end_of(tmp_path) == never_full
