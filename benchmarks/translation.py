"""What do small accumulators and momentum cost in BLEU?

`examples/gpt2.py`, in one variant after the other.

    python benchmarks/translation.py --variants naive int8 int4 int2 40-float32 --seeds 0 1 2

`naive` keeps accumulator and momentum at full size in float32, `none` neither, with an update after
every micro-batch. What the others accumulate in is a dtype for full size, or a rank and one: `int4`
a full-size accumulator in 4 bits, embedding and all, `40-int8` sketches of rank 40 in 8 bits,
`40-both-int8` of both sides in the same bytes. Their momentum has the same rank, or 40, a quarter
of the width; it is with `residual`, and in 8 bits where the accumulator is in integers.
"""

import dataclasses
import functools
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

from florax_benchmarks import results, tables, variants

sys.path.append(str(results.REPOSITORY / "examples"))
import gpt2


@dataclasses.dataclass(frozen=True)
class Settings:
    variants: tuple[str, ...] = ("naive", "int8", "int4", "40-float32")  # to compare
    seeds: tuple[int, ...] = (0, 1, 2)  # of weights, order of the data and projections
    updates: int = 1500  # of the optimizer
    micro_batch: int = 16  # pairs in a micro-batch
    accumulate: int = 4  # micro-batches an update
    results: Path = results.FOLDER  # folder for the JSON; what it has is not measured again

    def __post_init__(self):
        for variant in self.variants:
            arguments(variant)  # says what is wrong with it


def arguments(variant: str) -> dict[str, Any]:
    """The settings of the script that make this variant."""
    if variant in ("naive", "none"):
        return {"method": variant}
    parsed = variants.parse(variant)
    kept = parsed.accumulator
    if kept is None or kept.kind == "paper" or parsed.momentum or parsed.base != "adafactor":
        raise ValueError(f"variants are naive, none, int4, 40-int8, 40-both-int8, got {variant}")
    return {
        "method": "flora",
        "accumulator": "sketch" if kept.kind == "smaller" else kept.kind,
        "accumulator_dtype": kept.dtype,
        "momentum_dtype": "int8" if kept.dtype.startswith("int") else "float32",
        "rank": kept.rank or 40,
    }


def measure(s: Settings, variant: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        own = {name: getattr(s, name) for name in ("updates", "micro_batch", "accumulate")}
        chosen = gpt2.Settings(**arguments(variant), **own, seed=seed, output=Path(folder))
        comparison = gpt2.train(chosen)
    (run,) = comparison.runs
    names = ("accumulator_bytes", "optimizer_bytes", "parameter_bytes", "test_loss", "BLEU")
    return {name: run[name] for name in names}


def main(s: Settings) -> None:
    own = {name: getattr(s, name) for name in ("updates", "micro_batch", "accumulate")}
    rows = []
    for variant, seed in itertools.product(s.variants, s.seeds):
        isolated = functools.partial(results.isolated, measure, s, variant, seed)
        settings = own | {"variant": variant, "seed": seed}
        rows.append(results.get(s.results, "translation", settings, isolated))
    print(f"German to English, ×{s.accumulate}:\n{tables.translation(rows)}")


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))
