r"""What do small accumulators and momenta cost in quality, for their bytes?

    python benchmarks/quality.py --task bytes --variants float32 int8 64-float32 64-both-int8
    python benchmarks/quality.py --task translation --data MULTI30K TATOEBA_DEEN \
        --test IWSLT17_TEST --variants none float32 lora-8/float32 64-paper 64-both-int8

Every variant has the best of the same learning rates, by the mean validation loss of its seeds; as
many runs as fill a GPU train at once, compiled to one program. First comes one seed of each rate,
then what may be the best has the others. Where the best is the lowest or highest, rates beyond it
are tried too. Then the test data are scored, by each seed's parameters at that rate.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from florax_benchmarks import results, sweep, tables, tasks, variants

# Of a task, what the settings may say otherwise.
CHOSEN = (
    "learning_rates", "updates", "micro_batch", "accumulate", "resample_every", "at_once",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    task: tasks.TaskName  # what to learn
    variants: tuple[str, ...] = ("float32", "64-paper", "64-both-int8")  # to compare
    data: tuple[str, ...] = ()  # folders to learn from; by default what comes with the repository
    test: tuple[str, ...] = ()  # more folders to be scored on, of translation
    model: str | None = None  # folder of the model that summarization and t5 fine-tune
    seeds: int = 3  # of weights, order of the data and projections
    at_once: int | None = None  # runs of a variant that train at once; None: the task's own
    learning_rates: tuple[float, ...] = ()  # to choose from; by default the task's own
    updates: int | None = None  # of the optimizer; None: the task's own, as the next three
    micro_batch: int | None = None  # examples of a micro-batch
    accumulate: int | None = None  # micro-batches an update
    resample_every: int | None = None  # updates that share a projection of the momentum
    save: Path | None = None  # folder for denoising's weights, of the first seed
    results: Path = results.FOLDER  # folder for the JSON; what it has is not measured again

    def __post_init__(self):
        for variant in self.variants:
            variants.parse(variant)
        if self.save and self.task != "denoising":
            raise ValueError(f"save is for denoising only, got task={self.task}")

    def make_task(self) -> tasks.Task:
        own = {name: value for name in CHOSEN if (value := getattr(self, name))}
        return tasks.make(self.task, self.data, self.model, self.test)._replace(**own)

    def identity(self, task: tasks.Task) -> dict[str, Any]:
        """What identifies a row, but for its variant."""
        folders = {name: [Path(f).name for f in getattr(self, name)] for name in ("data", "test")}
        model = self.model and Path(self.model).name
        own = {name: getattr(task, name) for name in CHOSEN}
        own["learning_rates"] = [*task.learning_rates]
        return {"task": self.task, **folders, "model": model, "seeds": self.seeds, **own}


def mean(losses: Iterable[float]) -> float:
    """Infinite if one of them is not finite."""
    found = float(np.mean([*losses]))
    return found if np.isfinite(found) else np.inf


def next_runs(
    rates: Sequence[float], seeds: int, tried: Mapping[sweep.Run, float], at_once: int
) -> list[sweep.Run]:
    """What to run next to find the best learning rate; nothing once it is found.

    It is the one with the least mean over its seeds. It is found when all seeds have run at it, and
    rates on both sides of it, by half and by twice as much beyond the sweep. What is not needed for
    that comes only to fill up: more seeds, of the better rates first.

    Args:
      rates: the sweep.
      seeds: of each rate, from 0.
      tried: validation losses.
      at_once: as many as train at a time.
    """
    means = {
        rate: mean(loss for run, loss in tried.items() if run.rate == rate)
        for rate in {run.rate for run in tried}
    }
    ranked = sorted(means, key=means.__getitem__) or [*rates]
    needed = [sweep.Run(rate, 0) for rate in rates]
    if means:
        needed += [sweep.Run(ranked[0], seed) for seed in range(seeds)]
    if len(means) > 1 and means[ranked[0]] < np.inf:
        beyond = {min(means): min(means) / 2, max(means): max(means) * 2}
        needed += [sweep.Run(beyond[rate], 0) for rate in ranked[:1] if rate in beyond]
    needed = [run for run in dict.fromkeys(needed) if run not in tried]
    more = (sweep.Run(rate, seed) for rate in ranked for seed in range(seeds))
    others = [run for run in more if run not in tried and run not in needed]
    return [*needed, *others][:at_once] if needed else []


def measure(s: Settings, runs: sweep.Sweep, known: str | None) -> dict[str, Any] | None:
    if (program := results.fingerprint(runs.lowered)) == known and not s.save:
        return None
    task = runs.task
    tried: dict[sweep.Run, sweep.Outcome] = {}
    rounds = 0

    def more() -> list[sweep.Run]:
        losses = {run: outcome.validation for run, outcome in tried.items()}
        return next_runs(task.learning_rates, s.seeds, losses, task.at_once)

    while new := more():
        tried |= zip(new, runs.train(new), strict=True)
        rounds += 1
    rates: dict[float, list[sweep.Outcome]] = {}
    for run in sorted(tried):
        rates.setdefault(run.rate, []).append(tried[run])
    means = {
        rate: mean(own.validation for own in outcomes)
        for rate, outcomes in rates.items()
        if len(outcomes) == s.seeds
    }
    best = min(means, key=means.__getitem__)
    scores = [task.score(own.params) for own in rates[best]]
    if s.save:
        task.save(rates[best][0].params, s.save)
    return {
        "program": program,
        **runs.bytes,
        "learning_rate": best,
        "losses": [own.test for own in rates[best]],
        "scores": {name: [own[name] for own in scores] for name in scores[0]},
        "tried": [*rates],
        "sweep": [[own.validation for own in outcomes] for outcomes in rates.values()],
        "update_ms": round(1e3 * runs.seconds / rounds / task.at_once / task.updates, 3),
    }


def main(s: Settings) -> None:
    task = s.make_task()
    rows = []
    for variant in s.variants:
        runs = sweep.Sweep(task, variant, task.at_once)
        settings = s.identity(task) | {"variant": variant}
        measured = functools.partial(measure, s, runs)
        rows.append(results.get_of_program(s.results, "quality", settings, measured))
        print(f"{variant}: {np.mean(rows[-1]['losses']):.4f}", flush=True)
    print(f"\n{s.task}, ×{task.accumulate}, nats a {task.unit}:\n{tables.quality(rows)}")


if __name__ == "__main__":
    main(results.settings(Settings, f"{__doc__}\n{tasks.__doc__}\n{variants.__doc__}"))
