"""All that `reproduce.py` trains, on all GPUs of this host: what the results do not have yet.

    python benchmarks/reproduce_all.py --data DATA --models MODELS --limit 540

A row is a process of its own. Several share a GPU, where one trains while the others compile. What
is running at the limit is stopped, and begins anew with the next call. DATA and MODELS are those of
reproduce.py; the T5 is made here where MODELS has none, and its rows wait for it.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax

import reproduce
from florax_benchmarks import claims, paper, results


@dataclasses.dataclass(frozen=True)
class Settings:
    data: Path = Path("data")  # folder with the data sets by name, see reproduce.py
    models: Path = Path("models")  # folder with models to fine-tune, by name
    experiments: tuple[str, ...] = ("1a", "frontier", "1b", "2a", "2b", "3", "4", "5", "6")  # which
    tasks: tuple[str, ...] = ()  # only these
    each: int = 4  # processes that share a GPU
    limit: float = 540.0  # seconds for everything
    results: Path = results.FOLDER  # folder for the JSON

    def __post_init__(self):
        if unknown := {*self.experiments} - {*paper.EXPERIMENTS}:
            raise ValueError(f"experiments must be of {paper.EXPERIMENTS}, got {sorted(unknown)}")


class Job(NamedTuple):
    title: str
    command: tuple[str, ...]  # of Python
    model: Path | None = None  # folder that it reads
    makes: Path | None = None  # folder that it writes


def jobs(s: Settings) -> list[Job]:
    """The rows that are not there, each once, and before them the model that some want."""
    found: dict[tuple[str, ...], Job] = {}
    for experiment in s.experiments:
        for sweep in paper.sweeps(experiment):
            if sweep.task not in (s.tasks or (sweep.task,)):
                continue
            there = claims.rows_of(s.results, sweep)
            for variant in (name for name in sweep.variants if name not in there):
                own = reproduce.arguments(sweep, s.data, s.models) | {"variants": (variant,)}
                title = f"{experiment}, {sweep.task}: {variant}"
                job = Job(title, script(s, own), Path(own["model"]) if own["model"] else None)
                found.setdefault(job.command, job)
    model = s.models / paper.MODELS["t5"]
    wanted = any(job.model == model for job in found.values()) and not model.exists()
    return [*([pretraining(s, model)] if wanted else []), *found.values()]


def pretraining(s: Settings, model: Path) -> Job:
    own = reproduce.arguments(paper.Sweep("denoising", ()), s.data, s.models)
    own |= {"variants": ("none+float32",), "seeds": 1, "save": model}
    return Job(f"denoising: {model.name}", script(s, own), makes=model)


def script(s: Settings, arguments: dict[str, Any]) -> tuple[str, ...]:
    own = (*flags(arguments), "--results", str(s.results.absolute()))
    return str(results.SCRIPTS / "quality.py"), *own


def flags(arguments: dict[str, Any]) -> Iterator[str]:
    """As the command line has them; what is empty or None is left out."""
    for name, value in arguments.items():
        values = value if isinstance(value, tuple) else (value,)
        if value not in ((), None):
            yield from (f"--{name.replace('_', '-')}", *map(str, values))


class Queue:
    """Jobs in their order, but for those whose model is being made."""

    def __init__(self, jobs: list[Job]):
        self._left, self._lock = [*jobs], threading.Lock()
        self._making = {job.makes for job in jobs if job.makes}

    def take(self) -> Job | None:
        """The next one that can run. None: there is none, unless `waits`."""
        with self._lock:
            for job in self._left:
                if job.model is None or (job.model not in self._making and job.model.exists()):
                    self._left.remove(job)
                    return job
        return None

    def done(self, job: Job) -> None:
        """What it makes is there now, whole, unless it failed."""
        if job.makes:
            self._making.discard(job.makes)

    def waits(self) -> bool:
        return bool(self._left and self._making)

    def missing(self) -> set[Path]:
        """Models that are neither there nor made."""
        models = {job.model for job in self._left if job.model} - self._making
        return {model for model in models if not model.exists()}


def work(queue: Queue, gpu: int, end: float) -> None:
    """Run one job after another, until there is none or the time is up."""
    while (left := end - time.monotonic()) > 0:
        if job := queue.take():
            print(f"{job.title}: {run(job, gpu, left)}", flush=True)
            queue.done(job)
        elif queue.waits():
            time.sleep(1)
        else:
            return


def run(job: Job, gpu: int, limit: float) -> str:
    """Run a job for so many seconds at most; what came of it, in a few words."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        streams = {"stdout": log, "stderr": subprocess.STDOUT}
        device = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
        code = results.run([sys.executable, *job.command], limit, env=device, **streams)
        if code is None:
            return "stopped"
        log.seek(0)
        lines = log.read().splitlines() or ["no output"]
    return f"failed: {lines[-1][:160]}" if code else f"{time.monotonic() - start:.0f} s"


def main(s: Settings) -> None:
    end = time.monotonic() + s.limit
    queue = Queue(todo := jobs(s))
    for model in queue.missing():
        sys.exit(f"error: models must have {model.name}, {model} is not there: see reproduce.py")
    print(f"{len(todo)} to train", flush=True)
    gpus = results.isolated(count_gpus)["count"]
    results.device()  # once, for all processes
    # Memory goes back to the GPU between a row's programs: others need it meanwhile.
    os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    os.environ.setdefault("TQDM_DISABLE", "1")
    with ThreadPoolExecutor(gpus * s.each) as pool:
        [*pool.map(functools.partial(work, queue, end=end), [*range(gpus)] * s.each)]
    print(f"{len(jobs(s))} are left", flush=True)


def count_gpus() -> dict[str, int]:
    return {"count": jax.device_count()}


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))
