"""A stack of alike layers: as a list of modules, or as one module whose arrays are stacked.

Stacked, the layers are a single `jax.lax.scan`: compiled once for all of them, and found by
`florax.value_and_update(..., layerwise=True)`. As a list they have the names of the published
checkpoints.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

NAMES = ("block", "h", "layers")  # of the models' stacks, as the checkpoints have them

Layers = nnx.List | nnx.Module
Call = Callable[[nnx.Module, Array, Any], tuple[Array, Any]]


def is_stacked(layers: Layers) -> bool:
    return not isinstance(layers, nnx.List)


def is_in_stack(path: jax.tree_util.KeyPath) -> bool:
    """Whether a parameter of a stacked model, at this path, is one of its layers'."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return not set(NAMES).isdisjoint(names)


def stack(layers: Layers) -> nnx.Module:
    """One module like each of `layers`, its arrays with a leading axis of layers."""
    if is_stacked(layers):
        return layers
    graphdefs, params = zip(*map(nnx.split, layers), strict=True)
    return nnx.merge(graphdefs[0], jax.tree.map(lambda *x: jnp.stack(x), *params))


def unstack(layers: Layers) -> nnx.List:
    """The list that `stack` was given."""
    if not is_stacked(layers):
        return layers
    graphdef, params = nnx.split(layers)
    count = len(jax.tree.leaves(params)[0])
    unstacked = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(count)]
    return nnx.List([nnx.merge(graphdef, own) for own in unstacked])


def run(
    layers: Layers, call: Call, x: Array, inputs: Any = None, *, checkpoint: bool = False
) -> tuple[Array, Any]:
    """Send `x` through all layers: `x, output = call(layer, x, input)` for each in turn.

    Args:
      layers: a list, or what `stack` made of it.
      call: applies one layer. It must not write to the layer.
      x: what enters the first one.
      inputs: of a list a list, an entry a layer; of stacked layers a tree of arrays with a leading
        axis of layers; None where layers get nothing of their own.
      checkpoint: keep only what enters each layer for the backward pass, which computes the rest
        again.

    Returns:
      What leaves the last layer, and the outputs, in the form of `inputs`.
    """
    if is_stacked(layers):
        graphdef, stacked = nnx.split(layers)

        def step(x: Array, own: tuple[nnx.State, Any]) -> tuple[Array, Any]:
            params, given = own
            return call(nnx.merge(graphdef, params), x, given)

        if checkpoint:  # a scan keeps apart by itself what `prevent_cse` would
            step = jax.checkpoint(step, prevent_cse=False)
        return jax.lax.scan(step, x, (stacked, inputs))

    outputs = []
    for layer, given in zip(
        layers, [None] * len(layers) if inputs is None else inputs, strict=True
    ):
        graphdef, params = nnx.split(layer)
        step = functools.partial(_one, call, graphdef)
        x, output = (jax.checkpoint(step) if checkpoint else step)(params, x, given)
        outputs.append(output)
    return x, None if inputs is None else outputs


def _one(call: Call, graphdef: nnx.GraphDef, params: nnx.State, x: Array, given: Any) -> Any:
    return call(nnx.merge(graphdef, params), x, given)


def layer_norm(width: int, epsilon: float, **options: Any) -> nnx.LayerNorm:
    # The fast variance, E[x²] - E[x]², cancels where the mean is large.
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, **options)
