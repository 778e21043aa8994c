"""The training loop of all scripts: one method, one model, from the data to the best weights."""

import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tensorboardX import SummaryWriter
from tqdm import tqdm

from florax_examples import batches, devices, optimizers
from florax_examples.devices import Devices
from florax_examples.models import checkpoints, lora
from florax_examples.report import Curve, as_json, human, peak_memory, tree_bytes, write_json
from florax_examples.resume import Checkpoints, Interruption
from florax_examples.settings import Training, spread

LOG_EVERY = 10  # steps; to read a loss is to wait for it


class Task(NamedTuple):
    """What a script trains for."""

    losses: Callable[[nnx.Module, Any], tuple[Array, Array]]  # of a batch, per token or image, and
    #   which of them count: the mean over those is the loss
    train: Any  # a tree of arrays with a leading axis of examples
    validation: Any
    unit: str  # what an example consists of: "tokens" or "images"
    units: int  # of them in an example
    learning_rates: Mapping[str, float]  # per method, for `learning_rate=None`
    files: Mapping[str, bytes]  # what stands beside saved weights: the tokenizer


class Trained(NamedTuple):
    figures: dict[str, Any]
    curve: Curve
    best: Path  # a Hugging Face folder with the weights of the lowest validation loss


class Comparison(NamedTuple):
    """What became of every method."""

    runs: list[dict[str, Any]]  # figures and scores of each
    curves: dict[str, Curve]  # by method, as is what follows
    outputs: dict[str, Any]


def compare(
    settings: Training,
    task: Task,
    new_model: Callable[[], nnx.Module],
    evaluate: Callable[[nnx.Module], tuple[dict[str, float], Any]],
) -> Comparison:
    """Train by every method that the settings ask for, each from the same weights.

    `evaluate` gives scores of a model and its outputs, which are taken with the best weights.
    """
    comparison = Comparison([], {}, {})
    for method in settings.methods():
        model = new_model()
        trained = train(settings, method, model, task)
        best = checkpoints.load(trained.best, type(model), stacked=settings.scan)
        scores, comparison.outputs[method] = evaluate(best)
        comparison.curves[method] = trained.curve
        comparison.runs.append(trained.figures | scores)
    return comparison


def train(settings: Training, method: str, model: nnx.Module, task: Task) -> Trained:
    """Train `model` by `method`; afterwards it is spent, and the best weights are on disk.

    Everything is written to a folder of the method's name in `settings.output`: the best weights,
    TensorBoard logs, the last checkpoints of a run that was interrupted, and the figures of one
    that ended. With `settings.resume` a run goes on from there, to the bits of one that never
    stopped.
    """
    folder = settings.output / method
    saved = Checkpoints(folder / "checkpoint")
    if settings.resume and (folder / "results.json").is_file():
        return _finished(settings, folder, saved)
    step = _step_to_resume(settings, folder, saved, task)
    _check_inputs_and_outputs(settings, folder, task)
    run = _Run(settings, method, model, task)
    loop = _Loop(settings, run, task, folder, saved)
    devices.wait_for_all("all have seen what is in the folder")
    if step is not None:
        loop.restore(step)
    elif devices.is_first():  # the weights of a run before this one stay until there are better
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        saved.remove()  # before the results, without which it would be that of an interrupted run
        (folder / "results.json").unlink(missing_ok=True)
    loop.run_to_the_end()
    return loop.finish()


class _Run:
    """The model in its parts, and the step that one method makes with it."""

    def __init__(self, settings: Training, method: str, model: nnx.Module, task: Task):
        s = self.settings = settings
        self.method, self.task = method, task
        if method == "lora":
            try:
                lora.add(model, s.rank, rngs=nnx.Rngs(s.seed))
            except ValueError as mistake:
                sys.exit(f"error: {mistake}")
        if s.scan:
            model.stack()
        trained = lora.trained(freeze_a=s.freeze_a) if method == "lora" else nnx.Param
        try:
            self.devices = Devices(s.mesh)
        except ValueError as mistake:
            sys.exit(f"error: {mistake}")
        self.graphdef, *weights = nnx.split(model, trained, ...)
        self.params, self.frozen = map(self.devices.place, weights)
        if method == "flora" and not optimizers.compresses_anything(s, self.params):
            sys.exit(f"error: rank={s.rank} compresses nothing of this model: lower it")

        self.tx = optimizers.make(s, method, s.learning_rate or task.learning_rates[method])
        self.whole_update = optimizers.is_whole_update(s, method)
        self.at_once = s.accumulate if self.whole_update else 1  # micro-batches a step
        self.order = batches.Shuffled(task.train, s.micro_batch, s.seed)
        self._compile()

    def batch(self, done: int) -> Any:
        """What the step after `done` micro-batches learns from."""
        whole = self.whole_update
        batch = self.order.stacked(done, self.at_once) if whole else self.order[done]
        return self.devices.place_batch(batch, rows=int(whole))

    def _compile(self) -> None:
        """Make the optimizer's state, and ahead of training the step."""
        start = time.perf_counter()

        def step(params: nnx.State, state: Any, frozen: nnx.State, batch: Any) -> Any:
            own = optimizers.step(self.settings, self.method, self.tx, self._loss(frozen))
            return own(params, state, batch)

        batch = self.batch(0)
        self.state = self.devices.init(self.tx, self.params)(self.params)
        jitted = self.devices.jit(step, self.params, self.state)
        self.compiled = jitted.lower(self.params, self.state, self.frozen, batch).compile()
        self.compile_seconds = time.perf_counter() - start

    def _loss(self, frozen: nnx.State) -> Callable[[nnx.State, Any], Array]:
        def loss(params: nnx.State, batch: Any) -> Array:
            losses, counts = self.task.losses(nnx.merge(self.graphdef, params, frozen), batch)
            return losses.sum() / counts.sum()

        return loss

    def step(self, done: int) -> Array:
        """Learn from the next micro-batches; their loss."""
        arguments = self.params, self.state, self.frozen, self.batch(done)
        loss, self.params, self.state = self.compiled(*arguments)
        return loss

    def model(self) -> nnx.Module:
        """The model as it is now. The next step takes its arrays."""
        return nnx.merge(self.graphdef, self.params, self.frozen)

    def plain_model(self) -> nnx.Module:
        """The same without adapters, and all of it in this process."""
        model = lora.merge(self.model()) if self.method == "lora" else self.model()
        graphdef, weights = nnx.split(model)
        return nnx.merge(graphdef, devices.whole(weights))

    def figures(self) -> dict[str, Any]:
        sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (self.params, self.frozen)]
        accumulator, others = optimizers.accumulator(self.state)
        return {
            "method": self.method,
            "parameters": sum(sizes),
            "trained_parameters": sizes[0],
            "parameter_bytes": tree_bytes((self.params, self.frozen)),
            "optimizer_bytes": tree_bytes(others),
            "accumulator_bytes": tree_bytes(accumulator),
            "temporary_bytes": self.compiled.memory_analysis().temp_size_in_bytes,
            "peak_bytes": peak_memory(),
            "compile_seconds": round(self.compile_seconds, 1),
        }


class _Loop:
    """The steps of a run, and what is written meanwhile: logs, checkpoints, the best weights."""

    def __init__(self, s: Training, run: _Run, task: Task, folder: Path, saved: Checkpoints):
        self.settings, self.run, self.task = s, run, task
        self.folder, self.saved = folder, saved
        self.total = s.updates * s.accumulate  # micro-batches
        self.evaluations = spread(s.evaluations, s.updates)  # after which updates

        self.done = 0  # micro-batches
        self.best = float("inf")  # validation loss
        self.seconds = 0.0  # of training, without what is written and evaluated
        self.curve = Curve([], [])
        self.losses: list[Array] = []  # since the last log

    def run_to_the_end(self) -> None:
        first = devices.is_first()
        board = SummaryWriter(str(self.folder / "tensorboard"), write_to_disk=first)
        shown = {"desc": self.run.method, "unit": " micro-batches", "disable": not first}
        bar = tqdm(total=self.total, initial=self.done, **shown)
        with Interruption() as interruption, board as self.board, bar as self.bar:
            self.start = time.perf_counter()
            while self.done < self.total:
                self.losses.append(self.run.step(self.done))
                self.done += self.run.at_once
                self.after_step(interruption.asked)

    def after_step(self, interrupted: bool) -> None:
        at_once = self.run.at_once
        update, left = divmod(self.done, self.settings.accumulate)
        evaluate = not left and update in self.evaluations
        every = self.settings.save_every
        log = self.done % (LOG_EVERY * at_once) == 0
        if jax.process_count() > 1:  # they stop at one step, and to agree is to wait as well
            interrupted = log and devices.any_process(interrupted)
        save = interrupted or (every and self.done % every < at_once)
        if evaluate or save or log:
            self.log()
        if evaluate:
            self.evaluate()
        if save:
            self.save()
        if interrupted and self.done < self.total:
            sys.exit(f"interrupted at update {update}: add --resume to go on from there")
        if evaluate or save:
            self.start = time.perf_counter()

    def log(self) -> None:
        mean_loss = float(np.mean(jax.device_get(self.losses)))
        self.losses = []
        now = time.perf_counter()
        self.seconds, self.start = self.seconds + now - self.start, now
        examples, unit = self.done * self.settings.micro_batch, self.task.unit
        rate, memory = examples * self.task.units / self.seconds, peak_memory()
        self.curve.train.append((examples, mean_loss))
        self.board.add_scalar("train/loss", mean_loss, self.done)
        self.board.add_scalar(f"train/{unit}_per_second", rate, self.done)
        self.board.add_scalar("memory/bytes", memory, self.done)
        self.bar.update(self.done - self.bar.n)
        self.bar.set_postfix_str(f"loss {mean_loss:.3f}, {rate:,.0f} {unit}/s, {human(memory)}")

    def evaluate(self) -> None:
        """Take the validation loss, and keep the weights if they are the best so far."""
        data, size = self.task.validation, self.settings.heldout_batch
        heldout = heldout_loss(self.task.losses, self.run.model(), data, size)
        self.curve.heldout.append((self.done * self.settings.micro_batch, heldout))
        self.board.add_scalar("validation/loss", heldout, self.done)
        if heldout < self.best:
            self.best = heldout
            model = self.run.plain_model()
            if devices.is_first():
                checkpoints.save(model, self.folder / "best", self.task.files)

    def save(self) -> None:
        notes = {
            "settings": as_json(self.settings),
            "examples": batches.count(self.task.train),
            "done": self.done,
            "best": self.best,
            "seconds": self.seconds,
            "curve": self.curve._asdict(),
        }
        self.saved.save(self.done, (self.run.params, self.run.state), notes)

    def restore(self, step: int) -> None:
        """Go on from what `save` kept."""
        notes = self.saved.notes(step)
        like = self.run.params, self.run.state
        self.run.params, self.run.state = self.saved.restore(step, like)
        self.done, self.best, self.seconds = notes["done"], notes["best"], notes["seconds"]
        self.curve = Curve(**notes["curve"])

    def finish(self) -> Trained:
        """Write what came of the run, in the place of its checkpoint."""
        if self.best == float("inf"):
            sys.exit(f"{self.run.method} diverged: its validation loss was never a finite number")
        units = self.total * self.settings.micro_batch * self.task.units
        figures = {
            **self.run.figures(),
            "seconds": round(self.seconds, 1),
            "micro_batch_ms": round(1e3 * self.seconds / self.total, 2),
            f"{self.task.unit}_per_second": round(units / self.seconds),
            "validation_loss": self.best,
            "last_validation_loss": self.curve.heldout[-1][1],
        }
        settings, curve = as_json(self.settings), self.curve._asdict()
        results = {"settings": settings, "figures": figures, "curve": curve}
        if devices.is_first():
            write_json(self.folder / "results.json", results)
            self.saved.remove()
        devices.wait_for_all("the best weights are there")
        return Trained(figures, self.curve, self.folder / "best")


def heldout_loss(losses: Callable[..., Any], model: nnx.Module, data: Any, batch: int) -> float:
    """The mean loss over all tokens of `data` that count, `batch` examples at a time."""
    graphdef, params = nnx.split(model)
    sums = [_sums(losses, graphdef, params, *rows) for rows in batches.in_order(data, batch)]
    total, count = np.sum(jax.device_get(sums), axis=0)
    return float(total / count)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(losses: Any, graphdef: Any, params: Any, rows: Any, real: Array) -> tuple[Array, Array]:
    own, counts = losses(nnx.merge(graphdef, params), rows)
    counts &= real.reshape(-1, *(1,) * (own.ndim - 1))
    return jnp.where(counts, own, 0.0).sum(), counts.sum()


# Before a run.


def _check_inputs_and_outputs(s: Training, folder: Path, task: Task) -> None:
    if s.micro_batch > (examples := batches.count(task.train)):
        sys.exit(f"error: micro_batch={s.micro_batch} is more than the {examples:,} examples")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: output={s.output} cannot be a folder: {error.strerror}")
    checkpoints.check_replaceable(folder / "best", task.files)


def _step_to_resume(s: Training, folder: Path, saved: Checkpoints, task: Task) -> int | None:
    """Where to go on, None for a new run, which does not write over one that may still go on."""
    if not s.resume:
        if saved.exists() and not (folder / "results.json").is_file():
            sys.exit(
                f"{folder} holds a run that was interrupted: add --resume to go on with it, name "
                "another --output, or remove the folder"
            )
        return None
    step = saved.latest()
    if step is not None:
        notes, examples = saved.notes(step), batches.count(task.train)
        if notes["examples"] != examples:
            sys.exit(
                f"{folder} was trained on {notes['examples']:,} examples, data={s.data} has "
                f"{examples:,}"
            )
        _check_same_settings(s, folder, notes["settings"])
    return step


def _finished(s: Training, folder: Path, saved: Checkpoints) -> Trained:
    """What a run that came to its end has found."""
    results = json.loads((folder / "results.json").read_text())
    _check_same_settings(s, folder, results["settings"])
    if devices.is_first():  # it may have been killed before it could
        saved.remove()
    return Trained(results["figures"], Curve(**results["curve"]), folder / "best")


# What does not change the numbers of a run, but for the rounding of sums over a mesh.
FREE = ("resume", "output", "save_every", "method", "mesh", "distributed")


def _check_same_settings(s: Training, folder: Path, earlier: dict[str, Any]) -> None:
    for name, value in as_json(s).items():
        if name not in FREE and earlier[name] != value:
            sys.exit(
                f"{folder} was trained with {name}={earlier[name]}, got {name}={value}: resume "
                "with the same settings"
            )
