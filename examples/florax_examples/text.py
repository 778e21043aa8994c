"""Rows of tokens: padding them, and writing more of them with a decoder-only model."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from tqdm import tqdm

from florax_examples import batches, devices
from florax_examples.datasets import DataError
from florax_examples.models import generation
from florax_examples.tokenization import Tokenizer, TokenizerError


def pad_right(rows: list[list[int]], length: int, value: int) -> np.ndarray:
    """Stack token lists, each filled up with `value` at its end: (len(rows), length), int32."""
    return np.array([row + [value] * (length - len(row)) for row in rows], np.int32)


def pad_left(rows: list[list[int]], length: int, value: int) -> np.ndarray:
    """The same, filled up at the beginning."""
    return np.array([[value] * (length - len(row)) + row for row in rows], np.int32)


def check_room(config: Any, **lengths: int) -> None:
    """Refuse rows of more tokens, all `lengths` together, than a decoder has positions for."""
    most = getattr(config, config.length_setting)
    if sum(lengths.values()) > most:
        named = " and ".join(f"{name}={length}" for name, length in lengths.items())
        raise DataError(f"{config.length_setting}={most} of the model has no room for {named}")


def check_ids(config: Any, rows: Iterable[np.ndarray]) -> None:
    """Refuse tokens that the model has no embedding for, where another's tokenizer gave them."""
    largest = max(int(ids.max()) for ids in rows)
    if largest >= config.vocab_size:
        raise TokenizerError(
            f"the tokenizer gives ids up to {largest}, vocab_size={config.vocab_size} of the model"
        )


def write_after(
    model: Any, ids: Array, mask: Array, new_tokens: int, beams: int, eos: int, pad: int
) -> Array:
    """What a decoder-only model writes after each prompt; (B, new_tokens)."""
    cache = model.init_cache(len(ids), ids.shape[1] + new_tokens)
    search = {"beams": beams, "batch_axis": model.cache_batch_axis}
    return generation.write(model, cache, ids, mask, new_tokens, eos, pad, **search)


def generate(
    model: nnx.Module,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    new_tokens: int,
    beams: int = 1,
    batch: int = 64,
    write: Callable[..., Array] = write_after,
) -> list[str]:
    """What a model writes for each prompt, up to its end token.

    Args:
      model: the model.
      tokenizer: for the end token, and for the text.
      prompts: tokens.
      new_tokens: to write, at most.
      beams: of the search; 1 is greedy.
      batch: prompts at a time.
      write: with the arguments of `write_after`, for prompts that are padded on the left.
    """
    length = max(map(len, prompts))
    data = {
        "ids": pad_left(prompts, length, tokenizer.pad),
        "mask": pad_left([[1] * len(row) for row in prompts], length, 0) == 1,
    }
    graphdef, params = nnx.split(model)
    options = (new_tokens, beams, tokenizer.eos, tokenizer.pad)
    texts: list[str] = []
    shown = {"desc": "writing", "unit": " texts", "disable": not devices.is_first()}
    with tqdm(total=len(prompts), leave=False, **shown) as bar:
        for rows, real in batches.in_order(data, min(batch, len(prompts))):
            tokens = _write(write, graphdef, params, rows["ids"], rows["mask"], options)
            texts += tokenizer.decode_batch(np.asarray(tokens)[real])
            bar.update(len(texts) - bar.n)
    return [text.strip() for text in texts]


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def _write(
    write: Any, graphdef: Any, params: Any, ids: Array, mask: Array, options: tuple[int, ...]
) -> Array:
    return write(nnx.merge(graphdef, params), ids, mask, *options)
