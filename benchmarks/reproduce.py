r"""The tables of FLORA's paper, at a size that trains in minutes; or at the paper's own.

    python benchmarks/reproduce.py --experiment 1b --data DATA
    python benchmarks/reproduce.py --experiment 1b --parts memory
    python benchmarks/reproduce.py --experiment 1b --parts full-size

An experiment is a table of the paper (1a and 1b are the halves of its Table 1, 2a and 2b its Table
2 for T5 and GPT-2), its `figure-2`, or `frontier`, which draws quality against bytes beyond it.
`quality` trains small models in all variants (see quality.py), `memory` compiles steps of the
paper's models (see footprint.py), and `full-size` runs the commands that examples/README.md has for
this table. `report.py` prints what came out beside what the paper reports.

The folder DATA has the data sets by name: multi30k, tatoeba_deen and iwslt17_test for translation;
scitldr and xsum for summarization; lm_imdb and lm_gutenberg; cifar100. MODELS has the models that
are fine-tuned: smollm2, made by examples/convert_gguf.py or of the hub, and t5, made by

    python benchmarks/quality.py --task denoising --data DATA/lm_imdb DATA/lm_gutenberg --seeds 1 \
        --variants none+float32 --save MODELS/t5
"""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, TypeAlias

import footprint
import quality
from florax_benchmarks import paper, results

ExperimentName: TypeAlias = Literal[paper.EXPERIMENTS]
Part: TypeAlias = Literal["quality", "memory", "full-size"]


@dataclasses.dataclass(frozen=True)
class Settings:
    experiment: ExperimentName  # a table of the paper, or frontier
    parts: tuple[Part, ...] = ("quality",)  # what to run of it
    data: Path = Path("data")  # folder with the data sets by name
    models: Path = Path("models")  # folder with models to fine-tune, by name
    task: str | None = None  # only this one, of experiments with several
    variants: tuple[str, ...] = ()  # only these
    seeds: int = 3  # of each variant
    results: Path = results.FOLDER  # folder for the JSON; what it has is not measured again


def learn(s: Settings, sweep: paper.Sweep) -> None:
    chosen = tuple(v for v in sweep.variants if v in (s.variants or sweep.variants))
    own = arguments(sweep, s.data, s.models)
    quality.main(quality.Settings(variants=chosen, seeds=s.seeds, results=s.results, **own))


def arguments(sweep: paper.Sweep, data: Path, models: Path) -> dict[str, Any]:
    """Those of `quality` that say what a sweep's task is."""
    name = paper.MODELS.get(sweep.task)
    return {
        "task": sweep.task,
        "data": tuple(str(data / own) for own in paper.DATA[sweep.task]),
        "test": tuple(str(data / own) for own in paper.TEST.get(sweep.task, ())),
        "model": str(models / name) if name else None,
        **sweep.changes,
    }


def compile_steps(s: Settings, own: paper.Footprint) -> None:
    chosen = tuple(name for name in own.variants if name in (s.variants or own.variants))
    footprint.main(
        footprint.Settings(model=own.model, variants=chosen, results=s.results, **own.arguments)
    )


def run_at_full_size(s: Settings) -> None:
    text = (results.REPOSITORY / "examples/README.md").read_text()
    number = s.experiment.rstrip("ab")
    common, block = (
        re.search(rf"{start}.*?```sh\n(.*?)```", text, re.DOTALL)
        for start in ("## The settings of the paper", rf"\*\*Table {number}\*\*")
    )
    if block is None:
        sys.exit(f"error: examples/README.md has no commands for {s.experiment}")
    sys.exit(subprocess.call(["bash", "-c", common[1] + block[1]], cwd=results.REPOSITORY))


def main(s: Settings) -> None:
    if "memory" in s.parts:
        for own in paper.footprints(s.experiment):
            compile_steps(s, own)
    if "quality" in s.parts:
        for sweep in paper.sweeps(s.experiment):
            if s.task in (None, sweep.task):
                learn(s, sweep)
    if "full-size" in s.parts:
        run_at_full_size(s)


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))
