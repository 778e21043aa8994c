"""LoRA (Hu et al., ICLR 2022, arXiv:2106.09685), as FLORA's paper compares itself with it.

Attention and feed-forward layers x W become x W + x A B, with W frozen and B zero at first. There
is no scale alpha / rank before A B: the learning rate has its place. All else is trained in full:
embeddings, norms, biases, the head. In LoRA(B), of the paper's Figure 1, A is frozen too.

    lora.add(model, rank=8, rngs=nnx.Rngs(0))
    graphdef, params, frozen = nnx.split(model, lora.trained(), ...)
    ...
    model = lora.merge(nnx.merge(graphdef, params, frozen))
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

import florax


def add(
    model: nnx.Module,
    rank: int,
    *,
    rngs: nnx.Rngs,
    where: Callable[[Any, Any], bool] = florax.attention_and_feed_forward,
) -> None:
    """Give layers an adapter each, in place: `nnx.Linear` becomes `nnx.LoRA` around it.

    Args:
      model: its layers as a list or stacked. Adapters of stacked layers draw other values of A.
      rank: columns of A and rows of B; below both widths of every layer.
      rngs: of A, which is drawn as Kaiming et al. do for a layer of its own.
      where: which layers, by the path of their kernel and the kernel.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got rank={rank}")
    layers = [
        (path, layer)
        for path, layer in nnx.iter_graph(model)
        if isinstance(layer, nnx.Linear) and where(_key_path(*path, "kernel"), layer.kernel)
    ]
    if not layers:
        raise ValueError("where selects none of the model's nnx.Linear layers")
    for path, layer in layers:
        smaller = min(layer.kernel.shape[-2:])
        if rank >= smaller:
            name = jax.tree_util.keystr(_key_path(*path), simple=True, separator=".")
            raise ValueError(f"rank={rank} saves nothing in {name}: lower it below {smaller}")
    for path, layer in layers:
        _assign(model, path, _adapted(layer, rank, rngs))


def trained(freeze_a: bool = False) -> Callable[[Any, Any], bool]:
    """A filter of nnx: the parameters to train, all but adapted kernels (and A, for LoRA(B))."""

    def is_trained(path: tuple, leaf: Any) -> bool:
        frozen = path[-2:] == ("base_module", "kernel") or (freeze_a and path[-1] == "lora_a")
        return isinstance(leaf, nnx.Param) and not frozen

    return is_trained


def merge(model: nnx.Module) -> Any:
    """The model without adapters: A B is added to the kernels. `model` stays as it is."""
    merged = nnx.merge(*nnx.split(model))  # other modules, but the same parameters
    for path, layer in list(nnx.iter_graph(merged)):
        if isinstance(layer, nnx.LoRA):
            linear = layer.base_module
            a, b, kernel = (
                x[...].astype(jnp.float32) for x in (layer.lora_a, layer.lora_b, linear.kernel)
            )
            # In float32, whatever a GPU's products are by default: it is rounded once.
            kernel += jnp.matmul(a, b, precision="highest")
            linear.kernel = nnx.Param(kernel.astype(linear.kernel.dtype))
            _assign(merged, path, linear)
    return merged


def _adapted(linear: nnx.Linear, rank: int, rngs: nnx.Rngs) -> nnx.LoRA:
    *stack, inputs, outputs = linear.kernel.shape
    kaiming = nnx.initializers.he_uniform(batch_axis=range(len(stack)))

    def draw_a(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        return kaiming(key, (*stack, *shape), dtype)

    def zero_b(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        return jnp.zeros((*stack, *shape), dtype)

    # The layer's own dtypes: without them a bfloat16 layer with float32 parameters turns float32.
    return nnx.LoRA(
        inputs,
        rank,
        outputs,
        base_module=linear,
        dtype=linear.dtype,
        param_dtype=linear.kernel.dtype,
        a_initializer=draw_a,
        b_initializer=zero_b,
        rngs=rngs,
    )


def _assign(model: nnx.Module, path: tuple, layer: nnx.Module) -> None:
    *parents, last = path
    owner = model
    for key in parents:
        owner = owner[key] if isinstance(key, int) else getattr(owner, key)
    if isinstance(last, int):
        owner[last] = layer
    else:
        setattr(owner, last, layer)


def _key_path(*names: Any) -> tuple[jax.tree_util.DictKey, ...]:
    return tuple(map(jax.tree_util.DictKey, names))
