"""Several devices: the rows of a batch are divided along all of a mesh, weights along `model`.

With `data=2` two devices have the weights each and half of every micro-batch; with `model=2` half
of the weights too, which are brought together where they are used. XLA does the rest.

The devices may be those of several processes. Each runs the whole script and computes its share of
a step; what is printed and written, the first one does, but for the checkpoints of Orbax.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
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


def join() -> None:
    """Become one of the processes of a run, before JAX is used.

    JAX finds the others by itself where it knows the cluster. Elsewhere it takes the first one's
    address from JAX_COORDINATOR_ADDRESS; how many they are and which this is, it wants to be told.

    Raises:
      ValueError: neither says enough.
      RuntimeError: the others do not come.
    """
    names = ("num_processes", "process_id")
    told = {name: os.environ.get(f"JAX_{name.upper()}") for name in names}
    jax.distributed.initialize(**{k: int(v) for k, v in told.items() if v is not None})


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Go on when all processes are here."""
    multihost_utils.sync_global_devices(what)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; waits for all of them."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def whole(tree: Any) -> Any:
    """Arrays of which other processes may have parts, here in full."""
    return tree if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    """Place an array that every process has; of another's devices it only knows."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


class Devices:
    """Where the arrays of a run are.

    Args:
      mesh: as `parse` takes it; empty for one device.

    Raises:
      ValueError: there are fewer devices; or more, and those of several processes.
    """

    def __init__(self, mesh: str):
        self.mesh: Mesh | None = None
        here, processes = jax.device_count(), jax.process_count()
        if processes > 1 and math.prod(parse(mesh).values() if mesh else ()) != here:
            raise ValueError(
                f"mesh={mesh} must have the {here} devices that {processes} processes have"
            )
        if mesh:
            sizes = parse(mesh)
            count = math.prod(sizes.values())
            if count > here:
                raise ValueError(f"mesh={mesh} has {count} devices, here are {here}")
            kinds = (AxisType.Auto,) * len(AXES)
            devices = jax.devices()[:count]
            self.mesh = jax.make_mesh(tuple(sizes.values()), AXES, kinds, devices=devices)

    def place(self, params: Any) -> Any:
        """Parameters, each divided along its longest axis that `model` divides."""
        if self.mesh is None:
            return params
        shardings = jax.tree_util.tree_map_with_path(self._sharding, params)
        return jax.tree.map(_put, params, shardings)

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
        sharding = NamedSharding(self.mesh, PartitionSpec(*[None] * rows, AXES))
        return jax.tree.map(lambda x: _put(x, sharding), batch)

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
