"""The training loop of all scripts: one method, one model, from the data to the best weights."""

import dataclasses
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
import optax
from flax import nnx
from jax import Array
from tensorboardX import SummaryWriter
from tqdm import tqdm

import florax
from florax_examples import batches, optimizers
from florax_examples.models import checkpoints, lora
from florax_examples.report import Curve, as_json, human, peak_memory, tree_bytes
from florax_examples.resume import Checkpoints, Interruption
from florax_examples.settings import Training

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


def train(settings: Training, method: str, model: nnx.Module, task: Task) -> Trained:
    """Train `model` by `method`; afterwards it is spent, and the best weights are on disk.

    Everything is written to a folder of the method's name in `settings.output`: the best weights,
    TensorBoard logs, the last checkpoint of a run that was interrupted, and the figures of one that
    ended. With `settings.resume` a run goes on from there, to the bits of one that never stopped.
    """
    s = settings
    folder = s.output / method
    saved = Checkpoints(folder / "checkpoint")
    _check_earlier_run(s, folder, saved, task)
    if s.resume and not saved.exists() and (folder / "results.json").is_file():
        results = json.loads((folder / "results.json").read_text())
        return Trained(results["figures"], Curve(**results["curve"]), folder / "best")

    if s.micro_batch > (examples := batches.count(task.train)):
        sys.exit(f"error: micro_batch={s.micro_batch} is more than the {examples:,} examples")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: output={s.output} cannot be a folder: {error.strerror}")
    checkpoints.check_replaceable(folder / "best", task.files)
    run = _Run(s, method, model, task)
    start = time.perf_counter()
    compiled = run.compile()
    compile_seconds = time.perf_counter() - start

    done, best, seconds, curve = 0, float("inf"), 0.0, Curve([], [])
    if s.resume and saved.exists():
        notes = saved.notes()
        run.params, run.state = saved.restore((run.params, run.state))
        done, best, seconds = notes["done"], notes["best"], notes["seconds"]
        curve = Curve(**notes["curve"])
    else:  # the weights of a run before this one stay until there are better ones
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        (folder / "results.json").unlink(missing_ok=True)

    def save_checkpoint() -> None:
        notes = {
            "settings": as_json(s),
            "examples": batches.count(task.train),
            "done": done,
            "best": best,
            "seconds": seconds,
            "curve": curve._asdict(),
        }
        saved.save(done, (run.params, run.state), notes)

    total = s.updates * s.accumulate
    evaluations = {round(s.updates * i / s.evaluations) for i in range(1, s.evaluations + 1)}
    order = batches.Shuffled(task.train, s.micro_batch, s.seed)
    losses: list[Array] = []
    bar = tqdm(total=total, initial=done, desc=method, unit=" micro-batches")
    with Interruption() as interruption, SummaryWriter(str(folder / "tensorboard")) as log, bar:
        start = time.perf_counter()
        while done < total:
            batch = order.stacked(done, run.at_once) if run.whole_update else order[done]
            loss, run.params, run.state = compiled(run.params, run.state, run.frozen, batch)
            losses.append(loss)
            done += run.at_once

            update, left = divmod(done, s.accumulate)
            evaluate = not left and update in evaluations
            interrupted = interruption.asked
            save = interrupted or (s.save_every and done % s.save_every < run.at_once)
            if evaluate or save or done % (LOG_EVERY * run.at_once) == 0:
                mean_loss = float(np.mean(jax.device_get(losses)))
                losses = []
                now = time.perf_counter()
                seconds, start = seconds + now - start, now
                rate = done * s.micro_batch * task.units / seconds
                curve.train.append((done * s.micro_batch, mean_loss))
                log.add_scalar("train/loss", mean_loss, done)
                log.add_scalar(f"train/{task.unit}_per_second", rate, done)
                log.add_scalar("memory/bytes", peak_memory(), done)
                bar.update(done - bar.n)
                bar.set_postfix_str(
                    f"loss {mean_loss:.3f}, {rate:,.0f} {task.unit}/s, {human(peak_memory())}"
                )
            if evaluate:
                heldout = heldout_loss(task.losses, run.model(), task.validation, s.heldout_batch)
                curve.heldout.append((done * s.micro_batch, heldout))
                log.add_scalar("validation/loss", heldout, done)
                if heldout < best:
                    best = heldout
                    checkpoints.save(run.plain_model(), folder / "best", task.files)
                start = time.perf_counter()
            if save:
                save_checkpoint()
                if interrupted and done < total:
                    bar.close()
                    sys.exit(f"interrupted at update {update}: add --resume to go on from there")
                start = time.perf_counter()

    if not curve.heldout or best == float("inf"):
        sys.exit(f"{method} diverged: its validation loss was never a finite number")
    figures = {
        **run.figures(),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "peak_bytes": peak_memory(),
        "compile_seconds": round(compile_seconds, 1),
        "seconds": round(seconds, 1),
        "micro_batch_ms": round(1e3 * seconds / total, 2),
        f"{task.unit}_per_second": round(total * s.micro_batch * task.units / seconds),
        "validation_loss": best,
        "last_validation_loss": curve.heldout[-1][1],
    }
    results = {"settings": as_json(s), "figures": figures, "curve": curve._asdict()}
    _write(folder / "results.json", json.dumps(results, indent=2) + "\n")
    saved.remove()
    return Trained(figures, curve, folder / "best")


class _Run:
    """The model in its parts, and the steps that one method makes with it."""

    def __init__(self, settings: Training, method: str, model: nnx.Module, task: Task):
        s = self.settings = settings
        self.method, self.task = method, task
        if method == "lora":
            try:
                lora.add(model, s.rank, rngs=nnx.Rngs(s.seed))
            except ValueError as mistake:
                sys.exit(f"error: {mistake}")
            trained = lora.trained(freeze_a=s.freeze_a)
        else:
            trained = ...
        if s.scan:
            model.stack()
        self.graphdef, self.params, self.frozen = _split(model, trained)
        peak = s.learning_rate or task.learning_rates[method]
        self.tx = optimizers.make(s, method, peak)
        if method == "flora":
            # By layers the optimizer is given them singly, and never the stacks of `params`.
            whole = dataclasses.replace(s, layerwise=False)
            self._check_rank(optimizers.make(whole, method, peak))
        accumulates = method == "flora" and s.accumulate > 1
        # Gradients that are born as sketches are summed as such: then a step is a whole update.
        self.whole_update = accumulates and s.gradients == "sketched"
        self.at_once = s.accumulate if self.whole_update else 1  # micro-batches a step
        self.state: Any = None

    def _check_rank(self, tx: optax.GradientTransformation) -> None:
        """Refuse a rank at which FLORA would be the naive method."""
        report = florax.state_report(tx, self.params)
        if report.rows and not any(row.rank for row in report.rows):
            sys.exit(f"error: rank={self.settings.rank} compresses nothing of this model: lower it")

    def loss(self, params: nnx.State, frozen: nnx.State, batch: Any) -> Array:
        losses, counts = self.task.losses(nnx.merge(self.graphdef, params, frozen), batch)
        return losses.sum() / counts.sum()

    def compile(self) -> Any:
        """Make the optimizer's state, and the step `(params, state, frozen, batch)` ahead of it."""
        s = self.settings

        def step(params: nnx.State, state: Any, frozen: nnx.State, batch: Any) -> Any:
            def loss_fn(params: nnx.State, batch: Any) -> Array:
                return self.loss(params, frozen, batch)

            if s.layerwise:
                return florax.layerwise_value_and_update(loss_fn, self.tx)[1](params, state, batch)
            if self.whole_update:
                return florax.value_and_update(loss_fn, self.tx)(params, state, batch)
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, state = self.tx.update(grads, state, params)
            return loss, optax.apply_updates(params, updates), state

        def init(params: nnx.State, frozen: nnx.State, batch: Any) -> Any:
            if s.layerwise:
                loss_fn = functools.partial(self._loss_without, frozen)
                return florax.layerwise_value_and_update(loss_fn, self.tx)[0](params, batch)
            return self.tx.init(params)

        order = batches.Shuffled(self.task.train, s.micro_batch, s.seed)
        batch = order.stacked(0, self.at_once) if self.whole_update else order[0]
        self.state = jax.jit(init)(self.params, self.frozen, batch)
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
            self.params, self.state, self.frozen, batch
        )
        return lowered.compile()

    def _loss_without(self, frozen: nnx.State, params: nnx.State, batch: Any) -> Array:
        return self.loss(params, frozen, batch)

    def model(self) -> nnx.Module:
        """The model as it is now. The next step takes its arrays."""
        return nnx.merge(self.graphdef, self.params, self.frozen)

    def plain_model(self) -> nnx.Module:
        """The same without adapters."""
        return lora.merge(self.model()) if self.method == "lora" else self.model()

    def figures(self) -> dict[str, Any]:
        sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (self.params, self.frozen)]
        accumulator = 0
        inner = self.state
        if isinstance(inner, optax.MultiStepsState):
            accumulator, inner = tree_bytes(inner.acc_grads), inner.inner_opt_state
        elif isinstance(inner, florax.FloraAccumulateState):
            accumulator, inner = tree_bytes(inner.sketch), inner.inner_opt_state
        return {
            "method": self.method,
            "parameters": sum(sizes),
            "trained_parameters": sizes[0],
            "parameter_bytes": tree_bytes((self.params, self.frozen)),
            "optimizer_bytes": tree_bytes(inner),
            "accumulator_bytes": accumulator,
        }


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


def _split(model: nnx.Module, trained: Any) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    if trained is ...:
        graphdef, params = nnx.split(model)
        return graphdef, params, nnx.State({})
    return nnx.split(model, trained, ...)


def _check_earlier_run(s: Training, folder: Path, saved: Checkpoints, task: Task) -> None:
    """Refuse to go on with other settings, and to write over a run that may still go on."""
    results = folder / "results.json"
    if not s.resume:
        if saved.exists():
            sys.exit(
                f"{folder} holds a run that was interrupted: add --resume to go on with it, name "
                "another --output, or remove the folder"
            )
        return
    if saved.exists():
        notes = saved.notes()
        earlier, examples = notes["settings"], notes["examples"]
        if examples != batches.count(task.train):
            sys.exit(
                f"{folder} was trained on {examples:,} examples, data={s.data} has "
                f"{batches.count(task.train):,}"
            )
    elif results.is_file():
        earlier = json.loads(results.read_text())["settings"]
    else:
        return
    for name, value in as_json(s).items():
        if name not in ("resume", "output", "save_every", "method") and earlier[name] != value:
            sys.exit(
                f"{folder} was trained with {name}={earlier[name]}, got {name}={value}: resume "
                "with the same settings"
            )


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text)
    aside.replace(path)
