"""How long does florax take on the host: to be imported, and to report on a model of GPT-3's size?

    python benchmarks/host_time.py

The import is what florax adds to that of optax. `florax.state_report` is asked about GPT-3's 96
layers of six matrices with their biases, as leaves of their own and stacked; nothing is allocated.
Times are the processor's, so that other work on the machine does not count, and medians.
"""

import dataclasses
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import florax
from florax_benchmarks import results, tables

LAYERS, WIDTH = 96, 12288
MATRICES = {
    **dict.fromkeys(("query", "key", "value", "out"), (WIDTH, WIDTH)),
    "up": (WIDTH, 4 * WIDTH),
    "down": (4 * WIDTH, WIDTH),
}
IMPORT = """
import time, optax
start = time.process_time()
import florax
print(time.process_time() - start)
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    rank: int = 256  # of the sketches
    rounds: int = 5  # timed runs of each
    results: Path = results.FOLDER  # folder for the JSON


def shapes(*stack: int) -> dict[str, Any]:
    """The parameters of a layer, or of a stack of layers."""
    layer = MATRICES | {f"{name}_bias": shape[-1:] for name, shape in MATRICES.items()}
    return {k: jax.ShapeDtypeStruct((*stack, *shape), jnp.float32) for k, shape in layer.items()}


def measure(s: Settings) -> dict[str, Any]:
    stack = florax.FloraDimensionNumbers(rows=1, columns=2, batch=0)

    def imported() -> float:
        command = [sys.executable, "-c", IMPORT]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def reported(params: Any) -> float:
        momentum = florax.flora_momentum(
            lambda path, leaf: None if "bias" in path[-1].key else s.rank,  # a stack of them is 2-D
            dimension_numbers=lambda path, leaf: stack if len(leaf.shape) == 3 else None,
        )
        start = time.process_time()
        florax.state_report(momentum, params)
        return time.process_time() - start

    seconds = {
        "import of florax beyond optax": imported,
        "report of 1,152 leaves": lambda: reported([shapes()] * LAYERS),
        "report of 12 stacks": lambda: reported(shapes(LAYERS)),
    }
    medians = {name: statistics.median(f() for _ in range(s.rounds)) for name, f in seconds.items()}
    return {"milliseconds": {name: round(x * 1e3, 2) for name, x in medians.items()}}


def main(s: Settings) -> None:
    row = results.get(s.results, "host_time", {"rank": s.rank}, lambda: measure(s))
    print(tables.host_time([row]))


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))
