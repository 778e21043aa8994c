"""GPT-2, LLaMA, T5 and ViT in plain JAX, at any shape: what the benchmarks train.

A model is a pure function of a tree of parameters whose layers are stacked, `(layers, ...)`, and
scanned, with every layer checkpointed, if not said otherwise, and the cross-entropy taken in chunks
of the sequence. The shapes of the matrices are those of the published models. Positions and biases
are left out: they are a thousandth of the parameters, and no measure of memory or time depends on
them.

In shapes, B is the batch, T the tokens of a row, S those of a T5 source, L the layers, C the width,
H the heads, D the size of a head, V the vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array

CHUNK = 128  # what lengths must be a multiple of


class Shape(NamedTuple):
    """What tells one size of a model from another."""

    family: str  # "gpt2", "llama", "t5" or "vit"
    layers: int  # T5 has as many in its encoder as in its decoder
    width: int
    heads: int
    head_size: int
    feed_forward: int
    vocabulary: int  # of a ViT its classes
    checkpoint: bool = True  # whether layers keep only what enters them for the backward pass
    key_heads: int | None = None  # of keys and values, if they are fewer
    chunk: int = CHUNK  # tokens of a row whose logits exist at once


SHAPES = {
    "gpt2-tiny": Shape("gpt2", 2, 64, 4, 16, 256, 512),
    "gpt2": Shape("gpt2", 12, 768, 12, 64, 3072, 50257),
    "gpt2-xl": Shape("gpt2", 48, 1600, 25, 64, 6400, 50257),
    "llama-tiny": Shape("llama", 2, 64, 4, 16, 160, 512),
    "llama-60m": Shape("llama", 8, 512, 8, 64, 1376, 32000),
    "llama-350m": Shape("llama", 24, 1024, 16, 64, 2736, 32000),
    "llama-1b": Shape("llama", 24, 2048, 32, 64, 5461, 32000),
    "llama-7b": Shape("llama", 32, 4096, 32, 128, 11008, 32000),
    "llama-70b": Shape("llama", 80, 8192, 64, 128, 28672, 32000, key_heads=8),
    "t5-tiny": Shape("t5", 2, 64, 4, 16, 256, 512),
    "t5-small": Shape("t5", 6, 512, 8, 64, 2048, 32128),
    "t5-3b": Shape("t5", 24, 1024, 32, 128, 16384, 32128),
    "vit-tiny": Shape("vit", 2, 64, 4, 16, 256, 10),
    "vit-base": Shape("vit", 12, 768, 12, 64, 3072, 100),
    "vit-large": Shape("vit", 24, 1024, 16, 64, 4096, 100),
}
ModelName: TypeAlias = Literal[tuple(SHAPES)]
STACKS = ("blocks", "encoder", "decoder")
PATCHES, PIXELS = 196, 768  # of an image of 224², and the numbers of a patch of 16²


def is_stacked(path: tuple, leaf: Any) -> bool:
    """Whether a parameter is a stack of layers."""
    del leaf
    return path[0].key in STACKS


def parameter_shapes(shape: Shape, dtype: Any) -> dict[str, Any]:
    """The parameters as `jax.ShapeDtypeStruct`s: nothing is allocated."""
    s, inner = shape, shape.heads * shape.head_size
    keys = (shape.key_heads or shape.heads) * shape.head_size

    def array(*axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, dtype)

    def attention() -> dict[str, Any]:
        sides = {"query": inner, "key": keys, "value": keys}
        into = {name: array(s.layers, s.width, side) for name, side in sides.items()}
        return {**into, "out": array(s.layers, inner, s.width)}

    def stack(*attentions: str) -> dict[str, Any]:
        names = ("up", "gate") if s.family == "llama" else ("up",)
        feed_forward = {name: array(s.layers, s.width, s.feed_forward) for name in names}
        feed_forward["down"] = array(s.layers, s.feed_forward, s.width)
        layers = {name: attention() for name in attentions} | {"feed_forward": feed_forward}
        return layers | {f"{name}_norm": array(s.layers, s.width) for name in layers}

    if s.family == "vit":
        ends = {"patches": array(PIXELS, s.width), "head": array(s.width, s.vocabulary)}
        return ends | {"blocks": stack("attention"), "norm": array(s.width)}
    embed = array(s.vocabulary, s.width)
    if s.family == "t5":
        both = {"encoder": stack("attention"), "decoder": stack("attention", "cross_attention")}
        norms = {"encoder_norm": array(s.width), "decoder_norm": array(s.width)}
        return {"embed": embed, **both, **norms}
    params = {"embed": embed, "blocks": stack("attention"), "norm": array(s.width)}
    if s.family == "llama":  # the others use the embedding twice
        params["head"] = array(s.width, s.vocabulary)
    return params


def unstacked(params: dict[str, Any]) -> dict[str, Any]:
    """The shapes of the same model with a list of layers in the place of each stack."""

    def layers(stack: Any) -> list[Any]:
        (height,) = {x.shape[0] for x in jax.tree.leaves(stack)}
        layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stack)
        return [layer] * height

    return {name: layers(x) if name in STACKS else x for name, x in params.items()}


def random_parameters(shapes: dict[str, Any], key: Array) -> dict[str, Any]:
    """Normal weights of deviation 0.02 and norms of one, a layer at a time to stay small."""

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct, key: Array) -> Array:
        if "norm" in path[-1].key:
            return jnp.ones(leaf.shape, leaf.dtype)
        *stack, rows, columns = leaf.shape
        keys = jax.random.split(key, math.prod(stack))
        normal = functools.partial(jax.random.normal, shape=(rows, columns), dtype=leaf.dtype)
        return jax.lax.map(lambda k: 0.02 * normal(k), keys).reshape(leaf.shape)

    flat, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    draw = jax.jit(draw, static_argnums=(0, 1))
    keys = jax.random.split(key, len(flat))
    return treedef.unflatten([draw(*item, k) for item, k in zip(flat, keys, strict=True)])


def batch_shapes(shape: Shape, batch: int, length: int, source: int) -> dict[str, Any]:
    """A batch's tokens: `length` of them to predict in a row and, for T5, `source` to read.

    Of a ViT images, cut into patches, and labels.
    """
    if shape.family == "vit":
        pixels = jax.ShapeDtypeStruct((batch, PATCHES, PIXELS), jnp.float32)
        return {"pixels": pixels, "labels": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    if length > CHUNK and length % CHUNK:
        raise ValueError(f"length must be at most {CHUNK} or a multiple of it, got {length}")
    rows = {"tokens": jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)}
    if shape.family == "t5":
        rows["source"] = jax.ShapeDtypeStruct((batch, source), jnp.int32)
    return rows


def loss(
    shape: Shape,
    params: dict[str, Any],
    batch: dict[str, Array],
    whole: Callable[[Any], Any] = lambda weights: weights,
) -> Array:
    """The mean cross-entropy of the next tokens, or of an image's class, shape (), float32.

    `whole` is given the weights of a layer, and those of the ends, where they are used: to bring
    together what is divided among devices.
    """
    ends = whole({name: x for name, x in params.items() if name not in STACKS})
    params = params | ends
    scan = functools.partial(_scan, whole)
    if shape.family == "vit":
        x = batch["pixels"].astype(params["patches"].dtype) @ params["patches"]  # (B, T, C)
        x = norm(scan(shape, params["blocks"], x, causal=False), params["norm"]).mean(1)
        logits = (x @ params["head"]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()
    inputs, labels = batch["tokens"][:, :-1], batch["tokens"][:, 1:]  # (B, T)
    x = params["embed"][inputs]  # (B, T, C)
    if shape.family == "t5":
        memory = scan(shape, params["encoder"], params["embed"][batch["source"]], causal=False)
        memory = norm(memory, params["encoder_norm"])  # (B, S, C)
        x = norm(scan(shape, params["decoder"], x, memory=memory), params["decoder_norm"])
    else:
        x = norm(scan(shape, params["blocks"], x), params["norm"])
    if "head" in params:
        return cross_entropy(shape, x, params["head"], "btc,cv->btv", labels)
    # Not its transpose, which XLA would copy and keep for the whole step.
    return cross_entropy(shape, x, params["embed"], "btc,vc->btv", labels)


def _scan(
    whole: Callable[[Any], Any],
    shape: Shape,
    stack: dict[str, Any] | list[Any],
    x: Array,
    memory: Array | None = None,
    causal: bool = True,
) -> Array:
    """All layers of a stack, one after the other; x and the result are (B, T, C).

    A list of layers is neither scanned nor checkpointed.
    """

    def layer(x: Array, w: dict[str, Any]) -> tuple[Array, None]:
        w = whole(w)
        y = norm(x, w["attention_norm"])
        x = x + attention(shape, w["attention"], y, y, causal)
        if memory is not None:
            y = norm(x, w["cross_attention_norm"])
            x = x + attention(shape, w["cross_attention"], y, memory, False)
        y = norm(x, w["feed_forward_norm"])
        return x + feed_forward(shape, w["feed_forward"], y), None

    if isinstance(stack, list):
        return functools.reduce(lambda x, w: layer(x, w)[0], stack, x)
    return jax.lax.scan(jax.checkpoint(layer) if shape.checkpoint else layer, x, stack)[0]


def attention(shape: Shape, w: dict[str, Array], x: Array, memory: Array, causal: bool) -> Array:
    """Let x, (B, T, C), read the memory, (B, S, C)."""

    def heads(x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, shape.head_size)  # (B, T or S, H, D)

    query, key, value = heads(x @ w["query"]), heads(memory @ w["key"]), heads(memory @ w["value"])
    y = jax.nn.dot_product_attention(query, key, value, is_causal=causal)  # (B, T, H, D)
    return y.reshape(*x.shape[:2], -1) @ w["out"]


def feed_forward(shape: Shape, w: dict[str, Array], x: Array) -> Array:
    if shape.family == "llama":
        return (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]
    activation = jax.nn.relu if shape.family == "t5" else jax.nn.gelu
    return activation(x @ w["up"]) @ w["down"]


def norm(x: Array, scale: Array) -> Array:
    """Root-mean-square normalisation, (B, T, C)."""
    mean_square = jnp.mean(x.astype(jnp.float32) ** 2, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + 1e-6).astype(x.dtype) * scale


def cross_entropy(shape: Shape, x: Array, head: Array, product: str, labels: Array) -> Array:
    """Mean over all tokens; the logits of `shape.chunk` tokens a row exist at once."""

    @jax.checkpoint
    def chunk_loss(chunk: tuple[Array, Array]) -> Array:
        x, labels = chunk  # (B, chunk, C), (B, chunk)
        logits = jnp.einsum(product, x, head).astype(jnp.float32)  # (B, chunk, V)
        label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - label_logits)

    def chunks(x: Array) -> Array:  # (B, T, ...) -> (T / chunk, B, chunk, ...)
        count = max(1, x.shape[1] // shape.chunk)
        return x.reshape(x.shape[0], count, -1, *x.shape[2:]).swapaxes(0, 1)

    return jnp.sum(jax.lax.map(chunk_loss, (chunks(x), chunks(labels)))) / labels.size
