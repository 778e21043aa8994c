"""The model and the tokenizer that the settings name: new, from a folder, or from the hub."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from florax_examples import tokenization
from florax_examples.models import checkpoints
from florax_examples.settings import Training
from florax_examples.tokenization import Tokenizer


def load_tokenizer(
    settings: Training, texts: Callable[[], Iterable[str]], vocab_size: int
) -> Tokenizer:
    """The tokenizer in the folder `settings.tokenizer`, the model's own, or a new one.

    Args:
      settings: for `tokenizer`, `model` and `pretrained`.
      texts: what to train a byte-level BPE on where there is none.
      vocab_size: of that one.
    """
    if settings.tokenizer:
        return tokenization.load(checkpoints.resolve(settings.tokenizer))
    if has_weights(settings) and tokenization.is_in(folder := checkpoints.resolve(settings.model)):
        return tokenization.load(folder)
    return tokenization.train(texts(), vocab_size)


def load_config(settings: Training, model_class: Any, presets: Mapping[str, Any]) -> Any:
    """The shape of the model."""
    if has_weights(settings) or settings.model not in presets:
        return checkpoints.read_config(checkpoints.resolve(settings.model), model_class)
    return presets[settings.model]


def load_model(settings: Training, model_class: Any, config: Any, **changes: Any) -> nnx.Module:
    """The model with the weights that the settings name, or with new ones.

    Args:
      settings: which weights, and in which dtypes to keep them and to compute.
      model_class: of the model.
      config: of new weights.
      changes: for `checkpoints.load`.
    """
    options = {
        "dtype": jnp.dtype(settings.dtype),
        "param_dtype": jnp.dtype(settings.param_dtype),
        "checkpoint": settings.checkpoint_activations,
    }
    if has_weights(settings):
        folder = checkpoints.resolve(settings.model)
        return checkpoints.load(folder, model_class, config=config, **changes, **options)
    return model_class(config, rngs=nnx.Rngs(settings.seed), **options)


def has_weights(settings: Training) -> bool:
    """Whether training goes on from weights in a folder or on the hub."""
    return settings.pretrained and settings.model != "tiny"
