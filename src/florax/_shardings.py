"""How a state is divided among devices, from how its parameters are."""

from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding

from florax import _dimensions, _meshes


def state_shardings(tx: optax.GradientTransformation, params: Any) -> Any:
    """The sharding of every array of the state that `tx.init` makes of parameters on a mesh.

    A sketch of G Aᵀ is divided along the rows of its parameter as this is, and along the axes of a
    stack; what is as large as a parameter is divided as this is; anything else is the same on all
    devices. Nothing is computed: on a mesh with explicit axes types say how arrays are divided, and
    `tx.init` is traced on such a one.

    Use it for `out_shardings` of a compiled `tx.init`, as XLA leaves the zeros that Optax makes of
    parameters on one device; of a step, to be sure that a state stays as it is; and to restore a
    checkpoint onto a mesh.

    Args:
      tx: any transformation of Optax; those of florax in chains, masks and partitions.
      params: the parameters, or a tree of `jax.ShapeDtypeStruct`; every leaf has a
        `jax.sharding.NamedSharding`, all of one mesh, of automatic or explicit axes.

    Returns:
      A tree of `NamedSharding`, of the structure of `tx.init(params)`.

    Raises:
      ValueError: there are no parameters, or one has no such sharding or another mesh than the
        first.

    >>> import jax, jax.numpy as jnp, florax
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
    >>> divided = NamedSharding(mesh, P("data", "model"))
    >>> params = {"kernel": jax.ShapeDtypeStruct((512, 256), jnp.float32, sharding=divided)}
    >>> tx = florax.flora_momentum(rank=16)  # keeps (512, 16)
    >>> shardings = florax.state_shardings(tx, params)
    >>> tuple(shardings.sketch.arrays["kernel"].spec)
    ('data', None)
    >>> init = jax.jit(tx.init, out_shardings=shardings)
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    meshes = {_dimensions.name(path): _mesh(path, leaf) for path, leaf in leaves}
    if not meshes:
        raise ValueError("params has no arrays, of which a state could take its mesh.")
    first, *others = meshes
    for name in others:
        if meshes[name] != meshes[first]:
            raise ValueError(f"params{name} is on another mesh than params{first}.")
    mesh = meshes[first]
    axis_types = (AxisType.Explicit,) * len(mesh.axis_names)
    explicit = Mesh(mesh.devices, mesh.axis_names, axis_types=axis_types)

    def typed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(explicit, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
            leaf.shape, leaf.dtype, sharding=sharding
        )

    with jax.set_mesh(explicit):
        state = jax.eval_shape(tx.init, jax.tree.map(typed, params))

    def divided(x: jax.ShapeDtypeStruct) -> NamedSharding:
        along = () if x.sharding is None else tuple(x.sharding.spec)
        along = (*along, *[None] * (len(x.shape) - len(along)))
        # As JAX itself writes them: equal for jit, which else compiles once more, not only alike.
        while along and along[-1] is None and AxisType.Explicit not in mesh.axis_types:
            along = along[:-1]
        return NamedSharding(mesh, _meshes.spec(along))

    return jax.tree.map(divided, state)


def _mesh(path: Any, leaf: Any) -> Mesh:
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        raise ValueError(
            f"params{_dimensions.name(path)} needs a NamedSharding of a mesh, got {sharding}. Pass "
            "parameters that are on one, or jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
        )
    return sharding.mesh
