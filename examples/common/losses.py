"""Losses that take less memory than they look."""

import functools
from collections.abc import Callable

import jax
import optax
from jax import Array


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
