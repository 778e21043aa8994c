"""What the architectures share: stacks of layers, and what makes a decoder a language model.

In shapes, B is the batch, T the tokens of this call, S the slots of the cache, C the width, V the
vocabulary.
"""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from florax_examples.models import cache as caches
from florax_examples.models import layers
from florax_examples.models.cache import Cache


def known_settings(config_class: type, config: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of the fields of `config_class`, with tuples for its lists.

    Raises:
      ValueError: a value is of another type than its field, or a size is not positive.
    """
    kinds = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class) if field.name in config]
    given = {k: tuple(v) if isinstance(v := config[k], list) else v for k in names}
    for name, value in given.items():
        if value is None and name.endswith("_token_id"):
            continue  # what that means, a model knows itself
        if not any(_is(value, kind) for kind in _alternatives(kinds[name])):
            raise ValueError(f"{name} cannot be {value!r}")
        is_size = isinstance(value, int) and not isinstance(value, bool)
        if is_size and value < 1 and not name.endswith("_token_id"):
            raise ValueError(f"{name} must be at least 1, got {value}")
    return given


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON, with tuples for lists, is of a field's type."""
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(x, typing.get_args(kind)[0]) for x in value)
    if kind in (int, float):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number and abs(value) < 2**127  # as float32 does; what is no number does not
        return fits and (kind is float or isinstance(value, int))
    return isinstance(value, kind)


class Transformer(nnx.Module):
    """A model whose layers are lists, or stacked for a single scan: see `layers.run`.

    Args:
      config: its sizes.
      checkpoint: keep only what enters each layer for the backward pass, which computes the rest
        again.
      options: of all its layers, as flax.nnx has them: `rngs`, of the initial weights; `dtype`,
        what they compute in, by default what their parameters are kept in; and `param_dtype`, what
        these are kept in, by default float32.
    """

    def stack(self) -> None:
        """Make each list of layers one layer whose arrays have a leading axis of layers."""
        self._change_layers(layers.stack)

    def unstack(self) -> None:
        """Make them lists again, with the names of the checkpoints."""
        self._change_layers(layers.unstack)

    def _change_layers(self, change: Callable[[layers.Layers], layers.Layers]) -> None:
        modules = [part for _, part in nnx.iter_graph(self) if isinstance(part, nnx.Module)]
        for module in modules:
            for name in layers.NAMES:
                if name in vars(module):
                    setattr(module, name, change(getattr(module, name)))

    @property
    def is_stacked(self) -> bool:
        return not any(isinstance(part, nnx.List) for _, part in nnx.iter_graph(self))


class Decoder(Transformer):
    """A language model without an encoder.

    A model says what its `embedding` is, which is the head too where `config` ties them, and with
    `run_layers` how tokens become what the head sees. Its config says the `cache_sizes`, layers,
    heads and numbers a head, and with `length_setting` what limits the tokens of a row.
    """

    @classmethod
    def tensor_name(cls, path: tuple) -> str:
        """What the checkpoints call the parameter at a path."""
        *modules, kind = path
        prefix = "" if modules[0] == "lm_head" else cls.base_prefix
        return prefix + ".".join(map(str, (*modules, "bias" if kind == "bias" else "weight")))

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype = jnp.float32) -> Cache:
        """An empty cache for rows of up to `length` tokens, padding not counted."""
        self.check_length("length", length)
        count, *sizes = self.config.cache_sizes
        return caches.empty(count, batch, length, *sizes, dtype, stacked=self.is_stacked)

    @property
    def cache_batch_axis(self) -> int:
        return int(self.is_stacked)

    def __call__(self, ids: Array, **options: Any) -> tuple[Array, Cache | None]:
        """Logits for the token after each of `ids`, shape (B, T, V); for the rest see `features`.

        `logits(x)` makes them of some features `x`, where all at once would be too many.
        """
        x, cache = self.features(ids, **options)
        return self.logits(x), cache

    def logits(self, features: Array) -> Array:
        """Scores of the vocabulary, shape (..., V), float32."""
        # Never rounded to bfloat16, which cannot tell the likeliest tokens apart: GPT-2's scores
        # are about -100, and it has steps of 0.5 there.
        if not self.config.tie_word_embeddings:
            return self.lm_head(features)
        table = self.embedding.embedding[...].astype(features.dtype)
        return jnp.matmul(features, table.T, preferred_element_type=jnp.float32)

    def features(
        self,
        ids: Array,
        *,
        positions: Array | None = None,
        mask: Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, Cache | None]:
        """What the head sees of each of `ids`, and the cache with `ids` added.

        Args:
          ids: tokens, shape (B, T), int32.
          positions: their positions, shape (B, T), int32; None means 0 to T-1 in every row. With
            padding on the left, or with a cache, the caller knows better and passes them.
          mask: shape (B, T), bool, False for padding; None means that there is none.
          cache: None to attend to `ids` alone; or what `init_cache` or an earlier call returned,
            to attend to all tokens so far at positions up to the own one.

        Returns:
          Features, shape (B, T, C), and the new cache (None without one). What stands in the rows
          of padding means nothing.
        """
        length = ids.shape[1]
        self.check_length("tokens", length)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
        if mask is None:
            mask = jnp.ones(ids.shape, bool)
        if cache is None:
            slots = None
            attend = jnp.tril(jnp.ones((length, length), bool)) & mask[:, None, None, :]
        else:
            slots = caches.slots(cache, positions, mask)
            attend = caches.attend(cache, positions)
        return self.run_layers(ids, positions, attend, slots, cache)

    def check_length(self, name: str, length: int) -> None:
        setting = self.config.length_setting
        most = getattr(self.config, setting)
        if not 1 <= length <= most:
            raise ValueError(f"{name} must be 1 to {setting}={most}, got {length}")
