"""Greedy decoding with a key/value cache, for any decoder-only model of this folder."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def greedy(
    model: Any, cache: Any, prompt: Array, mask: Array, new_tokens: int, eos: int | None, pad: int
) -> Array:
    """Extend each prompt by its likeliest next token, again and again. Made to run under jit.

    Args:
      model: `model(ids, positions=, mask=, cache=)` returns logits and the next cache.
      cache: an empty cache with room for the longest prompt and `new_tokens` more.
      prompt: token ids, shape (B, T), int32, padded on either side.
      mask: shape (B, T), bool, False for padding.
      new_tokens: how many tokens to write at most.
      eos: a row that wrote this token is done; None means that no row ever is.
      pad: what a row that is done is filled with.

    Returns:
      The new tokens, shape (B, new_tokens), int32.
    """
    length = mask.sum(axis=1)
    # Padding does not count: a model with learned positions would notice.
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    logits, cache = model(prompt, positions=positions, mask=mask, cache=cache)
    last = jnp.argmax(jnp.where(mask, positions, -1), axis=1)

    def write(i, written, logits, done):
        token = jnp.where(done, pad, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        return token, written.at[:, i].set(token), done | (token == eos)

    def keep_going(carry):
        i, _, _, done, _ = carry
        return (i < new_tokens) & ~done.all()

    def extend(carry):
        i, token, written, done, cache = carry
        positions = (length + i - 1)[:, None]
        logits, cache = model(token[:, None], positions=positions, cache=cache)
        token, written, done = write(i, written, logits[:, 0], done)
        return i + 1, token, written, done, cache

    written = jnp.full((len(prompt), new_tokens), pad, jnp.int32)
    first_logits = logits[jnp.arange(len(prompt)), last]
    start = write(0, written, first_logits, jnp.zeros(len(prompt), bool))
    return jax.lax.while_loop(keep_going, extend, (1, *start, cache))[2]
