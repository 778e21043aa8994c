"""Importing florax is free: no device is touched, nothing else imported, no name is missing."""

import os
import subprocess
import sys

import florax

PUBLIC_NAMES = {
    "FloraAccumulateState",
    "FloraDimensionNumbers",
    "FloraMomentumState",
    "Sketch",
    "accumulate",
    "attention_and_feed_forward",
    "finish",
    "flora",
    "flora_accumulate",
    "flora_momentum",
    "gradient_report",
    "has_updated",
    "per_layer",
    "state_report",
    "state_shardings",
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


def test_importing_florax_imports_no_other_package():
    """Beside what Optax and NumPy import themselves."""
    program = """
import sys, numpy, optax
packages = lambda: {name.partition(".")[0] for name in sys.modules}
before = packages()
import florax
print(*packages() - before)
"""
    assert python(program).stdout == "florax\n"
