"""Importing florax is free: no device is touched, hardly any time passes, no name is missing."""

import os
import statistics
import subprocess
import sys

import florax

PUBLIC_NAMES = {
    "FloraAccumulateState",
    "FloraDimensionNumbers",
    "FloraMomentumState",
    "GradientReport",
    "PerLayerState",
    "Sketch",
    "StateReport",
    "accumulate",
    "attention_and_feed_forward",
    "finish",
    "flora",
    "flora_accumulate",
    "flora_momentum",
    "gradient_report",
    "has_updated",
    "layerwise_value_and_update",
    "microbatch_accumulator",
    "per_layer",
    "state_report",
    "value_and_grad",
    "value_and_update",
}


def python(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_the_public_names_are_the_documented_ones():
    assert {name for name in dir(florax) if not name.startswith("_")} == PUBLIC_NAMES
    assert all(getattr(florax, name).__doc__ for name in PUBLIC_NAMES)
    assert florax.__version__


def test_importing_starts_no_backend():
    """Where there is none to start: importing works, allocating an array does not."""
    program = "import florax; print('imported'); import jax; jax.numpy.zeros(1)"
    run = python(program, JAX_PLATFORMS="no_such_platform")
    assert run.stdout == "imported\n"
    assert run.returncode != 0 and "no_such_platform" in run.stderr


def test_importing_adds_less_than_a_tenth_of_a_second_to_importing_optax():
    """In time of the processor, so that other work on the machine does not count."""
    program = """
import sys, time, optax
for _ in range(3):
    start = time.process_time()
    import florax
    print(time.process_time() - start)
    for name in [name for name in sys.modules if name.partition(".")[0] == "florax"]:
        del sys.modules[name]
"""
    seconds = [float(line) for line in python(program).stdout.split()]
    assert len(seconds) == 3 and statistics.median(seconds) < 0.1
