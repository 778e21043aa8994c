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
class Heights:
    """How many layers each leaf is a stack of, in flattening order; None for what is no stack."""

    of_leaves: tuple[int | None, ...]

    @property
    def distinct(self) -> tuple[int, ...]:
        """The heights that occur."""
        return tuple(sorted({height for height in self.of_leaves if height is not None}))

    def select(self, tree: Any, height: int | None) -> Any:
        """`tree` with the leaves of that height only, None in the place of the others."""
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
            [x if own == height else None for x, own in zip(flat, self.of_leaves, strict=True)],
        )

    def merge(self, treedef: Any, parts: dict[int | None, Any]) -> Any:
        """The whole tree again from its parts by height."""
        leaves = {height: iter(jax.tree.leaves(part)) for height, part in parts.items()}
        return jax.tree.unflatten(treedef, [next(leaves[height]) for height in self.of_leaves])


class PerLayerState(NamedTuple):
    """State of `per_layer`.

    Attributes:
      stacks: per height, in rising order, the state of a layer, stacked: every array with a leading
        axis of the layers.
      rest: the state of all that is no stack.
      heights: how many layers each leaf is a stack of; static.
    """

    stacks: tuple[optax.OptState, ...]
    rest: optax.OptState
    heights: Heights


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
        heights = _heights(params, stacked)
        stacks = []
        for height in heights.distinct:
            state = jax.vmap(opt.init)(heights.select(params, height))
            stacks.append(_own_keys(state))
        return PerLayerState(tuple(stacks), opt.init(heights.select(params, None)), heights)

    return optax.GradientTransformationExtraArgs(init_fn, Update(opt))


@dataclasses.dataclass(frozen=True)
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
        heights = state.heights
        parts: dict[int | None, Any] = {}
        parts[None], rest = self.opt.update(
            heights.select(updates, None), state.rest, heights.select(params, None), **extra_args
        )
        stacks = []
        for height, own in zip(heights.distinct, state.stacks, strict=True):

            def layer(_: None, xs: Any) -> Any:
                return None, self.opt.update(*xs, **extra_args)

            # A scan, not vmap: a layer's temporaries at a time, and conditionals stay conditionals.
            xs = (heights.select(updates, height), own, heights.select(params, height))
            _, (parts[height], own) = jax.lax.scan(layer, None, xs)
            stacks.append(own)
        merged = heights.merge(jax.tree.structure(updates), parts)
        return merged, PerLayerState(tuple(stacks), rest, heights)


def _heights(params: optax.Params, stacked: Stacked) -> Heights:
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
    return Heights(tuple(heights))


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
