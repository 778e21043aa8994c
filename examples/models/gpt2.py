"""GPT-2 in flax.nnx: a decoder-only Transformer with learned positions and a tied head.

Modules and settings carry the names of the Hugging Face checkpoints (`h.0.attn.c_attn`, `n_embd`).
In shapes, B is the batch, T the tokens of this call, S the slots of the cache, C the width
(`n_embd`), H the heads, D = C / H, V the vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The defaults are those of the smallest published model (124 million parameters)."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the feed-forward layer; None means 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(
                "n_embd must be a multiple of n_head, "
                f"got n_embd={self.n_embd} and n_head={self.n_head}"
            )


class KeyValue(NamedTuple):
    """What one layer remembers. Slot s of a row belongs to the token at position s of that row."""

    key: Array  # (B, S, H, D)
    value: Array  # (B, S, H, D)


def init_cache(config: GPT2Config, batch: int, length: int, dtype=jnp.float32) -> list[KeyValue]:
    """An empty cache, one entry per layer, for rows of up to `length` tokens without padding."""
    if length > config.n_positions:
        raise ValueError(f"length={length} exceeds n_positions={config.n_positions}")
    zeros = jnp.zeros((batch, length, config.n_head, config.n_embd // config.n_head), dtype)
    return [KeyValue(zeros, zeros) for _ in range(config.n_layer)]


class Attention(nnx.Module):
    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.n_head = config.n_head
        self.c_attn = _linear(config, config.n_embd, 3 * config.n_embd, rngs=rngs)
        self.c_proj = _linear(config, config.n_embd, config.n_embd, residual=True, rngs=rngs)

    def __call__(
        self, x: Array, attend: Array, cache: KeyValue | None, slots: Array
    ) -> tuple[Array, KeyValue | None]:
        heads = (*x.shape[:2], self.n_head, -1)
        q, k, v = (y.reshape(heads) for y in jnp.split(self.c_attn(x), 3, axis=-1))  # (B, T, H, D)
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            # Padding has a slot past the end, and "drop" leaves it out.
            k = cache.key.at[rows, slots].set(k, mode="drop")
            v = cache.value.at[rows, slots].set(v, mode="drop")
            cache = KeyValue(k, v)  # (B, S, H, D)
        y = jax.nn.dot_product_attention(q, k, v, mask=attend)
        return self.c_proj(y.reshape(x.shape)), cache


class FeedForward(nnx.Module):
    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = _linear(config, config.n_embd, inner, rngs=rngs)
        self.c_proj = _linear(config, inner, config.n_embd, residual=True, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.c_proj(nnx.gelu(self.c_fc(x), approximate=True))


class Block(nnx.Module):
    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.ln_1 = _layer_norm(config, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = _layer_norm(config, rngs=rngs)
        self.mlp = FeedForward(config, rngs=rngs)

    def __call__(
        self, x: Array, attend: Array, cache: KeyValue | None, slots: Array
    ) -> tuple[Array, KeyValue | None]:
        y, cache = self.attn(self.ln_1(x), attend, cache, slots)
        x = x + y
        return x + self.mlp(self.ln_2(x)), cache  # (B, T, C)


class GPT2(nnx.Module):
    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(config.initializer_range)
        self.wte = nnx.Embed(config.vocab_size, config.n_embd, embedding_init=normal, rngs=rngs)
        self.wpe = nnx.Embed(config.n_positions, config.n_embd, embedding_init=normal, rngs=rngs)
        self.h = nnx.List([Block(config, rngs=rngs) for _ in range(config.n_layer)])
        self.ln_f = _layer_norm(config, rngs=rngs)

    def stack(self) -> None:
        """Make `h` one block whose arrays have a leading axis of layers, and scan over them.

        Compiles once for all layers, and keeps no activations inside of them: the backward pass
        computes those again, a layer at a time.
        """
        graphdefs, params = zip(*map(nnx.split, self.blocks()), strict=True)
        self.h = nnx.merge(graphdefs[0], jax.tree.map(lambda *x: jnp.stack(x), *params))

    def unstack(self) -> None:
        """Make `h` a list of blocks again, with the names of the checkpoints."""
        self.h = nnx.List(self.blocks())

    def blocks(self) -> list[Block]:
        """The blocks one by one, stacked or not."""
        if isinstance(self.h, nnx.List):
            return list(self.h)
        graphdef, params = nnx.split(self.h)
        layers = range(self.config.n_layer)
        return [nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], params)) for i in layers]

    def __call__(self, ids: Array, **options: Any) -> tuple[Array, list[KeyValue] | None]:
        """Logits for the token after each of `ids`, shape (B, T, V); for the rest see `features`.

        `logits(x)` makes them of some features `x`, where all at once would be too many.
        """
        x, cache = self.features(ids, **options)
        return self.logits(x), cache

    def logits(self, features: Array) -> Array:
        return self.wte.attend(features)  # (..., V)

    def features(
        self,
        ids: Array,
        *,
        positions: Array | None = None,
        mask: Array | None = None,
        cache: list[KeyValue] | None = None,
    ) -> tuple[Array, list[KeyValue] | None]:
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
        if length > self.config.n_positions:
            raise ValueError(f"{length} tokens exceed n_positions={self.config.n_positions}")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
        if mask is None:
            mask = jnp.ones(ids.shape, bool)

        if cache is None:
            slots = positions
            attend = jnp.tril(jnp.ones((length, length), bool)) & mask[:, None, None, :]
        else:
            # A slot equals a position, so no padding is ever stored, and all slots up to the own
            # position are filled: one comparison is the whole mask.
            size = cache[0].key.shape[1]
            slots = jnp.where(mask, positions, size)
            attend = jnp.arange(size) <= positions[:, None, :, None]  # (B, 1, T, S)

        x = self.wte(ids) + self.wpe(positions)  # (B, T, C)
        if cache is not None:
            new_cache = []
            for block, layer_cache in zip(self.blocks(), cache, strict=True):
                x, layer_cache = block(x, attend, layer_cache, slots)
                new_cache.append(layer_cache)
            return self.ln_f(x), new_cache

        if isinstance(self.h, nnx.List):
            for block in self.h:
                x, _ = block(x, attend, None, slots)
        else:
            graphdef, params = nnx.split(self.h)

            # Between forward and backward pass only what enters a layer is kept.
            @functools.partial(jax.checkpoint, prevent_cse=False)  # needless in a scan
            def layer(x: Array, params: nnx.State) -> tuple[Array, None]:
                return nnx.merge(graphdef, params)(x, attend, None, slots)

            x, _ = jax.lax.scan(layer, x, params)
        return self.ln_f(x), None


def _linear(
    config: GPT2Config, inputs: int, outputs: int, *, residual: bool = False, rngs: nnx.Rngs
) -> nnx.Linear:
    # 2 * n_layer branches add to the residual stream; scaled so, its variance does not grow.
    scale = 1 / math.sqrt(2 * config.n_layer) if residual else 1
    init = nnx.initializers.normal(config.initializer_range * scale)
    return nnx.Linear(inputs, outputs, kernel_init=init, rngs=rngs)


def _layer_norm(config: GPT2Config, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x²] - E[x]², cancels where the mean is large.
    return nnx.LayerNorm(
        config.n_embd, epsilon=config.layer_norm_epsilon, use_fast_variance=False, rngs=rngs
    )
