"""The scripts in two processes, which `jax.distributed` brings together: as in one, to the bit."""

import json
import signal
import socket

import extras
import numpy as np
import pytest

extras.need("examples")

from tiny import end_of, start, write_folders

# Four processes of every test want two cores.
pytestmark = pytest.mark.slow

SCRIPTS = {
    "t5": ("pairs", "--source-length=16", "--target-length=6", "--scored=2"),
    "gpt2": ("pairs", "--length=96", "--new-tokens=2", "--scored=2"),
    "llama": ("texts", "--length=96", "--new-tokens=2"),
    "vit": ("images",),
}
SMALL = ("--micro-batch=4", "--accumulate=2", "--rank=3", "--heldout-batch=4", "--evaluations=2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_folders(folder)
    return folder


def arguments(script, folders, output, *more):
    kind, *own = SCRIPTS[script]
    places = ("--model", folders / "models" / script, "--data", folders / kind, "--output", output)
    return (script, *places, *own, *SMALL, *more)


def options(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {"XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def start_two(command, devices):
    """Two processes with so many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        start(*command, "--distributed", **options(devices), **told, JAX_PROCESS_ID=str(i))
        for i in range(2)
    ]


def outputs(processes, code=0):
    """What they print, and their errors, when they end with this code."""
    try:
        found = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), found
    return found


@pytest.mark.parametrize(
    "script, mesh", [(script, "data=2") for script in SCRIPTS] + [("gpt2", "model=2")]
)
def test_two_processes_train_as_one_does_to_the_bit(script, mesh, folders, tmp_path):
    more = ("--mesh", mesh, "--updates=4")
    outputs([start(*arguments(script, folders, tmp_path / "one", *more), **options(2))])
    two = outputs(start_two(arguments(script, folders, tmp_path / "two", *more), devices=1))
    assert end_of(tmp_path / "two") == end_of(tmp_path / "one")
    (first, first_errors), (second, second_errors) = two
    assert json.loads(first.splitlines()[-1])["runs"][0]["method"] == "flora"
    assert "micro-batches" in first_errors
    # The library of collectives greets in each process.
    assert [line for line in second.splitlines() if not line.startswith("[Gloo]")] == []
    assert second_errors == ""


FLOAT = ("--accumulator-dtype=float32", "--momentum-dtype=float32")  # which rounds alike


def test_several_devices_a_process_train_as_one_process_does(folders, tmp_path):
    more = ("--mesh=data=2,model=2", "--updates=4", *FLOAT)
    outputs([start(*arguments("gpt2", folders, tmp_path / "one", *more), **options(4))])
    outputs(start_two(arguments("gpt2", folders, tmp_path / "two", *more), devices=2))
    (_, one), (_, two) = end_of(tmp_path / "one"), end_of(tmp_path / "two")
    # A sum over four devices: in a process first, or in the order of the devices.
    for losses in ("train", "heldout"):
        np.testing.assert_allclose(two[losses], one[losses], rtol=1e-4)


def test_two_processes_stop_together_and_go_on(folders, tmp_path):
    more = ("--mesh=data=2", "--updates=60")
    outputs([start(*arguments("gpt2", folders, tmp_path / "whole", *more), **options(2))])

    command = arguments("gpt2", folders, tmp_path / "parts", *more)
    first, second = start_two(command, devices=1)
    while "loss " not in (text := first.stderr.read(20)):
        assert text, "it ended by itself"
    second.send_signal(signal.SIGINT)  # one of them is enough
    for _, err in outputs([first, second], code=1):
        assert "add --resume to go on from there" in err.splitlines()[-1]
    outputs(start_two((*command, "--resume"), devices=1))
    assert end_of(tmp_path / "parts") == end_of(tmp_path / "whole")


def test_a_mesh_without_the_other_processes_is_refused(folders, tmp_path):
    command = arguments("gpt2", folders, tmp_path, "--mesh=data=2")
    for _, err in outputs(start_two(command, devices=2), code=1):
        assert "mesh=data=2 must have the 4 devices that 2 processes have" in err


def test_without_the_others_it_ends_in_a_sentence(folders, tmp_path):
    command = arguments("gpt2", folders, tmp_path, "--distributed")
    ((_, err),) = outputs([start(*command)], code=1)
    assert err.startswith("error: distributed=True found no other processes: ")
