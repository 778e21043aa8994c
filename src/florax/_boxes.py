"""Boxes around parameters that name the axes of what is in them, by what is common to their kinds.

`flax.linen.Partitioned` and `flax.nnx.Variable` carry names of an array's axes, from which
shardings are made. What a state keeps has other axes than its parameter, and its box names those.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

# Under these a box of flax.nnx may keep names.
_NNX = ("out_sharding", "sharding_names", "sharding", "optimizer_sharding")


def fill(
    tree: Any,
    arrays: Sequence[Sequence[Any]],
    axes: Sequence[Sequence[Sequence[int | None]]],
) -> Any:
    """A tree like `tree` of arrays, whose `axes` are those of its leaves, None for a new one.

    One for a leaf, or several, which become a tuple. Each may be a node of some with the same axes.
    """
    boxes, treedef = jax.tree.flatten(tree, is_leaf=_is_box)
    new = []
    for box, own, own_axes in zip(boxes, arrays, axes, strict=True):
        if _is_box(box):
            own = [_filled(box, *pair) for pair in zip(own, own_axes, strict=True)]
        new.append(own[0] if len(own) == 1 else tuple(own))
    return jax.tree.unflatten(treedef, new)


def _is_box(node: Any) -> bool:
    linen = hasattr(node, "names") and hasattr(node, "replace_boxed")
    nnx = hasattr(node, "get_metadata") and hasattr(node, "set_metadata")
    return (linen or nnx) and bool(jax.tree.leaves(node))  # in parts of a tree some are empty


def _filled(box: Any, array: Any, axes: Sequence[int | None]) -> Any:
    new = jax.tree.unflatten(jax.tree.structure(box), [array])
    if hasattr(new, "names"):
        return new.replace(names=_renamed(new.names, axes))
    metadata = new.get_metadata()
    names = {name: metadata[name] for name in _NNX if _is_names(metadata.get(name))}
    if names:
        new.set_metadata(**{name: _renamed(old, axes) for name, old in names.items()})
    return new


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple | list | PartitionSpec)


def _renamed(names: Any, axes: Sequence[int | None]) -> Any:
    named = dict(enumerate(names))
    new = [None if axis is None else named.get(axis) for axis in axes]
    return PartitionSpec(*new) if isinstance(names, PartitionSpec) else tuple(new)  # type: ignore[no-untyped-call]
