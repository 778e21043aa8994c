"""A small GPT over bytes, in plain JAX, whose layers are stacked and scanned.

Settings have `width`, `layers` and `length`; heads are 64 wide.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

BYTES = 256


def init(s: Any, key: Array) -> dict[str, Array]:
    keys = iter(jax.random.split(key, 8))
    layers, width = s.layers, s.width

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return 0.02 * scale * jax.random.normal(next(keys), shape)

    into_sum = 1 / math.sqrt(2 * layers)
    return {
        "embed": normal(BYTES, width),
        "positions": normal(s.length, width),
        "norm": jnp.ones(width),
        "layers": {
            "query": normal(layers, width, width),
            "key": normal(layers, width, width),
            "value": normal(layers, width, width),
            "output": normal(layers, width, width, scale=into_sum),
            "up": normal(layers, width, 4 * width),
            "down": normal(layers, 4 * width, width, scale=into_sum),
            "attention_norm": jnp.ones((layers, width)),
            "feed_forward_norm": jnp.ones((layers, width)),
        },
    }


def is_stacked(path: Any, leaf: Any) -> bool:
    return path[0].key == "layers"


def losses(s: Any, params: dict[str, Any], rows: Array) -> Array:
    """The cross-entropy of the next bytes of rows, `(B, length + 1)`, in nats, (B, length)."""
    x = params["embed"][rows[:, :-1]] + params["positions"]
    x, _ = jax.lax.scan(layer, x, params["layers"])
    logits = jnp.einsum("btc,vc->btv", norm(x, params["norm"]), params["embed"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])


def loss(s: Any, params: dict[str, Any], rows: Array) -> Array:
    """The mean of these."""
    return losses(s, params, rows).mean()


def layer(x: Array, w: dict[str, Array]) -> tuple[Array, None]:
    y = norm(x, w["attention_norm"])
    heads = (*y.shape[:2], -1, 64)
    query, key, value = ((y @ w[name]).reshape(heads) for name in ("query", "key", "value"))
    attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + attended.reshape(x.shape) @ w["output"]
    y = norm(x, w["feed_forward_norm"])
    return x + jax.nn.gelu(y @ w["up"]) @ w["down"], None


def norm(x: Array, scale: Array) -> Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale
