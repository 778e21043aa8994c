"""Stacked layers as blocks of their own: a transformation mapped over the layers of a stack."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

from florax import _checks, _dimensions, _keys, _leaves, _meshes, _sketches

Stacked: TypeAlias = Callable[[_dimensions.KeyPath, Any], bool] | Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Stacks:
    """Which leaves are stacks of layers; static.

    Attributes:
      paths: per leaf, in flattening order, its name.
      of_leaves: per leaf the number of the stack that it is part of; None if of none.
      heights: per stack the number of its layers.
      axes: per leaf the axis of its layers; 0 if it has none.
    """

    paths: tuple[str, ...]
    of_leaves: tuple[int | None, ...]
    heights: tuple[int, ...]
    axes: tuple[int, ...]

    def each(self) -> list["Stack"]:
        """The stacks one by one."""
        leaves = list(zip(self.paths, self.of_leaves, self.axes, strict=True))
        return [
            Stack(height, {path: axis for path, own, axis in leaves if own == number})
            for number, height in enumerate(self.heights)
        ]

    def select(self, tree: Any, stack: int | None, like: Any = None) -> Any:
        """`tree` with the leaves of that stack only, their layers along the first axis.

        None is in the place of the others. What has fewer axes than `like` has its layers there.
        """
        if tree is None:
            return None
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
        paths = tuple(_dimensions.name(path) for path, _ in flat)
        if paths != self.paths:
            raise ValueError(
                f"per_layer was made for {len(self.paths)} leaves, got {len(paths)}: missing "
                f"{[p for p in self.paths if p not in paths]}, surplus "
                f"{[p for p in paths if p not in self.paths]}. Pass a tree like the parameters "
                "given to init."
            )
        likes = jax.tree.leaves(tree if like is None else like)
        leaves = zip(self.of_leaves, self.axes, flat, likes, strict=True)
        own = [
            _move(x, axis, 0, like) if of == stack else None for of, axis, (_, x), like in leaves
        ]
        return jax.tree.unflatten(treedef, own)


class Stack(NamedTuple):
    """One stack of layers: how many there are, and by the names of its leaves the layers' axis."""

    height: int
    axes: dict[str, int]


class Parts(NamedTuple):
    """What a state keeps for each layer of every stack, along a leading axis, and for the rest."""

    layers: tuple[Any, ...]
    rest: Any


class PerLayerState(NamedTuple):
    """State of `per_layer`.

    Attributes:
      inner: the state of the transformation, in which what is kept like the parameters (Adam's
        moments) is a tree like the parameters, and what is kept beside them (its count) a `Parts`.
        Leaves with as many axes as the parameter have its layers' axis, others the first.
      stacks: which leaves are stacks; static.
    """

    inner: optax.OptState
    stacks: Stacks


def per_layer(
    opt: optax.GradientTransformation, stacked: Stacked, axis: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Treat every layer of stacked parameters as the block of its own that it is.

    Models that scan over their layers keep a weight of all layers in one array with an axis more.
    To Optax that is one parameter: Adafactor clips and scales the update of all layers by one
    number, and factors what would be a vector. This maps `opt` over the layers instead, so that
    training does not depend on how they are stored; random numbers are each layer's own.
    Inside `flora_accumulate`, `finish` proceeds layer by layer, and
    `value_and_update(..., layerwise=True)` updates each layer as its gradient appears.

    Args:
      opt: any Optax transformation.
      stacked: which leaves are stacks: a tree of bools, possibly a prefix of the parameters', or a
        function `(path, leaf) -> bool`. Stacks with as many layers are updated together.
      axis: of the layers in every stack; 1 for MaxText's `param_scan_axis=1` or `flax.linen.scan`
        with `variable_axes={"params": 1}`. A negative one counts from the end. Where stacks differ,
        `optax.partition` gives each its `per_layer`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Extra arguments reach every layer as they are.

    Raises:
      TypeError: `axis` is not an int, or an answer of `stacked` not a bool.
      ValueError: a leaf that is said to be a stack has no such axis.

    >>> import florax, jax, jax.numpy as jnp, optax
    >>> params = {"layers": jnp.stack([jnp.ones(4), jnp.full(4, 1e3)]), "head": jnp.ones(4)}
    >>> clip = optax.clip_by_block_rms(1.0)  # by the root mean square of a whole block
    >>> tx = florax.per_layer(clip, {"layers": True, "head": False})
    >>> tx.update(params, tx.init(params))[0]["layers"][:, 0].tolist()
    [1.0, 1.0]
    >>> [round(x, 4) for x in clip.update(params, clip.init(params))[0]["layers"][:, 0].tolist()]
    [0.0014, 1.4142]
    """
    if not _checks.is_int(axis):
        raise TypeError(
            f"axis must be an int, that of the layers in every stack, got {axis!r}. Which leaves "
            "are stacks says stacked."
        )
    opt = optax.with_extra_args_support(opt)

    def init_fn(params: optax.Params) -> PerLayerState:
        if _sketches.is_stand_in(params):
            # As for sketches: a leaf that stands for what is no copy of the parameters.
            return PerLayerState(opt.init(params), cast(Stacks, jnp.zeros([])))
        _sketches.register_with_flax(Stacks, ())
        stacks = _find_stacks(params, stacked, int(axis))
        layers = []
        for stack, height in enumerate(stacks.heights):
            own = jax.vmap(opt.init)(stacks.select(params, stack))
            layers.append(_with_own_keys(own, stack, height))
        return _join(stacks, params, Parts(tuple(layers), opt.init(stacks.select(params, None))))

    def update_fn(
        updates: optax.Updates,
        state: PerLayerState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PerLayerState]:
        stacks = state.stacks
        of_rest = stacks.select(updates, None)
        parts = _split(state, updates)

        def layer(_: None, xs: Any) -> Any:
            return None, opt.update(*xs, **extra_args)

        news: dict[int | None, Any] = {}
        news[None], rest = opt.update(
            of_rest, parts.rest, stacks.select(params, None), **extra_args
        )
        layers = []
        for stack, own in enumerate(parts.layers):
            # A scan, not vmap: a layer's temporaries at a time, and conditionals stay conditionals.
            # It carries nothing, which is how `_updates` knows it for a map over the layers.
            xs = (stacks.select(updates, stack), own, stacks.select(params, stack))
            _, (news[stack], own) = jax.lax.scan(layer, None, xs)
            layers.append(own)
        return _merge(stacks, updates, news), _join(stacks, updates, Parts(tuple(layers), rest))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def all_of(state: optax.OptState) -> list[Stack]:
    """All that a state's transformations take for stacks of layers."""
    nodes = _sketches.find(state, PerLayerState)
    return [stack for node in nodes for stack in node.stacks.each()]


def over_layers(
    height: int,
    body: Callable[[jax.Array, Any, Any], tuple[Any, Any]],
    stacks: Any,
    carry: Any = None,
    *,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """Replace stacks in place, a layer at a time.

    Args:
      height: the number of layers.
      body: `(index, stacks, carry) -> (new stacks, new carry)` replaces that layer.
      stacks: a tree of arrays.
      carry: what a layer hands on to the next.
      reverse: from the last layer to the first.

    Returns:
      The new stacks, and the last carry.
    """

    def step(count: jax.Array, loop: Any) -> Any:
        stacks, carry = loop
        index = height - 1 - count if reverse else count
        return body(index, stacks, carry)

    # A loop that carries the stacks updates them in place; a scan would make new ones.
    start = jax.tree.map(_meshes.settle, (stacks, carry))
    new: tuple[Any, Any] = jax.lax.fori_loop(0, height, step, start)
    return new


def take(stacks: Any, index: jax.Array, axes: Any = None) -> Any:
    """One layer of stacks, along the first axis if no `axes` are given."""

    def of(x: jax.Array, axis: int) -> Any:
        with _meshes.in_use(x):
            own = _meshes.known_to(x, index)
            return jax.lax.dynamic_index_in_dim(
                x, own, axis, keepdims=False, allow_negative_indices=False
            )

    axes = jax.tree.map(lambda _: 0, stacks) if axes is None else axes
    return jax.tree.map(of, stacks, axes)


def put(stacks: Any, layer: Any, index: jax.Array, axes: Any = None) -> Any:
    """Stacks with one layer replaced."""

    def into(x: jax.Array, part: jax.Array, axis: int) -> Any:
        with _meshes.in_use(x):
            own = _meshes.known_to(x, index)
            return jax.lax.dynamic_update_index_in_dim(
                x, part, own, axis, allow_negative_indices=False
            )

    axes = jax.tree.map(lambda _: 0, stacks) if axes is None else axes
    return jax.tree.map(into, stacks, layer, axes)


def _find_stacks(params: optax.Params, stacked: Stacked, axis: int) -> Stacks:
    flat = jax.tree_util.tree_leaves_with_path(params)
    paths = tuple(_dimensions.name(path) for path, _ in flat)
    is_stack = _dimensions.resolve("stacked", stacked, params)
    heights: list[int | None] = []
    axes: list[int] = []
    for path, (_, leaf), says in zip(paths, flat, is_stack, strict=True):
        shape, _ = _leaves.shape_and_dtype(path, leaf)
        if _checks.is_int(says):
            raise TypeError(f"stacked says {says!r} of {path}, no bool. Which axis says axis.")
        if says and not -len(shape) <= axis < len(shape):
            what = f"has no axis {axis}, its shape is {shape}" if shape else "is a scalar"
            raise ValueError(
                f"{path} is said to be a stack of layers, but {what}. Leave it out of stacked."
            )
        heights.append(shape[axis] if says else None)
        axes.append(axis % len(shape) if says else 0)
    distinct = sorted({height for height in heights if height is not None})
    numbers = (None if height is None else distinct.index(height) for height in heights)
    return Stacks(paths, tuple(numbers), tuple(distinct), tuple(axes))


def _move(x: Any, source: int, target: int, like: Any) -> Any:
    """`x` with the layers' axis moved, if it has as many axes as `like`."""
    if source == target or jnp.ndim(x) != jnp.ndim(like):
        return x
    return jnp.moveaxis(x, source, target)


def _merge(stacks: Stacks, like: Any, parts: dict[int | None, Any]) -> Any:
    """The whole tree, like `like`, from its parts by stack: the opposite of `select`."""
    leaves = {stack: iter(jax.tree.leaves(part)) for stack, part in parts.items()}
    flat, treedef = jax.tree.flatten(like)
    own = zip(stacks.of_leaves, stacks.axes, flat, strict=True)
    merged = [_move(next(leaves[stack]), 0, axis, leaf) for stack, axis, leaf in own]
    return jax.tree.unflatten(treedef, merged)


def _join(stacks: Stacks, params: Any, parts: Parts) -> PerLayerState:
    """The state of all layers from those of its parts: see `PerLayerState`."""
    states: dict[int | None, Any] = {None: parts.rest}
    states.update(enumerate(parts.layers))
    flat: dict[int | None, list[Any]] = {}
    treedefs = set()
    for stack, state in states.items():
        like: Any = jax.tree.structure(stacks.select(params, stack))
        flat[stack], treedef = jax.tree.flatten(state, is_leaf=_is_kept_whole(like))
        flat[stack] = [(x, jax.tree.structure(x) == like) for x in flat[stack]]
        treedefs.add(treedef)
    if len(treedefs) > 1:  # states that are not alike have nothing in common to be merged
        return PerLayerState(parts, stacks)
    joined = []
    for nodes in zip(*flat.values(), strict=True):
        own = dict(zip(flat, (node for node, _ in nodes), strict=True))
        if all(like_params for _, like_params in nodes):
            joined.append(_merge(stacks, params, own))
        else:
            rest = own.pop(None)
            joined.append(Parts(tuple(own.values()), rest))
    return PerLayerState(jax.tree.unflatten(treedef, joined), stacks)


def _split(state: PerLayerState, params: Any) -> Parts:
    """The states of its parts, from `_join` and a tree like the parameters."""
    stacks, is_kept_whole = state.stacks, _is_kept_whole(jax.tree.structure(params))

    def part(stack: int | None) -> Any:
        def of(node: Any) -> Any:
            if isinstance(node, Parts):
                return node.rest if stack is None else node.layers[stack]
            return stacks.select(node, stack, params)

        return jax.tree.map(
            of, state.inner, is_leaf=lambda node: isinstance(node, Parts) or is_kept_whole(node)
        )

    return Parts(tuple(map(part, range(len(stacks.heights)))), part(None))


def _is_kept_whole(like: Any) -> Callable[[Any], bool]:
    """Of a node of a state: whether it is like the parameters, or holds sketches."""
    return lambda node: (
        isinstance(node, _sketches.Sketches) or bool(jax.tree.structure(node) == like)
    )


def _with_own_keys(state: optax.OptState, stack: int, height: int) -> optax.OptState:
    """Fold the layer's number into all keys in the state of a stack.

    Those of sketches as for a stack's projections. Other random keys the number of the stack too:
    nothing else tells its layers from those of another.
    """
    layers = jnp.arange(height, dtype=jnp.uint32)

    def fold(node: Any) -> Any:
        if isinstance(node, _sketches.Sketches):
            return dataclasses.replace(node, key=jax.vmap(_keys.fold)(node.key, layers))
        if jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
            return jax.vmap(lambda k, i: jax.random.fold_in(jax.random.fold_in(k, stack), i))(
                node, layers
            )
        # Raw keys: nothing else in an optimizer's state is a pair, or two pairs, of such words.
        if node.dtype == jnp.uint32 and node.shape in ((height, 2), (height, 4)):
            pairs = node.reshape(height, -1, 2)
            folded: jax.Array = jax.vmap(
                lambda pair, i: jax.vmap(lambda k: _keys.fold(k, stack, i))(pair)
            )(pairs, layers)
            return folded.reshape(node.shape)
        return node

    return jax.tree.map(fold, state, is_leaf=lambda node: isinstance(node, _sketches.Sketches))
