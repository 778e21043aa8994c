"""T5 in flax.nnx, v1.0, v1.1 and FLAN: an encoder-decoder Transformer with relative positions.

Settings and blocks carry the names of the Hugging Face checkpoints (`encoder.block`, `d_kv`); for
the rest see `T5.tensor_name`. In shapes, B is the batch, T the tokens of this call, S the tokens
that they attend to, C the width (`d_model`), H the heads of D = `d_kv` each (H * D need not be C),
V the vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from florax_examples.models import cache as caches
from florax_examples.models import layers
from florax_examples.models.cache import Cache, KeyValue
from florax_examples.models.transformer import Transformer, known_settings

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The defaults are those of the smallest published model (60 million parameters)."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64  # width of a head
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None  # None means num_layers
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"  # an activation, or "gated-" and one
    tie_word_embeddings: bool = True  # no head of its own
    scale_decoder_outputs: bool = True  # what the head sees is divided by sqrt(d_model)
    decoder_start_token_id: int = 0
    pad_token_id: int = 0
    eos_token_id: int | tuple[int, ...] | None = 1

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"feed_forward_proj must be one of {', '.join(ACTIVATIONS)}, or gated- and one of "
                f"them, got {self.feed_forward_proj!r}"
            )
        buckets = self.relative_attention_num_buckets
        distance = self.relative_attention_max_distance
        if buckets < 4 or distance <= buckets // 2:
            raise ValueError(
                "relative_attention_num_buckets must be at least 4 and less than twice "
                f"relative_attention_max_distance, got {buckets} and {distance}"
            )

    @property
    def is_gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        # The name of v1.1's feed-forward layer, whose activation is gelu_new.
        if self.feed_forward_proj == "gated-gelu":
            return "gelu_new"
        return self.feed_forward_proj.removeprefix("gated-")

    @property
    def decoder_layers(self) -> int:
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @classmethod
    def from_huggingface(cls, config: dict[str, Any]) -> "T5Config":
        """Read a config.json as transformers 4 or 5 wrote it; dropout is left out."""
        settings = known_settings(cls, config)
        # transformers 4 scaled what it tied; 5 always says tied, and has a setting for the scale.
        settings.setdefault("scale_decoder_outputs", config.get("tie_word_embeddings", True))
        if settings.get("pad_token_id", 0) is None:
            raise ValueError("pad_token_id is null, but T5 needs one")
        if settings.get("decoder_start_token_id") is None:
            settings["decoder_start_token_id"] = settings.get("pad_token_id", 0)
        result = cls(**settings)
        for name, value in result._derived().items():
            if config.get(name, value) != value:
                raise ValueError(
                    f"{name} must be {value!r} for feed_forward_proj="
                    f"{result.feed_forward_proj!r}, got {config[name]!r}"
                )
        return result

    def to_huggingface(self) -> dict[str, Any]:
        """The settings of a config.json that transformers 4 and 5 read alike."""
        config = dataclasses.asdict(self) | self._derived()
        return config | {"num_decoder_layers": self.decoder_layers, "is_encoder_decoder": True}

    def _derived(self) -> dict[str, Any]:
        """What follows from `feed_forward_proj`; older files leave it out."""
        return {"dense_act_fn": self.activation, "is_gated_act": self.is_gated}


def _v1_1(**sizes: int) -> T5Config:
    return T5Config(
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        scale_decoder_outputs=False,
        **sizes,
    )


_V1_1 = {
    "small": _v1_1(d_model=512, d_ff=1024, num_layers=8, num_heads=6),
    "base": _v1_1(d_model=768, d_ff=2048, num_layers=12, num_heads=12),
    "large": _v1_1(d_model=1024, d_ff=2816, num_layers=24, num_heads=16),
    "xl": _v1_1(d_model=2048, d_ff=5120, num_layers=24, num_heads=32),
}
PRESETS = {
    "t5-small": T5Config(),
    "t5-base": T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "t5-large": T5Config(d_model=1024, d_ff=4096, num_layers=24, num_heads=16),
    "t5-3b": T5Config(d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32),
    **{f"google/t5-v1_1-{size}": config for size, config in _V1_1.items()},
    **{f"google/flan-t5-{size}": config for size, config in _V1_1.items()},
}


def shift_right(labels: Array, start: int, pad: int) -> Array:
    """What the decoder reads to write `labels`, (B, T): `start`, then all but the last of them.

    Labels that do not count, -100, become `pad`.
    """
    shifted = jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=start)
    return jnp.where(shifted == -100, pad, shifted)


def relative_position_bucket(
    distance: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
    """Which entry of the bias table belongs to a `distance`, the key's position less the query's.

    Short distances have a bucket each; longer ones share, in logarithmic steps, and from
    `max_distance` on all share the last. If `bidirectional`, half of the buckets are for keys that
    come after the query, otherwise these count as distance 0 (no query sees them).
    """
    if bidirectional:
        num_buckets //= 2
        start = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        start = 0
        distance = jnp.maximum(-distance, 0)

    # Looked up: on the edge of a bucket the logarithm's rounding shows, and it differs by device.
    exact = num_buckets // 2
    table = np.arange(max_distance + 1, dtype=np.int32)
    far = table[exact:].astype(np.float32)
    steps = np.log(far / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    table[exact:] = np.minimum(exact + steps.astype(np.int32), num_buckets - 1)
    return start + jnp.asarray(table)[jnp.minimum(distance, max_distance)]


class T5Cache(NamedTuple):
    """What the decoder remembers, per layer."""

    own: Cache  # of the tokens so far
    encoded: Cache  # of the encoder's output: computed once, and the same at every step


class Attention(nnx.Module):
    def __init__(self, config: T5Config, **options: Any):
        self.heads = (config.num_heads, config.d_kv)
        width, inner = config.d_model, math.prod(self.heads)
        # Scores are not divided by sqrt(D): the initial queries are.
        self.q = _linear(config, width, inner, (width * config.d_kv) ** -0.5, **options)
        self.k = _linear(config, width, inner, width**-0.5, **options)
        self.v = _linear(config, width, inner, width**-0.5, **options)
        self.o = _linear(config, inner, width, inner**-0.5, **options)

    def key_value(self, x: Array) -> KeyValue:
        """What queries see of `x`, (B, S, C)."""
        heads = (*x.shape[:2], *self.heads)
        return KeyValue(self.k(x).reshape(heads), self.v(x).reshape(heads))

    def __call__(self, x: Array, seen: KeyValue, attend: Array | None, bias: Array | None) -> Array:
        # Rows of `x` that share a row of `seen`, as beams do, are just more queries of that row.
        q = self.q(x).reshape(len(seen.key), -1, *self.heads)  # (B, T, H, D)
        key, value = (array.astype(q.dtype) for array in seen)
        y = jax.nn.dot_product_attention(q, key, value, bias=bias, mask=attend, scale=1.0)
        return self.o(y.reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    def __init__(self, config: T5Config, **options: Any):
        self.activation = config.activation
        self.is_gated = config.is_gated
        for name in ("wi_0", "wi_1") if self.is_gated else ("wi",):
            linear = _linear(config, config.d_model, config.d_ff, config.d_model**-0.5, **options)
            setattr(self, name, linear)
        self.wo = _linear(config, config.d_ff, config.d_model, config.d_ff**-0.5, **options)

    def __call__(self, x: Array) -> Array:
        activation = ACTIVATIONS[self.activation]
        if self.is_gated:
            return self.wo(activation(self.wi_0(x)) * self.wi_1(x))
        return self.wo(activation(self.wi(x)))


class EncoderBlock(nnx.Module):
    def __init__(self, config: T5Config, **options: Any):
        self.self_attention_norm = _norm(config, **options)
        self.self_attention = Attention(config, **options)
        self.feed_forward_norm = _norm(config, **options)
        self.feed_forward = FeedForward(config, **options)

    def __call__(self, x: Array, attend: Array | None, bias: Array) -> Array:
        y = self.self_attention_norm(x)
        x = x + self.self_attention(y, self.self_attention.key_value(y), attend, bias)
        return x + self.feed_forward(self.feed_forward_norm(x))  # (B, T, C)


class DecoderBlock(nnx.Module):
    def __init__(self, config: T5Config, **options: Any):
        self.self_attention_norm = _norm(config, **options)
        self.self_attention = Attention(config, **options)
        self.cross_attention_norm = _norm(config, **options)
        self.cross_attention = Attention(config, **options)
        self.feed_forward_norm = _norm(config, **options)
        self.feed_forward = FeedForward(config, **options)

    def __call__(
        self,
        x: Array,
        attend: Array,
        bias: Array,
        encoded: KeyValue,
        encoder_attend: Array | None,
        past: KeyValue | None,
        slots: Array | None,
    ) -> tuple[Array, KeyValue | None]:
        y = self.self_attention_norm(x)
        own = self.self_attention.key_value(y)
        if past is not None:
            own = past = caches.store(past, *own, slots)
        x = x + self.self_attention(y, own, attend, bias)
        x = x + self.cross_attention(self.cross_attention_norm(x), encoded, encoder_attend, None)
        return x + self.feed_forward(self.feed_forward_norm(x)), past  # (B, T, C)


class Stack(nnx.Module):
    """The blocks of the encoder or of the decoder, and what they share."""

    def __init__(
        self,
        config: T5Config,
        block: type[EncoderBlock] | type[DecoderBlock],
        count: int,
        **options: Any,
    ):
        self.config = config
        self.sees_later_tokens = block is EncoderBlock
        self.relative_attention_bias = nnx.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            embedding_init=_normal(config, config.d_model**-0.5),
            **(options | {"dtype": jnp.float32}),  # as the scores that it is added to
        )
        self.block = nnx.List([block(config, **options) for _ in range(count)])
        self.final_layer_norm = _norm(config, **options)

    def bias(self, queries: Array, keys: Array) -> Array:
        """What is added to the scores, (B, H, T, S), for positions (B, T) and (B, S)."""
        distance = keys[:, None, :] - queries[:, :, None]
        bucket = relative_position_bucket(
            distance,
            bidirectional=self.sees_later_tokens,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        return self.relative_attention_bias(bucket).transpose(0, 3, 1, 2)


class T5(Transformer):
    """T5 with a head; for the arguments see `Transformer`."""

    Config = T5Config
    model_type = "t5"
    architecture = "T5ForConditionalGeneration"
    base_prefix = ""
    ignored_tensors = (  # the first files have this table, but no model ever used it
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    )
    other_names: ClassVar = {  # copies of it, or all that there is
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: T5Config, *, checkpoint: bool = False, **options: Any):
        self.config = config
        self.checkpoint = checkpoint
        width, vocabulary = config.d_model, config.vocab_size
        embedding_init = _normal(config, 1.0)
        self.shared = nnx.Embed(vocabulary, width, embedding_init=embedding_init, **options)
        self.encoder = Stack(config, EncoderBlock, config.num_layers, **options)
        self.decoder = Stack(config, DecoderBlock, config.decoder_layers, **options)
        if not config.tie_word_embeddings:
            # So that the first logits are of size 1, as with a tied head.
            options["preferred_element_type"] = jnp.float32  # see `logits`
            self.lm_head = _linear(config, width, vocabulary, width**-0.5, **options)

    @staticmethod
    def tensor_name(path: tuple) -> str:
        """What checkpoints call the parameter at `path`."""
        *modules, _ = path
        match modules:
            case [part, "relative_attention_bias"]:  # all blocks share it, the first has it
                name = f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias"
            case [part, "block", number, layer, *rest]:
                names = {
                    "self_attention": "SelfAttention",
                    "cross_attention": "EncDecAttention",
                    "feed_forward": "DenseReluDense",
                }
                if part == "encoder":
                    del names["cross_attention"]
                index = list(names).index(layer.removesuffix("_norm"))
                module = names.get(layer, "layer_norm")
                name = ".".join([f"{part}.block.{number}.layer.{index}.{module}", *rest])
            case _:
                name = ".".join(modules)
        return f"{name}.weight"

    @staticmethod
    def tensor_axes(path: tuple, ndim: int) -> tuple[int, ...]:
        """How to transpose a checkpoint's tensor into the parameter at `path`."""
        return (1, 0) if path[-1] == "kernel" else tuple(range(ndim))

    def __call__(
        self,
        ids: Array,
        decoder_ids: Array,
        *,
        mask: Array | None = None,
        decoder_mask: Array | None = None,
    ) -> Array:
        """Logits for the token after each of `decoder_ids`, shape (B, T, V)."""
        logits, _ = self.decode(decoder_ids, self.encode(ids, mask), mask, mask=decoder_mask)
        return logits

    def encode(self, ids: Array, mask: Array | None = None) -> Array:
        """What the decoder sees of `ids`.

        Args:
          ids: tokens, shape (B, S), int32.
          mask: shape (B, S), bool, False for padding; None means that there is none.

        Returns:
          Features, shape (B, S, C). What stands in the rows of padding means nothing.
        """
        _check(ids)
        positions = jnp.arange(ids.shape[1])[None]
        bias = self.encoder.bias(positions, positions)
        attend = _over_heads_and_queries(mask)

        def call(block: EncoderBlock, x: Array, _: None) -> tuple[Array, None]:
            return block(x, attend, bias), None

        x = self.shared(ids)  # (B, S, C)
        x, _ = layers.run(self.encoder.block, call, x, checkpoint=self.checkpoint)
        return self.encoder.final_layer_norm(x)

    def init_cache(
        self, batch: int, length: int, dtype: jnp.dtype = jnp.float32, *, encoded: Array
    ) -> T5Cache:
        """An empty cache for rows of up to `length` tokens, padding not counted.

        Keys and values of `encoded`, shape (batch, S, C), are computed here and not again.
        """
        if len(encoded) != batch:
            raise ValueError(f"encoded has {len(encoded)} rows, but batch={batch}")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")

        def call(block: DecoderBlock, x: Array, _: KeyValue) -> tuple[Array, KeyValue]:
            key, value = block.cross_attention.key_value(x)
            return x, KeyValue(key.astype(dtype), value.astype(dtype))

        c = self.config
        sizes = c.decoder_layers, batch, length, c.num_heads, c.d_kv
        own = caches.empty(*sizes, dtype, stacked=self.is_stacked)
        _, seen = layers.run(self.decoder.block, call, encoded, own)
        return T5Cache(own, seen)

    @property
    def cache_batch_axis(self) -> T5Cache:
        """Of the cache's arrays the axis of rows; None where all beams of a row share one."""
        return T5Cache(own=int(self.is_stacked), encoded=None)

    def decode(
        self, ids: Array, encoded: Array | None, encoder_mask: Array | None, **options: Any
    ) -> tuple[Array, T5Cache | None]:
        """Logits for the token after each of `ids`, (B, T, V); for the rest see `decode_features`.

        `logits(x)` makes them of some features `x`, where all at once would be too many.
        """
        x, cache = self.decode_features(ids, encoded, encoder_mask, **options)
        return self.logits(x), cache

    def logits(self, features: Array) -> Array:
        """Scores of the vocabulary, shape (..., V), float32."""
        # Not rounded to bfloat16 even if computed in it, which would make the best of them equal.
        if self.config.scale_decoder_outputs:
            features = features * self.config.d_model**-0.5
        if not self.config.tie_word_embeddings:
            return self.lm_head(features)
        table = self.shared.embedding[...].astype(features.dtype)
        return jnp.matmul(features, table.T, preferred_element_type=jnp.float32)  # (..., V)

    def decode_features(
        self,
        ids: Array,
        encoded: Array | None,
        encoder_mask: Array | None,
        *,
        positions: Array | None = None,
        mask: Array | None = None,
        cache: T5Cache | None = None,
    ) -> tuple[Array, T5Cache | None]:
        """What the head sees of each of `ids`, and the cache with `ids` added.

        Args:
          ids: tokens, shape (B, T), int32; the first of a row is `decoder_start_token_id`.
          encoded: what `encode` returned. Not looked at with a cache, which holds what is needed.
          encoder_mask: the mask that `encode` was given.
          positions: of `ids`, shape (B, T), int32; None means 0 to T-1 in every row. With a cache
            the caller knows better and passes them.
          mask: shape (B, T), bool, False for padding; None means that there is none.
          cache: None to attend to `ids` alone; or what `init_cache` or an earlier call returned,
            to attend to all tokens so far at positions up to the own one.

        Returns:
          Features, shape (B, T, C), and the new cache (None without one). What stands in the rows
          of padding means nothing.
        """
        _check(ids)
        length = ids.shape[1]
        if positions is None:
            positions = jnp.arange(length)[None]
        if mask is None:
            mask = jnp.ones(ids.shape, bool)
        encoder_attend = _over_heads_and_queries(encoder_mask)

        if cache is None:
            keys, slots, inputs = positions, None, None
            attend = jnp.tril(jnp.ones((length, length), bool)) & _over_heads_and_queries(mask)
        else:
            is_list = isinstance(cache.own, list)
            size = (cache.own[0] if is_list else cache.own).key.shape[-3]
            keys, slots = jnp.arange(size)[None], caches.slots(cache.own, positions, mask)
            attend = caches.attend(cache.own, positions)
            inputs = list(zip(*cache, strict=True)) if is_list else tuple(cache)
        bias = self.decoder.bias(positions, keys)

        def call(block: DecoderBlock, x: Array, given: Any) -> tuple[Array, KeyValue | None]:
            past, seen = given or (None, block.cross_attention.key_value(encoded))
            return block(x, attend, bias, seen, encoder_attend, past, slots)

        x = self.shared(ids)  # (B, T, C)
        x, own = layers.run(self.decoder.block, call, x, inputs, checkpoint=self.checkpoint)
        return self.decoder.final_layer_norm(x), cache and cache._replace(own=own)


def _check(ids: Array) -> None:
    if ids.shape[1] == 0:
        raise ValueError(f"ids must have at least one token a row, got shape {ids.shape}")


def _over_heads_and_queries(mask: Array | None) -> Array | None:
    return None if mask is None else mask[:, None, None, :]  # (B, 1, 1, S)


def _normal(config: T5Config, std: float) -> nnx.initializers.Initializer:
    return nnx.initializers.normal(config.initializer_factor * std)


def _linear(config: T5Config, inputs: int, outputs: int, std: float, **options: Any) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=_normal(config, std), **options)


def _norm(config: T5Config, **options: Any) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.d_model,
        epsilon=config.layer_norm_epsilon,
        scale_init=nnx.initializers.constant(config.initializer_factor),
        **options,
    )
