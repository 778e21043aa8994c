"""Training steps on several devices of one mesh: who has which part, and what crosses the wire.

    data    parameters and state are on every device, the rows of a batch are divided
    fsdp    parameters and state are divided too, along one axis of each, and brought together where
            they are used
    hybrid  `fsdp` among the devices of a host, `data` among hosts

    full            gradients in float32 at full size; XLA sums them across devices in every
                    micro-batch
    full-once       the same, but every device accumulates those of its own rows, and what all have
                    is summed once an update: the cheapest that full size can be, `data` alone
    sketched        `florax.value_and_update`: sketches are summed in every micro-batch
    sketched-once   every device accumulates its own sketches, summed once an update: `data` alone
    both            as `sketched`, by `side="both"`, in the same bytes

With `-int8` or `-int4` behind `sketched` and `both`, accumulators are in 8 or 4 bits; what is
summed across devices is in float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import florax
from florax_benchmarks import methods, models, steps

METHODS = (
    *("full", "full-once", "sketched", "sketched-once"),
    *("sketched-int8", "both", "both-int8", "both-int4"),
)
HOST, DEVICE = "host", "data"  # the axes of a mesh; of one host's the second alone


class Program(NamedTuple):
    """A step of one method on one mesh, not compiled yet.

    Attributes:
      init: parameters -> state, divided as they are.
      lowered: of (params, state, micro-batches) -> (loss, params, state).
      params: shapes with shardings, as are the next two.
      state: of the optimizer and its accumulators.
      batches: micro-batches along the first axis, the rows of all devices along the second.
    """

    init: Callable[[Any], Any]
    lowered: jax.stages.Lowered
    params: Any
    state: Any
    batches: Any


def mesh_of(devices: int, hosts: int = 1) -> Mesh:
    """So many devices of each host."""
    sizes = {HOST: hosts, DEVICE: devices} if hosts > 1 else {DEVICE: devices}
    kinds = (AxisType.Auto,) * len(sizes)
    own = jax.devices()[: hosts * devices]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds, devices=own)


def lower(
    name: str,
    division: str,
    mesh: Mesh,
    shape: models.Shape,
    dtype: Any,
    batch: int,
    length: int,
    accumulate: int,
    rank: int,
) -> Program:
    """The step of a method; `batch` is of one device, a micro-batch. Nothing is allocated."""
    params = _placed(models.parameter_shapes(shape, dtype), mesh, division)
    rows = models.batch_shapes(shape, batch * mesh.size, length, length)
    batches = jax.tree.map(
        lambda x: _shape((accumulate, *x.shape), x.dtype, mesh, None, mesh.axis_names), rows
    )
    # In chunks the gradient of the head would be summed across devices after each of them.
    loss_fn = functools.partial(models.loss, shape._replace(chunk=length))
    replicated = NamedSharding(mesh, PartitionSpec())
    if division != "data":
        # Else XLA may exchange activations in the place of weights, which is something else.
        loss_fn.keywords["whole"] = lambda w: jax.lax.with_sharding_constraint(w, replicated)
    tx, step = _step(name, loss_fn, mesh, accumulate, rank)
    shardings = florax.state_shardings(tx, params)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
        shardings,
    )
    kept = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(None, *kept))
    init = jax.jit(tx.init, out_shardings=shardings)
    return Program(init, jitted.lower(params, state, batches), params, state, batches)


def _shape(axes: tuple[int, ...], dtype: Any, mesh: Mesh, *along: Any) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, PartitionSpec(*along))
    return jax.ShapeDtypeStruct(axes, dtype, sharding=sharding)


def _placed(params: Any, mesh: Mesh, division: str) -> Any:
    """Each matrix divided along its shorter axis, which sketches keep; or all on every device."""
    names = {"data": (), "fsdp": mesh.axis_names, "hybrid": (DEVICE,)}[division]

    def place(path: tuple, leaf: Any) -> Any:
        first = int(models.is_stacked(path, leaf))  # the layers themselves stay together
        along: list[Any] = [None] * len(leaf.shape)
        parts = math.prod(mesh.shape[name] for name in names)
        axes = [i for i in range(first, len(along)) if leaf.shape[i] % parts == 0]
        if len(along) - first == 2 and axes and names:
            along[min(axes, key=lambda i: leaf.shape[i])] = names
        return _shape(leaf.shape, leaf.dtype, mesh, *along)

    return jax.tree_util.tree_map_with_path(place, params)


def _step(
    name: str, loss_fn: steps.Loss, mesh: Mesh, accumulate: int, rank: int
) -> tuple[optax.GradientTransformation, steps.Step]:
    """What makes the state, and the step."""
    if name not in METHODS:
        raise ValueError(f"name must be one of {', '.join(METHODS)}; got {name!r}")
    kind, once = name.removesuffix("-once"), name.endswith("-once")
    if kind == "full":
        adafactor = optax.adafactor(methods.LEARNING_RATE)
        if once:
            return adafactor, full_size_once(loss_fn, adafactor, mesh)
        return adafactor, steps.full_size(loss_fn, adafactor)
    tx = methods.accumulation(kind, accumulate, rank, "larger")
    return tx, sketched_once(loss_fn, tx, mesh) if once else florax.value_and_update(loss_fn, tx)


def full_size_once(loss_fn: steps.Loss, tx: optax.GradientTransformation, mesh: Mesh) -> steps.Step:
    """Each device accumulates the gradients of its rows; their mean is taken once an update."""

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=_rows(mesh), out_specs=PartitionSpec())
    def accumulated(params: Any, batches: Any) -> Any:
        count = len(jax.tree.leaves(batches)[0])
        params = _own(params, mesh)

        def micro_step(total: Any, batch: Any) -> tuple[Any, jax.Array]:
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32) / count, grads)
            return optax.tree.add(total, grads), loss

        zeros = _own(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params), mesh)
        total, losses = jax.lax.scan(micro_step, zeros, batches)
        return jax.lax.pmean((losses.mean(), total), mesh.axis_names)

    def step(params: Any, state: Any, batches: Any) -> tuple[jax.Array, Any, Any]:
        loss, total = accumulated(params, batches)
        grads = jax.tree.map(lambda t, p: t.astype(p.dtype), total, params)
        updates, state = tx.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    return step


def sketched_once(loss_fn: steps.Loss, tx: optax.GradientTransformation, mesh: Mesh) -> steps.Step:
    """Each device accumulates the sketches of its rows; their mean is taken once an update."""

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=_rows(mesh), out_specs=PartitionSpec())
    def accumulated(params_and_state: Any, batches: Any) -> Any:
        params, state = params_and_state
        params, state = _own(params, mesh), _with_arrays(state, _own(state.sketch.arrays, mesh))

        def micro_step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
            loss, grads = florax.value_and_grad(loss_fn, tx)(params, batch, opt_state=state)
            return florax.accumulate(tx, grads, state), loss

        state, losses = jax.lax.scan(micro_step, state, batches)
        return jax.lax.pmean(losses.mean(), mesh.axis_names), _with_arrays(
            state, jax.lax.pmean(state.sketch.arrays, mesh.axis_names)
        )

    def step(params: Any, state: Any, batches: Any) -> tuple[jax.Array, Any, Any]:
        loss, state = accumulated((params, state), batches)
        return loss, *florax.finish(tx, params, state)

    return step


def _rows(mesh: Mesh) -> tuple[PartitionSpec, PartitionSpec]:
    """Of a `shard_map`: everything for every device, and the rows of a batch divided."""
    return PartitionSpec(), PartitionSpec(None, mesh.axis_names)


def _own(tree: Any, mesh: Mesh) -> Any:
    """Values of each device's own: else gradients are summed across devices at once."""
    return jax.tree.map(lambda x: jax.lax.pcast(x, mesh.axis_names, to="varying"), tree)


def _with_arrays(state: Any, arrays: Any) -> Any:
    return state._replace(sketch=dataclasses.replace(state.sketch, arrays=arrays))
