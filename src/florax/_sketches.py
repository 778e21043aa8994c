"""What is kept of the leaves' gradients: one gradient's sketch, and the sketches of a state."""

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax

from florax import _leaves, _projection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sketch:
    """The gradient of one leaf, born compressed by `value_and_grad`.

    It stands where the gradient of the leaf would stand. Sketches of the same cycle may be added
    and averaged, over micro-batches or devices; `flora_accumulate` and a `flora_momentum` that
    stands first take them, and nothing else does: used as an array it raises.

    Attributes:
      array: the sketch, shape `(*batch, *rows, rank)`, float32 or the parameter's dtype if wider.
      leaf: the leaf that it belongs to; static.
    """

    array: jax.Array
    leaf: _leaves.Leaf = dataclasses.field(metadata={"static": True})

    def __jax_array__(self) -> NoReturn:
        """Raise: a sketch is not a gradient."""
        raise TypeError(
            f"The gradient of {self.leaf.path} is a florax.Sketch, not an array: only "
            "flora_accumulate, florax.accumulate and a flora_momentum that stands first take it. "
            "For full gradients use jax.value_and_grad."
        )

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise: a sketch is not a gradient."""
        self.__jax_array__()


def match(updates: Any, leaves: tuple[_leaves.Leaf, ...]) -> tuple[list[Any], Any]:
    """Flatten `updates` after checking that it is a tree of gradients for the planned leaves.

    A gradient is an array of its leaf's shape or, where the leaf is compressed, its `Sketch`.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(
        updates, is_leaf=lambda node: isinstance(node, Sketch)
    )
    # `flax.nnx.Optimizer` shows `init` its Variables, `update` the arrays that are their `.value`.
    paths = [_leaves.name(path).removesuffix(".value") for path, _ in flat]
    planned = [leaf.path.removesuffix(".value") for leaf in leaves]
    if paths != planned:
        missing = [path for path in planned if path not in paths]
        surplus = [path for path in paths if path not in planned]
        raise ValueError(
            "The gradients do not match the parameters that the state was made for: "
            f"missing {missing}, surplus {surplus}. Pass gradients of the parameters given to "
            "init, or call init again."
        )
    for (_, grad), leaf in zip(flat, leaves, strict=True):
        if isinstance(grad, Sketch):
            if grad.leaf != leaf:
                raise ValueError(
                    f"The sketch of {leaf.path} was made for another state, as {grad.leaf}, where "
                    f"this one has {leaf}. Pass this state to value_and_grad as opt_state."
                )
            continue
        if tuple(grad.shape) != leaf.shape:
            raise ValueError(
                f"The gradient of {leaf.path} has shape {tuple(grad.shape)}, the parameter given "
                f"to init had {leaf.shape}. Pass gradients of the same parameters, or call init "
                "again."
            )
        _leaves.check_dtype(leaf.path, grad.dtype)
    return [grad for _, grad in flat], treedef


def compress(
    grads: list[Any], leaves: tuple[_leaves.Leaf, ...], key: jax.Array, cycle: jax.Array
) -> list[jax.Array]:
    """Per leaf the sketch of its gradient, which may be born as one, or the gradient if dense."""
    full = [i for i, grad in enumerate(grads) if not isinstance(grad, Sketch)]
    drawn = dict(zip(full, _leaves.draw(tuple(leaves[i] for i in full), key, cycle), strict=True))
    sketches = []
    for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        a = drawn.get(i)
        if isinstance(grad, Sketch):
            grad = grad.array
        sketches.append(grad if a is None else leaf.compress(grad, a))
    return sketches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sketches:
    """What a state keeps for the leaves: arrays, and how to read them.

    Attributes:
      arrays: a tree like the parameters; per leaf the sketch, shape `(*batch, *rows, rank)`, or,
        for a leaf that is kept dense, an array of its own shape.
      plan: one `Leaf` per leaf, in flattening order; static.
    """

    arrays: Any
    plan: tuple[_leaves.Leaf, ...] = dataclasses.field(metadata={"static": True})

    def leaves(self) -> list[jax.Array]:
        """The arrays in the order of `plan`."""
        return jax.tree.leaves(self.arrays)

    def replace(self, leaves: list[jax.Array]) -> "Sketches":
        """The same with other arrays, given in the order of `plan`."""
        return Sketches(jax.tree.unflatten(jax.tree.structure(self.arrays), leaves), self.plan)


def zero_sketches(
    params: Any,
    leaves: tuple[_leaves.Leaf, ...],
    dtype: Callable[[jnp.dtype], jax.typing.DTypeLike],
) -> Sketches:
    """Sketches of zero for planned `params`; `dtype` gives the state's dtype for a parameter's."""
    flat = jax.tree.leaves(params)
    zeros = [leaf.zeros(x, dtype(leaf.dtype)) for leaf, x in zip(leaves, flat, strict=True)]
    return Sketches(jax.tree.unflatten(jax.tree.structure(params), zeros), leaves)


def is_stand_in(params: Any) -> bool:
    """Whether `params` is the leafless object with which `optax.tree.map_params` calls `init`.

    Optax puts it where a state holds arrays like the parameters. Sketches are not like them, so
    `init` answers with one leaf in their place, which stands for the whole field.
    """
    from_optax = type(params).__module__.partition(".")[0] == optax.__name__
    return from_optax and not isinstance(params, tuple) and not jax.tree.leaves(params)


def round_all(
    leaves: tuple[_leaves.Leaf, ...],
    values: list[jax.Array],
    dtypes: list[jnp.dtype],
    key: jax.Array,
    *counts: jax.typing.ArrayLike,
) -> list[jax.Array]:
    """Round what the leaves keep to the state's dtypes; `counts` say which rounding it is.

    Sketches are rounded stochastically, so that they are right on average; leaves that are kept
    dense are cast, as Optax does.
    """
    rounded = [value.astype(dtype) for value, dtype in zip(values, dtypes, strict=True)]
    narrowed = [
        i
        for i, (leaf, value, dtype) in enumerate(zip(leaves, values, dtypes, strict=True))
        if leaf.rank is not None and jnp.promote_types(value.dtype, dtype) != dtype
    ]
    if narrowed:
        # Another label than a projection's: no rounding shares a key with one.
        labels = jnp.array([_leaves.label_words((leaves[i].path, "rounding")) for i in narrowed])
        base = _leaves.fold(key, *counts)
        keys = jax.vmap(lambda words: _leaves.fold_words(base, words))(labels)
        for i, words in zip(narrowed, keys, strict=True):
            rounded[i] = _projection.stochastic_round(values[i], dtypes[i], words)
    return rounded
