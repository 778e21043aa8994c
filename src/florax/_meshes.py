"""How arrays are divided among devices, where that is part of their types.

On a mesh with explicit axes a type says along which axes of the mesh an array is divided; inside
`jax.shard_map` it says along which the devices have values of their own. Where axes are automatic
types say nothing, XLA decides, and nothing here does anything.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

T = TypeVar("T")
Division = tuple[Any, ...]


def division(array: jax.Array, axes: Sequence[int]) -> Division:
    """Per axis named the axes of the explicit mesh that it is divided along; None for none."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return tuple(spec[axis] if axis < len(spec) else None for axis in axes)


def parts(array: jax.Array, along: Any) -> int:
    """In how many parts an entry of the `division` of `array` divides an axis."""
    names = along if isinstance(along, tuple) else () if along is None else (along,)
    return math.prod(jax.typeof(array).sharding.mesh.shape[name] for name in names)


def is_explicit(array: jax.Array) -> bool:
    """Whether the type of `array` belongs to a mesh with explicit axes."""
    return AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types


def divide(array: jax.Array, along: Division) -> jax.Array:
    """Divide the leading axes of `array` on an explicit mesh; the others are replicated."""
    if all(axis is None for axis in along):
        return array
    return _reshard(array, along)


def zeros(
    shape: Sequence[int],
    dtype: jax.typing.DTypeLike,
    like: jax.Array,
    axes: Sequence[int],
    along: Division | None = None,
) -> jax.Array:
    """Zeros whose first axes are divided among devices as the `axes` of `like` are.

    The first axes have the sizes of those. On an explicit mesh they may be divided by `along`.
    """
    if is_explicit(like) or varying(like) or not _may_be_divided(like):
        along = division(like, axes) if along is None else along
        return divide(varying_as(jnp.zeros(shape, dtype), like), along)
    # Where types say nothing, XLA divides a result as what it is computed from is divided.
    others = [axis for axis in range(like.ndim) if axis not in axes]
    for axis in others:
        like = jax.lax.slice_in_dim(like, 0, 1, axis=axis)
    first = like.transpose(*axes, *others)
    first = first.reshape(*first.shape[: len(axes)], *[1] * (len(shape) - len(axes)))
    return jnp.broadcast_to(jnp.where(False, first != first, False), shape).astype(dtype)


def _may_be_divided(array: Any) -> bool:
    if not isinstance(array, jax.Array) or not array.size:
        return False
    return isinstance(array, jax.core.Tracer) or len(array.sharding.device_set) > 1


def divide_as(array: jax.Array, like: jax.Array) -> jax.Array:
    """Divide `array` as one of the same shape is divided."""
    own, wanted = (division(x, range(array.ndim)) for x in (array, like))
    return array if own == wanted else _reshard(array, wanted)


def settle(array: jax.Array) -> jax.Array:
    """`array`, with a type of the explicit mesh in use if it has none yet, as new zeros have."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types or not jax.typeof(array).sharding.mesh.empty:
        return array
    return _reshard(array, ())


def spec(along: Division) -> PartitionSpec:
    """The specification that divides the axes of an array so."""
    return PartitionSpec(*along)  # type: ignore[no-untyped-call]


def _reshard(array: jax.Array, along: Division) -> jax.Array:
    resharded: jax.Array = jax.sharding.reshard(array, spec(along))  # type: ignore[no-untyped-call]
    return resharded


def move(array: jax.Array, mesh: Any, along: Division) -> jax.Array:
    """`array` in the same mesh with axes of other types, as `auto_axes` and `explicit_axes` do."""
    if jax.typeof(array).sharding.mesh == mesh:
        return array
    sharding = jax.sharding.NamedSharding(mesh, spec(along))
    with jax.sharding.use_abstract_mesh(mesh):
        moved: jax.Array = jax.sharding.reshard(array, sharding)  # type: ignore[no-untyped-call]
        return moved


def in_use(array: jax.Array) -> contextlib.AbstractContextManager[Any]:
    """The mesh of the type of `array` in use, as inside of `auto_axes` and `explicit_axes`."""
    inside = not jax.sharding.get_abstract_mesh().empty
    return entered(jax.typeof(array).sharding.mesh if inside else None)


def known_to(array: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, the same on all devices, with the type that meets that of `array`."""
    mesh, own = (jax.typeof(y).sharding.mesh for y in (array, x))
    return x if mesh.empty or own.empty or mesh == own else move(x, mesh, ())


def varying(x: jax.Array) -> frozenset[str]:
    """The axes of a `shard_map` along which the devices have values of their own."""
    axes: frozenset[str] = jax.typeof(x).manual_axis_type.varying
    return axes


def varying_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, to be given values of its own wherever `like` has some."""
    axes = varying(like) - varying(x)
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def summed_to(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` summed over the devices that have one value of `like` between them."""
    axes = varying(x) - varying(like)
    return jax.lax.psum(x, tuple(axes)) if axes else x  # type: ignore[no-untyped-call]


def within(like: jax.Array, function: Callable[..., Any], total: jax.Array, *args: Any) -> Any:
    """`function(total, *args)` on the mesh that the type of `like` belongs to.

    Inside of `jax.sharding.auto_axes` that is another mesh than around it. Returned is a pair: what
    takes the place of `total`, typed as it is, and anything else.
    """
    mesh = jax.typeof(like).sharding.mesh
    if mesh.empty or mesh == jax.typeof(total).sharding.mesh or not is_explicit(total):
        return function(total, *args)
    with jax.sharding.use_abstract_mesh(mesh):
        new, more = function(*jax.tree.map(lambda x: move(x, mesh, ()), (total, *args)))
    own = jax.typeof(total).sharding
    return move(new, own.mesh, tuple(own.spec)), more


def automatically(function: Callable[..., T], total: T, *args: Any) -> T:
    """`function(total, *args)`, divided as `total` is; on explicit meshes XLA decides between."""
    specs = jax.tree.map(lambda x: spec(division(x, range(x.ndim))), total)
    return into(specs, function, total, *args)


def into(specs: Any, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, divided by `specs` on explicit meshes, where XLA decides between."""
    if not any(is_explicit(x) for x in jax.tree.leaves(args)):
        return function(*args)
    done: T = jax.sharding.auto_axes(function, out_sharding=specs)(*args)
    return done


def entered(mesh: Any) -> contextlib.AbstractContextManager[Any]:
    """The context of a mesh, if there is one and it is not that around."""
    own = getattr(mesh, "abstract_mesh", mesh)
    if own is None or own.empty or own == jax.sharding.get_abstract_mesh():
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = jax.sharding.use_abstract_mesh(own)
    return context
