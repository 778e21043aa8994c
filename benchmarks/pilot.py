"""Is LoRA a random projection of the gradient, and does resampling recover full updates?

    python benchmarks/pilot.py --data FASHION_MNIST

`examples/projections.py`, the pilot study of FLORA's paper (Figure 1), from several seeds.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

from florax_benchmarks import results, tables

sys.path.append(str(results.REPOSITORY / "examples"))
import projections


@dataclasses.dataclass(frozen=True)
class Settings:
    data: str = projections.Settings.data  # folder with images
    seeds: tuple[int, ...] = (0, 1, 2)  # of weights, order of the data and projections
    steps: int = 4000  # of SGD
    results: Path = results.FOLDER  # folder for the JSON; what it has is not measured again


def measure(s: Settings, seed: int) -> dict[str, Any]:
    own = projections.Settings(data=s.data, seed=seed, steps=s.steps)
    data = {split: projections.load(own, split) for split in ("train", "test")}
    found = {}
    for method in projections.METHODS:
        curve, loss, accuracy = projections.train(own, method, data["train"], data["test"])
        losses = [loss for _, loss in curve.train]
        found[method] = {"training": losses, "test_loss": loss, "accuracy": accuracy}
    return {"examples": [seen for seen, _ in curve.train], "methods": found}


def main(s: Settings) -> None:
    rows = []
    for seed in s.seeds:
        settings = {"data": Path(s.data).name, "steps": s.steps, "seed": seed}
        rows.append(results.get(s.results, "pilot", settings, functools.partial(measure, s, seed)))
    print(f"Fashion-MNIST by SGD, {s.steps:,} steps:\n{tables.pilot(rows)}")


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))
