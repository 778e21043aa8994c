"""Eight host devices; compiled programs are freed after each module, and kept for the next run.

With `JAX_PLATFORMS=cuda,cpu` in the environment the tests run on GPUs; `meshes.make` skips those
that need more devices than there are.
"""

import gc
import os
from pathlib import Path

# On the CPU also where there is a GPU.
ON_CPU = os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu"
if not ON_CPU:
    # A GPU multiplies float32 in TF32 unless it is told, and tolerances are float32's.
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    # Processes that share it take its memory as they need it.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
# What compiled before does not compile again, in another process or another run: most of the time
# that the tests take. `pytest --cache-clear` empties the folder "d".
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".pytest_cache/d/compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
# XLA reads its flags when JAX is first used.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Eight devices' programs wait for each other in threads: as many as there are cores are too few,
# and two programs on their way hang.
os.environ.setdefault("NPROC", "32")

import jax
import pytest

# XLA compiles faster without its optimizations, and tests are about values: without them the same
# products come out the same, too. Tests of what XLA makes of a program name `optimized`.
jax.config.update("jax_disable_most_optimizations", ON_CPU)


def pytest_collection_finish():
    # Tracing makes many objects that live on: what is there by now is not looked through again, and
    # the rest more seldom.
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def free_compiled_programs():
    # Every program that XLA compiles for the CPU holds on to memory maps, of which a process may
    # have 65,530; a whole run of the tests would need more.
    yield
    jax.clear_caches()


@pytest.fixture
def optimized():
    """What is compiled in a test that names it is compiled as ever: products and sums are fused."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", ON_CPU)
