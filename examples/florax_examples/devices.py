"""Several devices: the rows of a batch are divided along all of a mesh, weights along `model`.

With `data=2` two devices have the weights each and half of every micro-batch; with `model=2` half
of the weights too, which are brought together where they are used. XLA does the rest.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import florax
from florax_examples.models import layers

AXES = ("data", "model")


def parse(text: str) -> dict[str, int]:
    """`data=2,model=1` as a dict; an axis that is not named has one device.

    Raises:
      ValueError: the text is no such thing.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh must be like data=2,model=1, got {text!r}")
        sizes[name] = int(size)
    return sizes


class Devices:
    """Where the arrays of a run are.

    Args:
      mesh: as `parse` takes it; empty for one device.

    Raises:
      ValueError: there are fewer devices.
    """

    def __init__(self, mesh: str):
        self.mesh: Mesh | None = None
        if mesh:
            sizes = parse(mesh)
            count = math.prod(sizes.values())
            if count > jax.device_count():
                raise ValueError(f"mesh={mesh} has {count} devices, here are {jax.device_count()}")
            kinds = (AxisType.Auto,) * len(AXES)
            devices = jax.devices()[:count]
            self.mesh = jax.make_mesh(tuple(sizes.values()), AXES, kinds, devices=devices)

    def place(self, params: Any) -> Any:
        """Parameters, each divided along its longest axis that `model` divides."""
        if self.mesh is None:
            return params
        shardings = jax.tree_util.tree_map_with_path(self._sharding, params)
        return jax.device_put(params, shardings)

    def _sharding(self, path: jax.tree_util.KeyPath, leaf: jax.Array) -> NamedSharding:
        assert self.mesh is not None
        first = int(layers.is_in_stack(path))  # the layers themselves stay together
        parts = self.mesh.shape["model"]
        axes = [axis for axis in range(first, leaf.ndim) if leaf.shape[axis] % parts == 0]
        spec: list[str | None] = [None] * leaf.ndim
        if axes:
            spec[max(axes, key=lambda axis: leaf.shape[axis])] = "model"
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def place_batch(self, batch: Any, rows: int) -> Any:
        """A batch whose axis `rows` is that of its examples."""
        if self.mesh is None:
            return batch
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(*[None] * rows, AXES)))

    def init(self, tx: Any, params: Any) -> Callable[[Any], Any]:
        """`tx.init`, compiled: states are divided as their parameters are."""
        if self.mesh is None:
            return jax.jit(tx.init)
        return jax.jit(tx.init, out_shardings=florax.state_shardings(tx, params))

    def jit(self, step: Callable[..., Any], params: Any, state: Any) -> Any:
        """A step `(params, state, ...) -> (loss, params, state)`, which gives up the first two."""
        if self.mesh is None:
            return jax.jit(step, donate_argnums=(0, 1))
        kept = jax.tree.map(lambda x: x.sharding, (params, state))
        return jax.jit(step, donate_argnums=(0, 1), out_shardings=(None, *kept))
