"""Stacked layers as blocks of their own: a transformation mapped over the layers of a stack."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from florax import _leaves, _momentum

Stacked: TypeAlias = Callable[[_leaves.KeyPath, Any], bool] | Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Stacks:
    """Which leaves are stacks of layers, by number of the stack; static.

    Attributes:
      of_leaves: per leaf, in flattening order, the stack that it is part of; None if of none.
      heights: per stack the number of its layers.
    """

    of_leaves: tuple[int | None, ...]
    heights: tuple[int, ...]

    def select(self, tree: Any, stack: int | None) -> Any:
        """`tree` with the leaves of that stack only, None in the place of the others."""
        if tree is None:
            return None
        flat, treedef = jax.tree.flatten(tree)
        if len(flat) != len(self.of_leaves):
            raise ValueError(
                f"per_layer was made for {len(self.of_leaves)} leaves, got {len(flat)}. Pass a "
                "tree like the parameters given to init."
            )
        return jax.tree.unflatten(
            treedef,
            [x if own == stack else None for x, own in zip(flat, self.of_leaves, strict=True)],
        )

    def merge(self, treedef: Any, parts: dict[int | None, Any]) -> Any:
        """The whole tree again from its parts by stack."""
        leaves = {stack: iter(jax.tree.leaves(part)) for stack, part in parts.items()}
        return jax.tree.unflatten(treedef, [next(leaves[stack]) for stack in self.of_leaves])


class PerLayerState(NamedTuple):
    """State of `per_layer`.

    Attributes:
      layers: per stack the state of a layer, stacked: every array with a leading axis of layers.
        Leaves with the same number of layers are one stack.
      rest: the state of all that is no stack.
      stacks: which leaves are stacks; static.
    """

    layers: tuple[optax.OptState, ...]
    rest: optax.OptState
    stacks: Stacks


def per_layer(
    opt: optax.GradientTransformation, stacked: Stacked
) -> optax.GradientTransformationExtraArgs:
    """Treat every layer of stacked parameters as the block of its own that it is.

    Models that scan over their layers keep a weight of all layers in one array with a leading axis.
    To Optax that is one parameter: Adafactor clips and scales the update of all layers by one
    number, and factors what would be a vector. This maps `opt` over the leading axis instead, so
    that training does not depend on how layers are stored. Inside `flora_accumulate`, `finish`
    then proceeds layer by layer.

    Args:
      opt: any Optax transformation.
      stacked: which leaves are stacks, along their first axis: a function `(path, leaf) -> bool`,
        or a tree of bools, possibly a prefix of the parameters'.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `PerLayerState`. Extra arguments
      reach every layer as they are.

    Raises:
      ValueError: a leaf that is said to be a stack has no axis.

    >>> import florax, jax, jax.numpy as jnp, optax
    >>> params = {"layers": jnp.stack([jnp.ones(4), jnp.full(4, 1e3)]), "head": jnp.ones(4)}
    >>> clip = optax.clip_by_block_rms(1.0)  # by the root mean square of a whole block
    >>> tx = florax.per_layer(clip, {"layers": True, "head": False})
    >>> tx.update(params, tx.init(params))[0]["layers"][:, 0].tolist()
    [1.0, 1.0]
    >>> [round(x, 4) for x in clip.update(params, clip.init(params))[0]["layers"][:, 0].tolist()]
    [0.0014, 1.4142]
    """
    opt = optax.with_extra_args_support(opt)

    def init_fn(params: optax.Params) -> PerLayerState:
        return init(opt, params, _stacks(params, stacked))

    return optax.GradientTransformationExtraArgs(init_fn, Update(opt))


def init(
    opt: optax.GradientTransformationExtraArgs, params: optax.Params, stacks: Stacks
) -> PerLayerState:
    """The state of `per_layer` for known stacks."""
    layers = [
        _own_keys(jax.vmap(opt.init)(stacks.select(params, stack)))
        for stack in range(len(stacks.heights))
    ]
    return PerLayerState(tuple(layers), opt.init(stacks.select(params, None)), stacks)


@dataclasses.dataclass(frozen=True, eq=False)  # hashable as the function it is
class Update:
    """The update function of `per_layer`, which `finish` asks for the transformation."""

    opt: optax.GradientTransformationExtraArgs

    def __call__(
        self,
        updates: optax.Updates,
        state: PerLayerState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PerLayerState]:
        stacks = state.stacks

        def layer(_: None, xs: Any) -> Any:
            return None, self.opt.update(*xs, **extra_args)

        parts: dict[int | None, Any] = {}
        parts[None], rest = self.opt.update(
            stacks.select(updates, None), state.rest, stacks.select(params, None), **extra_args
        )
        layers = []
        for stack, own in enumerate(state.layers):
            # A scan, not vmap: a layer's temporaries at a time, and conditionals stay conditionals.
            xs = (stacks.select(updates, stack), own, stacks.select(params, stack))
            _, (parts[stack], own) = jax.lax.scan(layer, None, xs)
            layers.append(own)
        merged = stacks.merge(jax.tree.structure(updates), parts)
        return merged, PerLayerState(tuple(layers), rest, stacks)


def _stacks(params: optax.Params, stacked: Stacked) -> Stacks:
    flat = jax.tree_util.tree_leaves_with_path(params)
    heights: list[int | None] = []
    for (path, leaf), is_stack in zip(
        flat, _leaves.resolve("stacked", stacked, params, flat), strict=True
    ):
        if is_stack and not leaf.shape:
            raise ValueError(
                f"{_leaves.name(path)} is said to be a stack of layers, but is a scalar. Leave it "
                "out of stacked."
            )
        heights.append(leaf.shape[0] if is_stack else None)
    distinct = sorted({height for height in heights if height is not None})
    numbers = (None if height is None else distinct.index(height) for height in heights)
    return Stacks(tuple(numbers), tuple(distinct))


def _own_keys(state: optax.OptState) -> optax.OptState:
    """Fold the layer's number into the keys of FLORA states: as for a stack's projections."""

    def is_flora(node: Any) -> bool:
        return isinstance(node, _momentum.FloraMomentumState)

    def fold(node: Any) -> Any:
        if not is_flora(node):
            return node
        layers = jnp.arange(node.key.shape[0], dtype=jnp.uint32)
        return node._replace(key=jax.vmap(_leaves.fold)(node.key, layers))

    return jax.tree.map(fold, state, is_leaf=is_flora)
