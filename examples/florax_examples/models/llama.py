"""LLaMA in flax.nnx: a decoder-only Transformer with rotary positions and grouped queries.

Modules and settings carry the names of the Hugging Face checkpoints
(`layers.0.self_attn.q_proj`, `hidden_size`). In shapes, B is the batch, T the tokens of this call,
S the slots of the cache, C the width (`hidden_size`), H the query heads, K the key/value heads,
D the width of a head, V the vocabulary.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from florax_examples.models import cache as caches
from florax_examples.models import layers
from florax_examples.models.cache import Cache, KeyValue
from florax_examples.models.transformer import Decoder, known_settings


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How LLaMA 3.1 and later slow their rotations down: `rope_type` "llama3"."""

    factor: float  # by which long wavelengths are stretched
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The defaults are those of LLaMA 7B, the smallest published model, and of its file format."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as there are query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    length_setting: ClassVar = "max_position_embeddings"

    def __post_init__(self):
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads where head_dim is not "
                f"given, got {self.hidden_size} and {self.num_attention_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim must be even, got {self.head_size}")

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        return self.num_hidden_layers, self.key_value_heads, self.head_size

    @classmethod
    def from_huggingface(cls, config: dict[str, Any]) -> "LlamaConfig":
        """Read a config.json as transformers 4 or 5 wrote it."""
        if (activation := config.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"hidden_act must be 'silu', got {activation!r}")
        given = known_settings(cls, {k: v for k, v in config.items() if k != "rope_scaling"})
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"rope_parameters cannot be {rope!r}")
        given["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", cls.rope_theta))
        given["rope_scaling"] = None
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "llama3":
            names = [field.name for field in dataclasses.fields(RopeScaling)]
            if missing := [name for name in names if name not in rope]:
                raise ValueError(f"rope_type 'llama3' needs {', '.join(missing)}, got {rope}")
            given["rope_scaling"] = RopeScaling(*(rope[name] for name in names))
        elif kind != "default":
            raise ValueError(f"rope_type must be 'default' or 'llama3', got {kind!r}")
        for source in (config, rope):
            if (partial := source.get("partial_rotary_factor", 1.0)) != 1.0:
                raise ValueError(f"partial_rotary_factor must be 1.0, got {partial}")
        return cls(**given)

    def to_huggingface(self) -> dict[str, Any]:
        """The settings of a config.json that transformers 4 and 5 read alike."""
        config = dataclasses.asdict(self)
        if self.rope_scaling is not None:
            config["rope_scaling"]["rope_type"] = "llama3"
        return {
            **config,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_size,
            "hidden_act": "silu",
            # Transformers 5 has its own field, which goes before those of version 4.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                **(config["rope_scaling"] or {}),
            },
        }


def _c4(hidden: int, intermediate: int, layers: int, heads: int, positions: int = 1024):
    # Token ids are those of T5's tokenizer, which these models are trained with.
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
    )


PRESETS = {
    # The sizes that memory-efficient training is compared at on C4 (GaLore, arXiv:2403.03507).
    "60m": _c4(512, 1376, 8, 8),
    "130m": _c4(768, 2048, 12, 12),
    "350m": _c4(1024, 2736, 24, 16),
    "1b": _c4(2048, 5461, 24, 32),
    "7b": _c4(4096, 11008, 32, 32, positions=2048),
    "HuggingFaceTB/SmolLM2-135M": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        initializer_range=0.041666666666666664,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, **options: Any):
        self.head_size = config.head_size
        queries = config.num_attention_heads * config.head_size
        keys = config.key_value_heads * config.head_size

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return _linear(config, inputs, outputs, config.attention_bias, **options)

        self.q_proj = linear(config.hidden_size, queries)
        self.k_proj = linear(config.hidden_size, keys)
        self.v_proj = linear(config.hidden_size, keys)
        self.o_proj = linear(queries, config.hidden_size)

    def __call__(
        self,
        x: Array,
        attend: Array,
        rotation: tuple[Array, Array],
        slots: Array | None,
        cache: KeyValue | None,
    ) -> tuple[Array, KeyValue | None]:
        heads = (*x.shape[:2], -1, self.head_size)
        q = _rotate(self.q_proj(x).reshape(heads), *rotation)  # (B, T, H, D)
        k = _rotate(self.k_proj(x).reshape(heads), *rotation)  # (B, T, K, D)
        v = self.v_proj(x).reshape(heads)  # (B, T, K, D)
        if cache is not None:
            cache = caches.store(cache, k, v, slots)
            k, v = (array.astype(q.dtype) for array in cache)  # (B, S, K, D)
        # Each key/value head serves H / K queries that follow one another.
        y = jax.nn.dot_product_attention(q, k, v, mask=attend)
        return self.o_proj(y.reshape(*x.shape[:2], -1)), cache


class FeedForward(nnx.Module):
    def __init__(self, config: LlamaConfig, **options: Any):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return _linear(config, inputs, outputs, config.mlp_bias, **options)

        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, **options: Any):
        self.input_layernorm = _norm(config, **options)
        self.self_attn = Attention(config, **options)
        self.post_attention_layernorm = _norm(config, **options)
        self.mlp = FeedForward(config, **options)

    def __call__(
        self,
        x: Array,
        attend: Array,
        rotation: tuple[Array, Array],
        slots: Array | None,
        cache: KeyValue | None,
    ) -> tuple[Array, KeyValue | None]:
        y, cache = self.self_attn(self.input_layernorm(x), attend, rotation, slots, cache)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache  # (B, T, C)


class Llama(Decoder):
    """The language model; for the arguments see `Transformer`."""

    Config = LlamaConfig
    model_type = "llama"
    architecture = "LlamaForCausalLM"
    base_prefix = "model."
    ignored_tensors = (r".*\.rotary_emb\.inv_freq",)  # old files keep what follows from the config

    def __init__(self, config: LlamaConfig, *, checkpoint: bool = False, **options: Any):
        self.config = config
        self.checkpoint = checkpoint
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            **options,
        )
        blocks = [Block(config, **options) for _ in range(config.num_hidden_layers)]
        self.layers = nnx.List(blocks)
        self.norm = _norm(config, **options)
        if not config.tie_word_embeddings:
            options["preferred_element_type"] = jnp.float32
            sizes = config.hidden_size, config.vocab_size
            self.lm_head = _linear(config, *sizes, bias=False, **options)

    @staticmethod
    def tensor_axes(path: tuple, ndim: int) -> tuple[int, ...]:
        """How the axes of a checkpoint's tensor become those of the parameter at a path."""
        return (1, 0) if path[-1] == "kernel" else tuple(range(ndim))

    @property
    def embedding(self) -> nnx.Embed:
        return self.embed_tokens

    def run_layers(
        self, ids: Array, positions: Array, attend: Array, slots: Array | None, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        angles = positions[..., None, None] * _frequencies(self.config)  # (B, T, 1, D / 2)
        rotation = jnp.cos(angles), jnp.sin(angles)

        def call(block: Block, x: Array, cache: KeyValue | None) -> tuple[Array, KeyValue | None]:
            return block(x, attend, rotation, slots, cache)

        x = self.embed_tokens(ids)  # (B, T, C)
        x, cache = layers.run(self.layers, call, x, cache, checkpoint=self.checkpoint)
        return self.norm(x), cache


def _frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians that each pair of a head turns from one position to the next; (D / 2,), float32."""
    size, scaling = config.head_size, config.rope_scaling
    frequencies = config.rope_theta ** -(np.arange(0, size, 2) / size)
    if scaling is not None:
        # What turns often within the original context stays, what does not even turn once (or
        # as the factors say) slows down in full.
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies *= kept + (1 - kept) / scaling.factor
    return frequencies.astype(np.float32)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the pairs that dimensions i and i + D / 2 of each head are; x is (B, T, heads, D)."""
    first, second = jnp.split(x, 2, axis=-1)  # the products are float32, as `cos` and `sin` are
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _linear(
    config: LlamaConfig, inputs: int, outputs: int, bias: bool, **options: Any
) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=init, **options)


def _norm(config: LlamaConfig, **options: Any) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **options)
