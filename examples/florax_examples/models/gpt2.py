"""GPT-2 in flax.nnx: a decoder-only Transformer with learned positions.

Modules and settings carry the names of the Hugging Face checkpoints (`h.0.attn.c_attn`, `n_embd`).
In shapes, B is the batch, T the tokens of this call, S the slots of the cache, C the width
(`n_embd`), H the heads, D = C / H, V the vocabulary.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from florax_examples.models import cache as caches
from florax_examples.models import layers
from florax_examples.models.cache import Cache, KeyValue
from florax_examples.models.transformer import Decoder, known_settings

# What `from_huggingface` takes for granted. Of the activation both names mean the same function.
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


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
    tie_word_embeddings: bool = True  # the head is the embedding of the tokens
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None

    length_setting: ClassVar = "n_positions"

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(
                "n_embd must be a multiple of n_head, "
                f"got n_embd={self.n_embd} and n_head={self.n_head}"
            )

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        return self.n_layer, self.n_head, self.n_embd // self.n_head

    @classmethod
    def from_huggingface(cls, config: dict[str, Any]) -> "GPT2Config":
        """Read a config.json as transformers 4 or 5 wrote it; dropout is left out."""
        for name, values in FIXED.items():
            if (value := config.get(name, values[0])) not in values:
                expected = " or ".join(map(repr, values))
                raise ValueError(f"{name} must be {expected}, got {value!r}")
        return cls(**known_settings(cls, config))

    def to_huggingface(self) -> dict[str, Any]:
        """The settings of a config.json that transformers 4 and 5 read alike."""
        return dataclasses.asdict(self) | {name: values[0] for name, values in FIXED.items()}


PRESETS = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}


class Attention(nnx.Module):
    def __init__(self, config: GPT2Config, **options: Any):
        width = config.n_embd
        self.n_head = config.n_head
        self.c_attn = _linear(config, width, 3 * width, **options)
        self.c_proj = _linear(config, width, width, residual=True, **options)

    def __call__(
        self, x: Array, attend: Array, slots: Array | None, cache: KeyValue | None
    ) -> tuple[Array, KeyValue | None]:
        heads = (*x.shape[:2], self.n_head, -1)
        q, k, v = (y.reshape(heads) for y in jnp.split(self.c_attn(x), 3, axis=-1))  # (B, T, H, D)
        if cache is not None:
            cache = caches.store(cache, k, v, slots)
            k, v = (array.astype(q.dtype) for array in cache)  # (B, S, H, D)
        y = jax.nn.dot_product_attention(q, k, v, mask=attend)
        return self.c_proj(y.reshape(x.shape)), cache


class FeedForward(nnx.Module):
    def __init__(self, config: GPT2Config, **options: Any):
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = _linear(config, config.n_embd, inner, **options)
        self.c_proj = _linear(config, inner, config.n_embd, residual=True, **options)

    def __call__(self, x: Array) -> Array:
        return self.c_proj(nnx.gelu(self.c_fc(x), approximate=True))


class Block(nnx.Module):
    def __init__(self, config: GPT2Config, **options: Any):
        self.ln_1 = _layer_norm(config, **options)
        self.attn = Attention(config, **options)
        self.ln_2 = _layer_norm(config, **options)
        self.mlp = FeedForward(config, **options)

    def __call__(
        self, x: Array, attend: Array, slots: Array | None, cache: KeyValue | None
    ) -> tuple[Array, KeyValue | None]:
        y, cache = self.attn(self.ln_1(x), attend, slots, cache)
        x = x + y
        return x + self.mlp(self.ln_2(x)), cache  # (B, T, C)


class GPT2(Decoder):
    """The language model; for the arguments see `Transformer`."""

    Config = GPT2Config
    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    base_prefix = "transformer."
    ignored_tensors = (r".*\.attn\.(masked_)?bias",)  # old files keep the causal mask

    def __init__(self, config: GPT2Config, *, checkpoint: bool = False, **options: Any):
        def embed(size: int) -> nnx.Embed:
            normal = nnx.initializers.normal(config.initializer_range)
            return nnx.Embed(size, config.n_embd, embedding_init=normal, **options)

        self.config = config
        self.checkpoint = checkpoint
        self.wte = embed(config.vocab_size)
        self.wpe = embed(config.n_positions)
        self.h = nnx.List([Block(config, **options) for _ in range(config.n_layer)])
        self.ln_f = _layer_norm(config, **options)
        if not config.tie_word_embeddings:
            options |= {"use_bias": False, "preferred_element_type": jnp.float32}
            self.lm_head = _linear(config, config.n_embd, config.vocab_size, **options)

    @staticmethod
    def tensor_axes(path: tuple, ndim: int) -> tuple[int, ...]:
        """How the axes of a checkpoint's tensor become those of the parameter at a path."""
        # GPT-2's own layers are stored as (inputs, outputs), as nnx has them.
        return (1, 0) if path[0] == "lm_head" else tuple(range(ndim))

    @property
    def embedding(self) -> nnx.Embed:
        return self.wte

    def run_layers(
        self, ids: Array, positions: Array, attend: Array, slots: Array | None, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        if not isinstance(positions, jax.core.Tracer):  # traced ones past the end give NaN
            self.check_length("positions + 1", int(positions.max()) + 1)

        def call(block: Block, x: Array, cache: KeyValue | None) -> tuple[Array, KeyValue | None]:
            return block(x, attend, slots, cache)

        x = self.wte(ids) + self.wpe(positions)  # (B, T, C)
        x, cache = layers.run(self.h, call, x, cache, checkpoint=self.checkpoint)
        return self.ln_f(x), cache


def _linear(
    config: GPT2Config, inputs: int, outputs: int, *, residual: bool = False, **options: Any
) -> nnx.Linear:
    # 2 * n_layer branches add to the residual stream; scaled so, its variance does not grow.
    scale = 1 / math.sqrt(2 * config.n_layer) if residual else 1
    init = nnx.initializers.normal(config.initializer_range * scale)
    return nnx.Linear(inputs, outputs, kernel_init=init, **options)


def _layer_norm(config: GPT2Config, **options: Any) -> nnx.LayerNorm:
    return layers.layer_norm(config.n_embd, config.layer_norm_epsilon, **options)
