r"""What do small accumulators and momenta cost in quality, for their bytes?

    python benchmarks/quality.py --task bytes --variants float32 int8 64-float32 64-both-int8
    python benchmarks/quality.py --task translation --data MULTI30K TATOEBA_DEEN \
        --test IWSLT17_TEST --variants none float32 lora-8/float32 64-paper 64-both-int8

Every variant has the best of the same learning rates, by the mean validation loss of its seeds; all
of them train at once, compiled to one program. Where the best is the lowest or highest, rates
beyond it are tried too. Then the test data are scored, by each seed's parameters at that rate.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from florax_benchmarks import results, sweep, tables, tasks, variants


@dataclasses.dataclass(frozen=True)
class Settings:
    task: tasks.TaskName  # what to learn
    variants: tuple[str, ...] = ("float32", "64-paper", "64-both-int8")  # to compare
    data: tuple[str, ...] = ()  # folders to learn from; by default what comes with the repository
    test: tuple[str, ...] = ()  # more folders to be scored on, of translation
    model: str | None = None  # folder of the model that summarization and t5 fine-tune
    seeds: int = 3  # of weights, order of the data and projections
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
        names = ("learning_rates", "updates", "micro_batch", "accumulate", "resample_every")
        own = {name: value for name in names if (value := getattr(self, name))}
        return tasks.make(self.task, self.data, self.model, self.test)._replace(**own)

    def identity(self, task: tasks.Task) -> dict[str, Any]:
        """What identifies a row, but for its variant."""
        names = ("learning_rates", "updates", "micro_batch", "accumulate", "resample_every")
        folders = {name: [Path(f).name for f in getattr(self, name)] for name in ("data", "test")}
        model = self.model and Path(self.model).name
        own = {name: getattr(task, name) for name in names}
        own["learning_rates"] = [*task.learning_rates]
        return {"task": self.task, **folders, "model": model, "seeds": self.seeds, **own}


class Rate(NamedTuple):
    """What came of one learning rate, by seed."""

    validation: np.ndarray
    test: np.ndarray
    params: list[Any]

    @classmethod
    def each(cls, outcome: sweep.Outcome) -> Iterator["Rate"]:
        for i, (validation, test) in enumerate(zip(outcome.validation, outcome.test, strict=True)):
            seeds = range(len(test))
            params = [jax.tree.map(lambda x, i=i, j=j: x[i, j], outcome.params) for j in seeds]
            yield cls(validation, test, params)

    @property
    def mean(self) -> float:
        return float(np.where(np.isfinite(self.validation), self.validation, np.inf).mean())


def beyond(means: dict[float, float]) -> float | None:
    """Of mean losses by learning rate: the rate to try next, if the best has none on one side."""
    rates = sorted(means)
    best = min(rates, key=lambda rate: means[rate])
    if len(rates) == 1 or not np.isfinite(means[best]):
        return None
    return {rates[0]: best / 2, rates[-1]: best * 2}.get(best)


def measure(
    s: Settings, variant: str, prepared: sweep.Sweep, known: str | None
) -> dict[str, Any] | None:
    if (program := results.fingerprint(prepared.lowered)) == known:
        return None
    task = prepared.task
    outcome = sweep.run(prepared)
    update_seconds = outcome.seconds / task.updates / outcome.test.size
    tried = dict(zip(task.learning_rates, Rate.each(outcome), strict=True))
    while rate := beyond({rate: own.mean for rate, own in tried.items()}):
        more = sweep.run(sweep.prepare(task, variant, (rate,), s.seeds))
        tried[rate] = next(Rate.each(more))
    tried = dict(sorted(tried.items()))
    best = min(tried, key=lambda rate: tried[rate].mean)
    scores = [task.score(params) for params in tried[best].params]
    if s.save:
        task.save(tried[best].params[0], s.save)
    return {
        "program": program,
        **prepared.bytes,
        "learning_rate": best,
        "losses": tried[best].test.tolist(),
        "scores": {name: [own[name] for own in scores] for name in scores[0]},
        "tried": [*tried],
        "sweep": [own.validation.tolist() for own in tried.values()],
        "update_ms": round(1e3 * update_seconds, 3),
    }


def main(s: Settings) -> None:
    task = s.make_task()
    rows = []
    for variant in s.variants:
        prepared = sweep.prepare(task, variant, task.learning_rates, s.seeds)
        settings = s.identity(task) | {"variant": variant}
        measured = functools.partial(measure, s, variant, prepared)
        rows.append(results.get_of_program(s.results, "quality", settings, measured))
        print(f"{variant}: {np.mean(rows[-1]['losses']):.4f}", flush=True)
    print(f"\n{s.task}, ×{task.accumulate}, nats a {task.unit}:\n{tables.quality(rows)}")


if __name__ == "__main__":
    main(results.settings(Settings, f"{__doc__}\n{tasks.__doc__}\n{variants.__doc__}"))
