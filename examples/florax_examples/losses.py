"""Losses that take less memory than they look."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

LOGITS = 1024  # tokens that have them at once; with GPT-2's vocabulary 200 MiB


def chunked_cross_entropy(
    head: Callable[[Array], Array], features: Array, labels: Array, chunk: int
) -> Array:
    """The cross-entropy of every label, with the logits of `chunk` tokens at a time.

    With a large vocabulary V the logits of all tokens are by far the largest array of a step, and
    their gradient is as large. Here the backward pass makes each chunk's again.

    Args:
      head: makes logits of features: (..., C) to (..., V).
      features: shape (..., C).
      labels: shape (...), int32.
      chunk: how many tokens have logits at once.

    Returns:
      The losses, shape (...).
    """

    # A scan's iterations are apart anyway; and all in one chunk should cost what it costs plainly.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def token_loss(token: tuple[Array, Array]) -> Array:
        own_features, label = token
        return optax.softmax_cross_entropy_with_integer_labels(head(own_features), label)

    tokens = features.reshape(-1, features.shape[-1]), labels.reshape(-1)
    return jax.lax.map(token_loss, tokens, batch_size=chunk).reshape(labels.shape)


def target_losses(model: Any, batch: dict[str, Array]) -> tuple[Array, Array]:
    """The loss of each token of a decoder-only model, zero where it is no target, and which are.

    Args:
      model: has `features` and `logits`.
      batch: `ids`, shape (B, T), and of each row where the target `begin`s and where it `end`s.

    Returns:
      Losses and a mask, of shape (B, T - 1): of all tokens but the first.
    """
    inputs, labels = batch["ids"][:, :-1], batch["ids"][:, 1:]
    place = 1 + jnp.arange(labels.shape[1])
    counts = (place >= batch["begin"][:, None]) & (place < batch["end"][:, None])
    features, _ = model.features(inputs)
    losses = chunked_cross_entropy(model.logits, features, labels, LOGITS)
    return jnp.where(counts, losses, 0.0), counts
