"""Fine-tune a Vision Transformer, or train a small one: by FLORA, LoRA or with full buffers.

    python examples/vit.py                        # a small ViT from scratch: a minute on two cores
    python examples/vit.py --method all           # no buffers, full-size ones, FLORA: a table
    python examples/vit.py --model google/vit-base-patch16-224-in21k --data cifar100    # of the hub
    python examples/vit.py --help

Images may have any size: the model gets them in its own. A model of other classes than the data's
gets a new classifier. What comes out: the classes that are mistaken most, a table of memory, time
and quality (accuracy), and in the output folder a picture of predictions, the best weights as a
Hugging Face checkpoint, the loss curves and all figures.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax import Array

from florax_examples import batches, datasets, devices, metrics, report, settings, training
from florax_examples.datasets import Images
from florax_examples.loading import load_config, load_model
from florax_examples.models.vit import PRESETS, ViT, ViTConfig

# Adafactor factors what is at least 128 wide. Grey images are made colour ones, so that weights
# learned from either kind go on with the other.
TINY = ViTConfig(
    image_size=28,
    patch_size=7,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=512,
)

# Tried once each: 0.5, 1, 2 and 4 times 1e-3, in the default run. For `none` 1e-3 had the lowest
# validation loss; for `naive` and `flora` all four are alike within its noise. `lora` has that of
# `naive`, `paper` that of `flora`; `flora` was then of one side, in float32.
LEARNING_RATES = {"none": 1e-3, "naive": 2e-3, "lora": 2e-3, "paper": 2e-3, "flora": 2e-3}
SHOWN = (4, 6)  # rows and columns of the picture of predictions


@dataclasses.dataclass(frozen=True)
class Settings(settings.Training):
    data: str = str(datasets.FOLDER / "fashion_mnist")  # folder with images, or cifar100 of the hub
    output: Path = Path("runs/vit")  # folder for results.json, two pictures, weights and logs

    updates: int = 1000  # of the optimizer; of the default data, 21 epochs
    accumulate: int = 4  # micro-batches an update
    rank: int = 64  # of the sketches or adapters; 64 is half of the tiny model's width
    resample_every: int = 100  # updates that share a projection of the momentum


# The data.


def load_data(data: str) -> dict[str, Images]:
    images = {split: datasets.load_images(data, split) for split in datasets.SPLITS}
    if len({own.class_names for own in images.values()}) > 1:
        raise datasets.DataError(f"{data} has other class_names in one split than in another")
    return images


def rows(images: Images) -> dict[str, np.ndarray]:
    return {"pixels": images.images, "label": images.labels}


def for_classes(
    config: ViTConfig, class_names: tuple[str, ...]
) -> tuple[ViTConfig, dict[str, Any]]:
    """The model's shape with these classes, and what that changes in loading its weights."""
    if config.id2label == class_names:
        return config, {}
    config = dataclasses.replace(config, num_labels=len(class_names), id2label=class_names)
    return config, {"fresh": ViT.new_head_tensors}


def normalize(config: ViTConfig, images: Array) -> Array:
    """Images as the model takes them: in its size and channels, from -1 to 1."""
    pixels = images.astype(jnp.float32) / 127.5 - 1.0
    height, width = np.broadcast_to(config.image_size, 2)  # a pair, or one number for both
    pixels = jax.image.resize(pixels, (len(pixels), height, width, pixels.shape[-1]), "bilinear")
    return jnp.broadcast_to(pixels, (*pixels.shape[:-1], config.num_channels))


# The loss.


def losses(model: ViT, batch: dict[str, Array]) -> tuple[Array, Array]:
    """The loss of each image, (B,), all of which count."""
    logits = model(normalize(model.config, batch["pixels"]))
    own = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return own, jnp.ones(own.shape, bool)


# The predictions.


def predict(model: ViT, images: np.ndarray, batch: int) -> np.ndarray:
    """The most likely class of each image, shape (N,)."""
    graphdef, params = nnx.split(model)
    found = [
        np.asarray(_predict(graphdef, params, pixels))[real]
        for pixels, real in batches.in_order(images, batch)
    ]
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _predict(graphdef: Any, params: Any, images: Array) -> Array:
    model = nnx.merge(graphdef, params)
    return model(normalize(model.config, images)).argmax(axis=-1)


def most_mistaken(predicted: np.ndarray, images: Images, most: int = 3) -> str:
    """Which classes are mistaken most often, and what they are taken for."""
    names = images.class_names
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (images.labels, predicted), 1)
    total = np.maximum(confusion.sum(axis=1), 1)  # a class may have no image
    np.fill_diagonal(confusion, 0)
    wrong = confusion.sum(axis=1) / total
    worst = [i for i in np.argsort(-wrong, kind="stable")[:most] if wrong[i]]
    taken_for = confusion.argmax(axis=1)
    return ", ".join(f"{names[i]} ({wrong[i]:.0%}, for {names[taken_for[i]]})" for i in worst)


def draw_predictions(predicted: np.ndarray, images: Images, path: Path) -> None:
    """The first images with their predicted classes; wrong ones in red, with the right ones."""
    figure, axes = plt.subplots(*SHOWN, figsize=(9, 7.2), layout="constrained")
    for place in axes.flat:
        place.axis("off")
    names = images.class_names
    for place, pixels, label, guess in zip(
        axes.flat, images.images, images.labels, predicted, strict=False
    ):
        place.imshow(pixels.squeeze(), cmap="gray_r")
        right = label == guess
        title = names[guess] if right else f"{names[guess]}\n(is {names[label]})"
        place.set_title(title, color="black" if right else "red", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(s: Settings) -> None:
    data = load_data(s.data)
    for split, images in data.items():
        print(f"{split}: {len(images.images):,} images of {len(images.class_names)} classes")
    test = data["test"]
    config = load_config(s, ViT, PRESETS | {"tiny": TINY})
    config, changes = for_classes(config, test.class_names)
    if (channels := test.images.shape[-1]) not in (1, config.num_channels):
        raise datasets.DataError(
            f"{s.data} has images of {channels} channels, the model takes {config.num_channels}"
        )

    def new_model() -> ViT:
        return load_model(s, ViT, config, **changes, rngs=nnx.Rngs(s.seed))

    def evaluate(model: ViT) -> tuple[dict[str, float], np.ndarray]:
        predicted = predict(model, test.images, s.heldout_batch)
        loss = training.heldout_loss(losses, model, rows(test), s.heldout_batch)
        return {"test_loss": loss, "accuracy": metrics.accuracy(predicted, test.labels)}, predicted

    task = training.Task(
        losses=losses,
        train=rows(data["train"]),
        validation=rows(data["validation"]),
        unit="images",
        units=1,
        learning_rates=LEARNING_RATES,
        files={},
    )
    runs, curves, predictions = training.compare(s, task, new_model, evaluate)

    print("\nmistaken most often:")
    for method, predicted in predictions.items():
        print(f"  {method:9} {most_mistaken(predicted, test)}")
    last, picture = s.methods()[-1], s.output / "predictions.png"
    if devices.is_first():
        draw_predictions(predictions[last], test, picture)
    print(f"\nwrote the first images and what {last} takes them for to {picture}")
    title = "Image classification"
    report.conclude(s, runs, curves, title=title, unit="image", scores=["accuracy"])


if __name__ == "__main__":
    settings.run(main, Settings, __doc__)
