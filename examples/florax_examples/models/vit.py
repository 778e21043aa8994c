"""Vision Transformer in flax.nnx: patches of an image as tokens, and a class token to classify it.

Settings carry the names of the Hugging Face checkpoints; for the parameters see `ViT.tensor_name`.
In shapes, B is the batch, T = 1 + P the tokens of an image (the class token and P patches), C the
width (`hidden_size`), H the heads of D = C / H each.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from florax_examples.models import layers
from florax_examples.models.transformer import Transformer, known_settings


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The defaults are those of the smallest published model (87 million parameters, ImageNet)."""

    image_size: int | tuple[int, int] = 224  # or (height, width)
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    num_labels: int = 1000
    id2label: tuple[str, ...] | None = None  # their names; None means LABEL_0, LABEL_1, ...

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads, got "
                f"hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads}"
            )
        if self.id2label is not None and len(self.id2label) != self.num_labels:
            raise ValueError(
                f"id2label names {len(self.id2label)} labels, got num_labels={self.num_labels}"
            )
        self.grid(*_pair(self.image_size))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of that size."""
        patch = _pair(self.patch_size)
        if min(height, width) < 1 or height % patch[0] or width % patch[1]:
            raise ValueError(
                f"an image must consist of whole patches, got {height}x{width} pixels with "
                f"patch_size={self.patch_size}"
            )
        return height // patch[0], width // patch[1]

    @classmethod
    def from_huggingface(cls, config: dict[str, Any]) -> "ViTConfig":
        """Read a config.json as transformers 4 or 5 wrote it; dropout is left out."""
        if (activation := config.get("hidden_act", "gelu")) != "gelu":
            raise ValueError(f"hidden_act must be 'gelu', got {activation!r}")
        labels = config.get("id2label")  # there by number, here in their order
        given = known_settings(cls, {k: v for k, v in config.items() if k != "id2label"})
        if labels is None:
            given.setdefault("num_labels", 2)  # as transformers has it
        elif not isinstance(labels, dict):
            raise ValueError(f"id2label cannot be {labels!r}")
        else:
            given["num_labels"] = len(labels)
            ordered = sorted((int(label), name) for label, name in labels.items())
            if [label for label, _ in ordered] != list(range(len(labels))):
                raise ValueError(f"id2label must name labels 0, 1, ..., got {list(labels)}")
            if any(name != f"LABEL_{label}" for label, name in ordered):
                given["id2label"] = tuple(name for _, name in ordered)
        return cls(**given)

    def to_huggingface(self) -> dict[str, Any]:
        """The settings of a config.json that transformers 4 and 5 read alike."""
        config = dataclasses.asdict(self)
        del config["num_labels"]  # it follows from the names
        names = self.id2label or [f"LABEL_{label}" for label in range(self.num_labels)]
        return config | {
            "id2label": {str(label): name for label, name in enumerate(names)},
            "label2id": {name: label for label, name in enumerate(names)},
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }


_LARGE = ViTConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)
PRESETS = {
    "google/vit-base-patch16-224": ViTConfig(),
    "google/vit-large-patch16-224": _LARGE,
    # Trained for the labels of ImageNet-21k, but published without their classifier.
    "google/vit-base-patch16-224-in21k": ViTConfig(num_labels=21_843),
    "google/vit-large-patch16-224-in21k": dataclasses.replace(_LARGE, num_labels=21_843),
}


# What the checkpoints call the modules of a layer, where it is not the same.
_TENSORS = {
    ("attention", "query"): ("attention", "attention", "query"),
    ("attention", "key"): ("attention", "attention", "key"),
    ("attention", "value"): ("attention", "attention", "value"),
    ("attention", "output"): ("attention", "output", "dense"),
    ("feed_forward", "intermediate"): ("intermediate", "dense"),
    ("feed_forward", "output"): ("output", "dense"),
}


class Attention(nnx.Module):
    def __init__(self, config: ViTConfig, **options: Any):
        width, bias = config.hidden_size, config.qkv_bias
        self.num_heads = config.num_attention_heads
        self.query = _linear(config, width, width, bias=bias, **options)
        self.key = _linear(config, width, width, bias=bias, **options)
        self.value = _linear(config, width, width, bias=bias, **options)
        self.output = _linear(config, width, width, **options)

    def __call__(self, x: Array) -> Array:
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (layer(x).reshape(heads) for layer in (self.query, self.key, self.value))
        y = jax.nn.dot_product_attention(q, k, v)  # (B, T, H, D)
        return self.output(y.reshape(x.shape))


class FeedForward(nnx.Module):
    def __init__(self, config: ViTConfig, **options: Any):
        width, inner = config.hidden_size, config.intermediate_size
        self.intermediate = _linear(config, width, inner, **options)
        self.output = _linear(config, inner, width, **options)

    def __call__(self, x: Array) -> Array:
        return self.output(nnx.gelu(self.intermediate(x), approximate=False))


class Layer(nnx.Module):
    def __init__(self, config: ViTConfig, **options: Any):
        self.layernorm_before = _layer_norm(config, **options)
        self.attention = Attention(config, **options)
        self.layernorm_after = _layer_norm(config, **options)
        self.feed_forward = FeedForward(config, **options)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.feed_forward(self.layernorm_after(x))  # (B, T, C)


class ViT(Transformer):
    """The image classifier; for the arguments see `Transformer`."""

    Config = ViTConfig
    model_type = "vit"
    architecture = "ViTForImageClassification"
    base_prefix = "vit."
    ignored_tensors = (r"vit\.pooler\..*",)  # of a base model, which does not classify
    new_head_tensors = (r"classifier\..*",)  # what other labels need anew

    def __init__(self, config: ViTConfig, *, checkpoint: bool = False, **options: Any):
        rngs, param_dtype = options["rngs"], options.get("param_dtype", jnp.float32)
        normal, width = nnx.initializers.normal(config.initializer_range), config.hidden_size
        self.config = config
        self.checkpoint = checkpoint
        self.cls_token = nnx.Param(normal(rngs.params(), (1, 1, width), param_dtype))
        grid = config.grid(*_pair(config.image_size))
        shape = (1, 1 + math.prod(grid), width)
        self.position_embeddings = nnx.Param(normal(rngs.params(), shape, param_dtype))
        patch = _pair(config.patch_size)
        self.patch_embeddings = nnx.Conv(
            config.num_channels,
            width,
            kernel_size=patch,
            strides=patch,
            padding="VALID",
            kernel_init=normal,
            **options,
        )
        count = config.num_hidden_layers
        self.layers = nnx.List([Layer(config, **options) for _ in range(count)])
        self.layernorm = _layer_norm(config, **options)
        self.classifier = _linear(config, width, config.num_labels, **options)

    @staticmethod
    def tensor_name(path: tuple) -> str:
        """What the checkpoints call the parameter at a path."""
        *modules, kind = path
        match modules:
            case []:
                return f"vit.embeddings.{kind}"  # the class token and the positions
            case ["patch_embeddings"]:
                modules = ["vit", "embeddings", "patch_embeddings", "projection"]
            case ["layers", layer, *own]:
                own = _TENSORS.get(tuple(own), own)
                modules = ["vit", "encoder", "layer", layer, *own]
            case ["layernorm"]:
                modules = ["vit", "layernorm"]
        return ".".join(map(str, (*modules, "bias" if kind == "bias" else "weight")))

    @staticmethod
    def tensor_axes(path: tuple, ndim: int) -> tuple[int, ...]:
        """How the axes of a checkpoint's tensor become those of the parameter at a path."""
        if path[-1] != "kernel":
            return tuple(range(ndim))
        return (2, 3, 1, 0) if path[0] == "patch_embeddings" else (1, 0)

    def __call__(self, pixels: Array) -> Array:
        """Scores of the labels, shape (B, num_labels), float32; for `pixels` see `features`."""
        return self.classifier(self.features(pixels)[:, 0]).astype(jnp.float32)

    def features(self, pixels: Array) -> Array:
        """What the last layer makes of an image: the class token first, which the classifier sees.

        Args:
          pixels: shape (B, height, width, channels), floating, normalised as in the training of
            the weights. The size may differ from `image_size`, in multiples of `patch_size`: then
            the position embeddings are interpolated.

        Returns:
          Features, shape (B, T, C).
        """
        config = self.config
        if pixels.ndim != 4 or pixels.shape[-1] != config.num_channels:
            raise ValueError(
                "pixels must have the shape (batch, height, width, "
                f"num_channels={config.num_channels}), got {pixels.shape}"
            )
        if not jnp.issubdtype(pixels.dtype, jnp.floating):
            raise ValueError(f"pixels must be normalised floating numbers, got {pixels.dtype}")
        grid = config.grid(*pixels.shape[1:3])

        patches = self.patch_embeddings(pixels)
        patches = patches.reshape(len(patches), -1, config.hidden_size)  # (B, P, C)
        cls = self.cls_token[...].astype(patches.dtype)
        cls = jnp.broadcast_to(cls, (len(patches), 1, config.hidden_size))
        x = jnp.concatenate([cls, patches], axis=1)  # (B, T, C)
        positions = interpolate_positions(
            self.position_embeddings[...], config.grid(*_pair(config.image_size)), grid
        )
        x = x + positions.astype(x.dtype)

        def call(layer: Layer, x: Array, _: None) -> tuple[Array, None]:
            return layer(x), None

        x, _ = layers.run(self.layers, call, x, checkpoint=self.checkpoint)
        return self.layernorm(x)


def interpolate_positions(positions: Array, old: tuple[int, int], new: tuple[int, int]) -> Array:
    """Position embeddings for another grid of patches, as torch's bicubic interpolation has them.

    Args:
      positions: shape (1, 1 + old rows * old columns, C); the first is that of the class token.
      old: rows and columns of the grid that they are for.
      new: rows and columns of the grid that they shall be for.

    Returns:
      Shape (1, 1 + new rows * new columns, C).
    """
    if old == new:
        return positions
    cls, grid = positions[:, :1], positions[:, 1:].reshape(*old, -1)
    rows, columns = map(_bicubic, old, new)
    grid = jnp.einsum("yi,xj,ijc->yxc", rows, columns, grid)
    return jnp.concatenate([cls, grid.reshape(1, -1, grid.shape[-1])], axis=1)


def _bicubic(old: int, new: int) -> np.ndarray:
    """The weights of `old` points in `new` ones over the same length, shape (new, old), float32.

    `jax.image.resize` has another kernel (a = -0.5), and smooths where there are less points.
    """
    a = -0.75
    centers = (np.arange(new) + 0.5) * old / new - 0.5  # align_corners=False
    points = np.floor(centers)[:, None] + np.arange(-1, 3)  # the four around each, (new, 4)
    d = np.abs(centers[:, None] - points)
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    weights = np.zeros((new, old), np.float32)
    edge = np.clip(points, 0, old - 1).astype(int)  # past the edge, the edge
    np.add.at(weights, (np.arange(new)[:, None], edge), np.where(d <= 1, near, far))
    return weights


def _linear(
    config: ViTConfig, inputs: int, outputs: int, *, bias: bool = True, **options: Any
) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=init, **options)


def _layer_norm(config: ViTConfig, **options: Any) -> nnx.LayerNorm:
    return layers.layer_norm(config.hidden_size, config.layer_norm_eps, **options)
