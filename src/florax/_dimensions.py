"""What users say of leaves: dimension numbers, one value per leaf, and which layers to compress."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from florax import _checks

KeyPath: TypeAlias = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class FloraDimensionNumbers:
    """Which axes of a leaf are the rows, the columns and the stack of its matrices.

    A leaf is seen as a stack, over the `batch` axes, of matrices of shape `(rows, columns)`. Every
    axis is named once. Each matrix of the stack has a projection of its own.

    Args:
      rows: axes of the matrix's rows, an int or a tuple of ints; negative axes count from the end.
      columns: axes of the matrix's columns.
      batch: axes of independent matrices: scanned layers, experts, positions of a kernel.

    Raises:
      TypeError: an axis is not an int.
      ValueError: no rows, no columns, or an axis that is named twice.

    >>> import florax
    >>> florax.FloraDimensionNumbers(rows=0, columns=(1, 2))  # (embed, heads, head_dim)
    FloraDimensionNumbers(rows=(0,), columns=(1, 2), batch=())
    >>> florax.FloraDimensionNumbers(rows=(1,), columns=(2,), batch=(0,))  # (layers, n, m)
    FloraDimensionNumbers(rows=(1,), columns=(2,), batch=(0,))
    """

    rows: tuple[int, ...] | int
    columns: tuple[int, ...] | int
    batch: tuple[int, ...] | int = ()

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "batch"):
            axes = getattr(self, name)
            axes = (axes,) if _checks.is_int(axes) else axes
            if not isinstance(axes, tuple | list) or not all(map(_checks.is_int, axes)):
                raise TypeError(f"{name} must be a tuple of axes (ints), got {axes!r}.")
            if not axes and name != "batch":
                raise ValueError(f"{name} must name at least one axis, got {axes!r}.")
            object.__setattr__(self, name, tuple(map(int, axes)))

    def normalized(self, ndim: int, path: str) -> "FloraDimensionNumbers":
        """The same with axes counted from the front, checked against a leaf of `ndim` axes."""
        groups: list[tuple[int, ...]] = []
        for name in ("rows", "columns", "batch"):
            axes: tuple[int, ...] = getattr(self, name)
            for axis in axes:
                if not -ndim <= axis < ndim:
                    raise ValueError(
                        f"dimension_numbers of {path}: axis {axis} in {name}={axes} is out of "
                        f"range for a leaf of {ndim} axes. Use axes from {-ndim} to {ndim - 1}."
                    )
            groups.append(tuple(sorted(axis % ndim for axis in axes)))
        named = [axis for group in groups for axis in group]
        for axis in range(ndim):
            if named.count(axis) != 1:
                problem = "named more than once" if axis in named else "missing"
                raise ValueError(
                    f"dimension_numbers of {path}: axis {axis} is {problem} in {self}. Name each "
                    f"of the {ndim} axes once, as rows, columns or batch."
                )
        return FloraDimensionNumbers(*groups)


Rank: TypeAlias = int | Callable[[KeyPath, Any], int | None] | Any
DimensionNumbers: TypeAlias = Callable[[KeyPath, Any], FloraDimensionNumbers | None] | Any


def is_function(spec: Any) -> bool:
    """Whether a specification is a function of path and leaf; a tree may be callable too."""
    return callable(spec) and jax.tree_util.treedef_is_leaf(jax.tree.structure(spec))


def resolve(argument: str, spec: Any, params: Any) -> list[Any]:
    """One value per leaf from a value, a (prefix) tree, or a function of path and leaf."""
    if is_function(spec):
        return [spec(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    values: list[Any] = []
    try:
        jax.tree.map(
            lambda value, subtree: values.extend([value] * len(jax.tree.leaves(subtree))),
            spec,
            params,
            is_leaf=lambda node: node is None,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{argument} is a tree that does not match the parameters: {error}"
        ) from error
    return values


def name(path: KeyPath) -> str:
    """The path as users write it, as in `['layers'][0]['kernel']`; `<root>` for a bare array.

    A box around the leaf (`flax.nnx.Variable`, `flax.linen.Partitioned`) is no part of it. Written
    by florax, not by `jax.tree_util.keystr`: projections are drawn from it.
    """
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return "".join(map(_step, path)) or "<root>"


def names(tree: Any) -> list[str]:
    """The names of the leaves of a tree."""
    return [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _step(key: Any) -> str:
    if hasattr(key, "name"):
        return f".{key.name}"
    return f"[{key.idx if hasattr(key, 'idx') else key.key!r}]"


def attention_and_feed_forward(path: KeyPath, leaf: Any) -> bool:
    """Whether a leaf belongs to an attention or feed-forward layer, by the names in its path.

    The paper's choice of what to compress: embeddings, vocabulary heads, norms and biases stay
    dense. Recognises the usual names (`attn`, `self_attention`, `mlp`, `feed_forward`, `ffn`,
    `DenseReluDense`, `experts`, ...) in the paths of Flax, Equinox and Hugging Face models; check
    with `state_report`. For other names write a function of the same form.

    Args:
      path: key path of the leaf, as `jax.tree_util.tree_map_with_path` gives it.
      leaf: the parameter; not used.

    Returns:
      True or False.

    >>> import florax, jax, jax.numpy as jnp
    >>> w = jnp.zeros((8, 8))
    >>> params = {"wte": w, "h": [{"attn": {"c_attn": w}, "mlp": {"c_fc": w}}]}
    >>> def rank(path, leaf):
    ...     return 2 if florax.attention_and_feed_forward(path, leaf) else None
    >>> jax.tree_util.tree_map_with_path(rank, params)
    {'h': [{'attn': {'c_attn': 2}, 'mlp': {'c_fc': 2}}], 'wte': None}
    """
    del leaf
    text = jax.tree_util.keystr(path, simple=True, separator="/").lower()
    return not _OTHER_LAYERS.search(text) and bool(_ATTENTION_AND_FEED_FORWARD.search(text))


_OTHER_LAYERS = re.compile(r"embed|norm|bias|lm_head")
_ATTENTION_AND_FEED_FORWARD = re.compile(
    r"attn|attention|mlp|ffn|feed_?forward|densereludense|experts?\b|intermediate"
    r"|layer[/.]\d+[/.]output[/.]dense"  # feed-forward, in Hugging Face's ViT and BERT
)
