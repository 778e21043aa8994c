"""The ways to train that the benchmarks compare, each a compiled call that is repeated.

    none        Adafactor after every micro-batch: no accumulation, the floor of an ordinary step
    full        gradients summed in float32 at full size, in a scan inside one jit
    multisteps  the same by `optax.MultiSteps`: a jit call a micro-batch
    dense       FLORA as in the paper: full-size gradients, each then added to sketches
    sketched    `florax.value_and_update`: gradients born as sketches
    both        the same by `side="both"`, in the bytes of `sketched`
    whole       the same at full size, without sketches
    layerwise   `florax.value_and_update(..., layerwise=True)`, with FLORA momentum of the
                compressed matrices, no accumulation
    layerwise-accumulate   the same, with accumulation and without momentum
    galore      `optax.contrib.galore`, no accumulation; within `florax.per_layer`, as it knows no
                stacks of layers

With `-int8` or `-int4` behind it, accumulators (or the momentum of `layerwise`) are in 8 or 4 bits.
All but `galore`, which cannot take it and has Adam, have Adafactor as their base optimizer.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

import florax
from florax_benchmarks import baselines, models
from florax_benchmarks.steps import Loss, dense, first, full_size, one_by_one

METHODS = (
    "none",
    "full",
    "multisteps",
    "dense",
    "sketched",
    "sketched-int8",
    "sketched-int4",
    "both",
    "both-int8",
    "both-int4",
    "whole-int8",
    "whole-int4",
    "layerwise",
    "layerwise-int8",
    "layerwise-accumulate",
    "galore",
)
ACCUMULATIONS = ("dense", "sketched", "both", "whole")
MethodName: TypeAlias = Literal[METHODS]
LEARNING_RATE = 1e-4


class Method(NamedTuple):
    """A way to train.

    Attributes:
      init: parameters -> state; shapes suffice under `jax.eval_shape`.
      step: (params, state, micro-batches) -> (loss, params, state); not yet jitted.
      micro_batches: how many a call of `step` takes, along a leading axis.
      calls: calls of `step` for one update.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    micro_batches: int
    calls: int


def make(name: str, loss_fn: Loss, accumulate: int, rank: int, side: str) -> Method:
    """The method of this name, for a model of models.py.

    Args:
      name: one of `METHODS`.
      loss_fn: of parameters and a micro-batch.
      accumulate: micro-batches an update.
      rank: of attention and feed-forward matrices; the others stay dense, as in the paper.
      side: of a matrix, to be projected: "larger" or "smaller".
    """
    adafactor = optax.adafactor(LEARNING_RATE)
    own, (name, dtype) = name, split(name)

    def ranks(path: tuple, leaf: Any) -> int | None:
        return rank if florax.attention_and_feed_forward(path, leaf) else None

    def matrices(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda *leaf: ranks(*leaf) is not None, tree)

    if name == "none":
        return Method(adafactor.init, one_by_one(loss_fn, adafactor), 1, 1)
    if name == "full":
        return Method(adafactor.init, full_size(loss_fn, adafactor), accumulate, 1)
    if name == "multisteps":
        tx = optax.MultiSteps(adafactor, accumulate).gradient_transformation()
        return Method(tx.init, one_by_one(loss_fn, tx), 1, accumulate)
    if name in ACCUMULATIONS:
        tx = accumulation(own, accumulate, rank, side)
        step = dense(loss_fn, tx) if name == "dense" else florax.value_and_update(loss_fn, tx)
        return Method(tx.init, step, accumulate, 1)
    if name == "layerwise":
        momentum = florax.flora_momentum(
            rank, projection="gaussian", side=side, accumulator_dtype=dtype
        )
        momentum = optax.masked(momentum, matrices)
        tx = florax.per_layer(optax.chain(adafactor, momentum), models.is_stacked)
        step = florax.value_and_update(loss_fn, tx, layerwise=True)
        return Method(tx.init, lambda p, s, b: step(p, s, first(b)), 1, 1)
    if name == "layerwise-accumulate":
        layers = florax.per_layer(adafactor, models.is_stacked)
        tx = florax.flora_accumulate(layers, accumulate, ranks, side=side)
        return Method(tx.init, florax.value_and_update(loss_fn, tx, layerwise=True), accumulate, 1)
    if name == "galore":
        base = baselines.galore(LEARNING_RATE, rank, florax.attention_and_feed_forward)
        tx = florax.per_layer(base, models.is_stacked)
        return Method(tx.init, one_by_one(loss_fn, tx), 1, 1)
    raise ValueError(f"name must be one of {', '.join(METHODS)}; got {name!r}")


def accumulation(
    name: str, accumulate: int, rank: int, side: str
) -> optax.GradientTransformationExtraArgs:
    """The `flora_accumulate` of one of `ACCUMULATIONS`, in whatever bits."""
    name, dtype = split(name)
    if name not in ACCUMULATIONS:
        raise ValueError(f"name must be one of {', '.join(ACCUMULATIONS)}; got {name!r}")

    def ranks(path: tuple, leaf: Any) -> int | None:
        if name == "whole" or not florax.attention_and_feed_forward(path, leaf):
            return None
        if name == "both" and side == "larger":  # in bytes, `rank` is one of the smaller side
            return rank * min(leaf.shape[-2:]) // max(leaf.shape[-2:])
        return rank

    kind = dict(side="both", projection="cosine") if name == "both" else dict(side=side)
    layers = florax.per_layer(optax.adafactor(LEARNING_RATE), models.is_stacked)
    return florax.flora_accumulate(layers, accumulate, ranks, accumulator_dtype=dtype, **kind)


def split(name: str) -> tuple[str, Any]:
    """A method without its bits, and the dtype of these; None for what is usual."""
    name, _, bits = name.partition("-int")
    return name, jnp.dtype(f"int{bits}") if bits else None


def stacked_shapes(batch: Any, count: int) -> Any:
    """The shapes of `count` micro-batches, from those of one."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), batch)
