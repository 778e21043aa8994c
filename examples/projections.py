"""What LoRA is a projection of: the pilot study of FLORA's paper, its Figure 1.

    python examples/projections.py

A network with one hidden layer learns Fashion-MNIST by SGD, its first weight W in five ways:

    full    W itself
    lora    W + A B, with A and B trained
    lora_b  W + A B, with B trained only: the update of W is its gradient in a fixed random subspace
    rp      the same said of the gradient: compressed and decompressed by one random projection
    rrp     a new random projection at every step: what FLORA makes of it

LoRA stays near its fixed subspace, and near `rp`; resampling recovers full-rank updates. What comes
out: a table of losses and accuracies, a plot, and a line of JSON.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from tqdm import tqdm

import florax
from florax_examples import batches, datasets, report, settings
from florax_examples.models import lora

METHODS = ("full", "lora", "lora_b", "rp", "rrp")


@dataclasses.dataclass(frozen=True)
class Settings:
    data: str = str(datasets.FOLDER / "fashion_mnist")  # a folder with images, or cifar100
    output: Path = Path("runs/projections")  # folder for loss.png and results.json
    seed: int = 0  # of the weights, the order of the data and the projections
    hidden: int = 768  # width of the hidden layer, below the numbers of an image
    rank: int = 8  # of the projections, and of LoRA
    learning_rate: float = 0.01  # of SGD
    batch: int = 64  # images a step
    steps: int = 4000  # of SGD
    evaluations: int = 10  # of the test loss

    def __post_init__(self):
        settings.check_at_least_one(self, "hidden", "rank", "batch", "steps", "evaluations")
        if self.rank >= self.hidden:
            raise ValueError(f"rank={self.rank} must be below hidden={self.hidden}")
        settings.check_positive(self, "learning_rate")


class Network(nnx.Module):
    def __init__(self, inputs: int, hidden: int, labels: int, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(inputs, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, labels, rngs=rngs)

    def __call__(self, pixels: Array) -> Array:
        return self.second(nnx.relu(self.first(pixels)))


def is_first(path: jax.tree_util.KeyPath, leaf: Any) -> bool:
    return "first" in jax.tree_util.keystr(path) and leaf.ndim == 2


def make_optimizer(s: Settings, method: str) -> optax.GradientTransformation:
    sgd = optax.sgd(s.learning_rate)
    if method not in ("rp", "rrp"):
        return sgd

    def rank(path: jax.tree_util.KeyPath, leaf: Any) -> int | None:
        return s.rank if is_first(path, leaf) else None

    # Without decay the momentum is the gradient itself, there and back through the projection: of
    # the inputs, the larger side of the weight, as LoRA's A has it.
    resample_every = 1 if method == "rrp" else s.steps + 1
    momentum = florax.flora_momentum(
        rank, 0.0, resample_every, key=s.seed, projection="gaussian", side="larger"
    )
    return optax.chain(sgd, momentum)


def train(s: Settings, method: str, train: Any, test: Any) -> tuple[report.Curve, float, float]:
    """The curve, and at the end the loss and the accuracy in percent on the test images."""
    pixels, labels = train
    if s.hidden >= pixels.shape[1]:
        raise datasets.DataError(
            f"hidden={s.hidden} must be below the {pixels.shape[1]} numbers of an image of {s.data}"
        )
    network = Network(pixels.shape[1], s.hidden, int(labels.max()) + 1, rngs=nnx.Rngs(s.seed))
    trained: Any = nnx.Param
    if method in ("lora", "lora_b"):
        lora.add(network, s.rank, rngs=nnx.Rngs(s.seed + 1), where=is_first)
        trained = lora.trained(freeze_a=method == "lora_b")
        # As `rp` draws its projection: then `lora_b` is the same but for the draw.
        a = network.first.lora_a
        a[...] = s.rank**-0.5 * jax.random.normal(jax.random.key(s.seed + 1), a.shape)
    graphdef, params, frozen = nnx.split(network, trained, ...)
    tx = make_optimizer(s, method)

    def logits(params: nnx.State, pixels: Array) -> Array:
        return nnx.merge(graphdef, params, frozen)(pixels)

    def loss_fn(params: nnx.State, pixels: Array, labels: Array) -> Array:
        scores = logits(params, pixels)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    @jax.jit
    def step(params: nnx.State, state: Any, pixels: Array, labels: Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, pixels, labels)
        updates, state = tx.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    @jax.jit
    def evaluate(params: nnx.State) -> tuple[Array, Array]:
        right = logits(params, test[0]).argmax(axis=-1) == test[1]
        return loss_fn(params, *test), 100 * right.mean()

    state = jax.jit(tx.init)(params)
    order = batches.Shuffled(train, s.batch, s.seed)
    curve, losses = report.Curve([], []), []
    evaluations = settings.spread(s.evaluations, s.steps)
    for i in tqdm(range(1, s.steps + 1), desc=f"{method:6}"):
        loss, params, state = step(params, state, *order[i - 1])
        losses.append(loss)
        if i in evaluations:
            curve.train.append((i * s.batch, float(jnp.stack(losses).mean())))
            curve.heldout.append((i * s.batch, float(evaluate(params)[0])))
            losses = []
    test_loss, accuracy = map(float, evaluate(params))
    return curve, test_loss, accuracy


def load(s: Settings, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images as rows of numbers from 0 to 1, and their labels."""
    images = datasets.load_images(s.data, split)
    return images.images.reshape(len(images.images), -1) / np.float32(255), images.labels


def main(s: Settings) -> None:
    data = {split: load(s, split) for split in ("train", "test")}
    curves, runs = {}, []
    for method in METHODS:
        curve, loss, accuracy = train(s, method, data["train"], data["test"])
        curves[method] = curve
        training_loss = curve.train[-1][1]  # the mean since the evaluation before
        losses = {"training_loss": training_loss, "test_loss": loss}
        runs.append({"method": method, **losses, "accuracy": accuracy})

    header = ["method", "training loss", "test loss", "accuracy %"]
    table = [
        [method, f"{training_loss:.3f}", f"{test_loss:.3f}", f"{accuracy:.1f}"]
        for method, training_loss, test_loss, accuracy in (run.values() for run in runs)
    ]
    print(f"\n{report.format_table(header, table)}\n")
    report.write_results(s, runs, curves, title="Fashion-MNIST, SGD", unit="image")


if __name__ == "__main__":
    settings.run(main, Settings, __doc__)
