"""One leaf: how it is seen as matrices, whether it is compressed, and its keys.

Everything here is decided once, in `plan`, from the shapes of the parameters; what `init`, `update`
and `state_report` know of a leaf they read from its `Leaf`.
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from florax import _checks, _projection

KeyPath: TypeAlias = tuple[Any, ...]
Side = Literal["smaller", "larger"]

SIDES: tuple[Side, ...] = get_args(Side)


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


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is known of one leaf before training: its geometry if compressed, else why it is not.

    Static: it travels with the state as part of its tree structure and holds no array.
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    rank: int | None = None  # None: kept dense
    reason: str = ""  # why it is kept dense
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()  # the axes of the projected side
    batch: tuple[int, ...] = ()
    projection: _projection.Projection = _projection.DEFAULT_PROJECTION

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of what the state keeps: `(*batch, *rows, rank)`, or the leaf's own if dense."""
        if self.rank is None:
            return self.shape
        return (*(self.shape[i] for i in self.batch + self.rows), self.rank)

    def draw(self, key: jax.Array, cycle: jax.typing.ArrayLike) -> jax.Array:
        """The projections of this leaf in a cycle, float32, shape `(*batch, rank, *columns)`.

        See `draw`, which draws those of several leaves together.
        """
        (projection,) = draw((self,), key, cycle)
        assert projection is not None
        return projection

    @property
    def matrices(self) -> int:
        """How many matrices the leaf is a stack of."""
        return math.prod(self.shape[axis] for axis in self.batch)

    def compress(self, grad: jax.Array, projection: jax.Array) -> jax.Array:
        """Sketch a gradient of the leaf's shape: `(*batch, *rows, rank)`, float32 at least."""
        return _projection.compress(grad, projection, self.columns, self.batch)

    def decompress(self, sketch: jax.Array, projection: jax.Array) -> jax.Array:
        """Turn a sketch back into an array of the leaf's shape, float32 at least."""
        matrices = _over_stack(_projection.decompress, len(self.batch))(sketch, projection)
        order = self.batch + self.rows + self.columns
        return matrices.transpose([order.index(axis) for axis in range(len(order))])

    def transfer(self, sketch: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        """Carry a sketch over from the projections `old` to `new`."""
        return _over_stack(_projection.transfer, len(self.batch))(sketch, old, new)


def draw(
    leaves: tuple[Leaf, ...], key: jax.Array, cycle: jax.typing.ArrayLike
) -> list[jax.Array | None]:
    """The projections of all leaves in a cycle; None for those that are kept dense.

    A matrix's projection depends on the base key, the path of its leaf, its index in the stack and
    the cycle, and on nothing else: not on other leaves, the sharding or the number of devices.
    """
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if leaf.rank is not None:
            columns = tuple(leaf.shape[axis] for axis in leaf.columns)
            groups.setdefault((leaf.projection, leaf.rank, columns), []).append(i)

    # One call a group, not one a leaf: a call takes a quarter of a second to compile, and a model
    # whose layers are not stacked has hundreds of leaves. Without the barrier XLA fuses the draw
    # into every slice of it: minutes of compilation on a GPU where it now takes seconds.
    drawn: list[jax.Array | None] = [None] * len(leaves)
    for (projection, rank, columns), members in groups.items():
        labels = [(leaves[i].path, k) for i in members for k in range(leaves[i].matrices)]
        keys = _keys(key, labels, cycle)
        one = functools.partial(_projection.draw, projection, rank=rank, columns=columns)
        together = jax.lax.optimization_barrier(jax.vmap(one)(keys))  # type: ignore[no-untyped-call]
        start = 0
        for i in members:
            leaf, stop = leaves[i], start + leaves[i].matrices
            stack = tuple(leaf.shape[axis] for axis in leaf.batch)
            drawn[i] = together[start:stop].reshape(*stack, rank, *columns)
            start = stop
    return drawn


def round_all(
    leaves: tuple[Leaf, ...],
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
        # No matrix of a stack has the index -1: no rounding shares a key with a projection.
        keys = _keys(key, [(leaves[i].path, -1) for i in narrowed], *counts)
        for i, words in zip(narrowed, keys, strict=True):
            rounded[i] = _projection.stochastic_round(values[i], dtypes[i], words)
    return rounded


def check_settings(rank: Rank, side: Side, projection: _projection.Projection) -> None:
    """Raise, before there are parameters, for what is wrong whatever they are."""
    if isinstance(rank, jax.Array) or _checks.is_int(rank):
        _checks.positive_int("rank", rank, static=True)
    elif isinstance(rank, bool | float | str) or rank is None:
        raise TypeError(
            f"rank must be an int, a function of path and leaf, or a tree of ints, got {rank!r}."
        )
    _checks.one_of("side", side, SIDES)
    _checks.one_of("projection", projection, _projection.PROJECTIONS)


def plan(
    params: Any,
    rank: Rank,
    side: Side,
    projection: _projection.Projection,
    dimension_numbers: DimensionNumbers | None,
) -> tuple[Leaf, ...]:
    """Decide for every leaf of `params`, in flattening order, how it is kept."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    ranks = _resolve("rank", rank, params, flat)
    dimensions = _resolve("dimension_numbers", dimension_numbers, params, flat)
    return tuple(
        _plan_leaf(name(path), leaf, r, side, projection, d)
        for (path, leaf), r, d in zip(flat, ranks, dimensions, strict=True)
    )


def _plan_leaf(
    path: str,
    leaf: Any,
    rank: Any,
    side: Side,
    projection: _projection.Projection,
    dimensions: Any,
) -> Leaf:
    shape, dtype = tuple(leaf.shape), jnp.dtype(leaf.dtype)
    _check_dtype(path, dtype)
    if rank is not None:
        _checks.positive_int(f"rank of {path}", rank, static=True)
        rank = int(rank)
    if dimensions is None and len(shape) == 2:
        dimensions = FloraDimensionNumbers(rows=0, columns=1)
    if dimensions is not None:
        if not isinstance(dimensions, FloraDimensionNumbers):
            raise TypeError(
                f"dimension_numbers of {path} must be a florax.FloraDimensionNumbers or None, "
                f"got {dimensions!r}."
            )
        dimensions = dimensions.normalized(len(shape), path)

    dense = Leaf(path, shape, dtype)
    if rank is None:
        return dataclasses.replace(dense, reason="rank is None")
    if dimensions is None:
        hint = ", no dimension_numbers" if len(shape) > 2 else ""
        return dataclasses.replace(dense, reason=f"{len(shape)}-D{hint}")
    rows, columns = dimensions.rows, dimensions.columns
    n, m = (math.prod(shape[axis] for axis in axes) for axes in (rows, columns))
    if rank >= min(n, m):
        return dataclasses.replace(dense, reason=f"rank {rank} ≥ min({n}, {m})")
    if (n < m) if side == "smaller" else (n > m):
        rows, columns, m = columns, rows, n
    if projection == "cosine" and m > _projection.MAX_COSINE_COLUMNS:
        raise ValueError(
            f"projection='cosine' is exact up to {_projection.MAX_COSINE_COLUMNS} columns, but "
            f"{path} of shape {shape} has {m} on its {side} side. Use projection='gaussian', or "
            "rank=None for this leaf."
        )
    return dataclasses.replace(
        dense,
        rank=rank,
        rows=rows,
        columns=columns,
        batch=dimensions.batch,
        projection=projection,
    )


def match(updates: Any, leaves: tuple[Leaf, ...]) -> tuple[list[jax.Array], Any]:
    """Flatten `updates` after checking that it is a tree of gradients for the planned leaves."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(updates)
    # `flax.nnx.Optimizer` shows `init` its Variables, `update` the arrays that are their `.value`.
    paths = [name(path).removesuffix(".value") for path, _ in flat]
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
        if tuple(grad.shape) != leaf.shape:
            raise ValueError(
                f"The gradient of {leaf.path} has shape {tuple(grad.shape)}, the parameter given "
                f"to init had {leaf.shape}. Pass gradients of the same parameters, or call init "
                "again."
            )
        _check_dtype(leaf.path, grad.dtype)
    return [grad for _, grad in flat], treedef


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
    plan: tuple[Leaf, ...] = dataclasses.field(metadata={"static": True})

    def leaves(self) -> list[jax.Array]:
        """The arrays in the order of `plan`."""
        return jax.tree.leaves(self.arrays)

    def replace(self, leaves: list[jax.Array]) -> "Sketches":
        """The same with other arrays, given in the order of `plan`."""
        return Sketches(jax.tree.unflatten(jax.tree.structure(self.arrays), leaves), self.plan)


def zero_sketches(
    params: Any, leaves: tuple[Leaf, ...], dtype: Callable[[jnp.dtype], jax.typing.DTypeLike]
) -> Sketches:
    """Sketches of zero for planned `params`; `dtype` gives the state's dtype for a parameter's."""
    zeros = [jnp.zeros(leaf.stored_shape, dtype(leaf.dtype)) for leaf in leaves]
    return Sketches(jax.tree.unflatten(jax.tree.structure(params), zeros), leaves)


def is_stand_in(params: Any) -> bool:
    """Whether `params` is the leafless object with which `optax.tree.map_params` calls `init`.

    Optax puts it where a state holds arrays like the parameters. Sketches are not like them, so
    `init` answers with one leaf in their place, which stands for the whole field.
    """
    from_optax = type(params).__module__.partition(".")[0] == optax.__name__
    return from_optax and not isinstance(params, tuple) and not jax.tree.leaves(params)


def base_key(key: Any) -> jax.Array:
    """Raw threefry key data, shape `(2,)`, uint32, from an int or a JAX key of any kind.

    Always a new array: a state that is donated must not take the caller's key along.
    """
    is_array = isinstance(key, jax.Array)
    if _checks.is_int(key) or (
        is_array and not key.shape and jnp.issubdtype(key.dtype, jnp.integer)
    ):
        return jax.random.key_data(jax.random.key(key, impl="threefry2x32"))
    if is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and not key.shape:
        if str(jax.random.key_impl(key)) == "threefry2x32":
            return jnp.array(jax.random.key_data(key), copy=True)
        return jax.random.bits(key, (2,), jnp.uint32)
    if is_array and key.shape == (2,) and key.dtype == jnp.uint32:
        return jnp.array(key, copy=True)
    raise TypeError(f"key must be an int or a JAX PRNG key, got {key!r}. Pass e.g. key=0.")


def attention_and_feed_forward(path: KeyPath, leaf: Any) -> bool:
    """Whether a leaf belongs to an attention or feed-forward layer, by the names in its path.

    The paper's choice of what to compress: embeddings, vocabulary heads, norms and biases stay
    dense. Recognises the usual names (`attn`, `self_attention`, `mlp`, `feed_forward`, `ffn`,
    `DenseReluDense`, `experts`, ...) in the paths of Flax, Equinox and Hugging Face models; check
    with `state_report`. For other names write a function of the same form.

    Args:
      path: key path of the leaf, as `jax.tree_util.tree_map_with_path` gives it.
      leaf: the parameter; not used.

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


def name(path: KeyPath) -> str:
    """The path as users write it, as in `['layers'][0]['kernel']`; `<root>` for a bare array."""
    return jax.tree_util.keystr(path) or "<root>"


def _check_dtype(path: str, dtype: Any) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{path} has dtype {dtype}; only real floating-point leaves can be trained. Leave it "
            "out, for example with optax.masked."
        )


def _resolve(argument: str, spec: Any, params: Any, flat: list[tuple[KeyPath, Any]]) -> list[Any]:
    """One value per leaf from a value, a function of path and leaf, or a (prefix) tree."""
    if callable(spec):
        return [spec(path, leaf) for path, leaf in flat]
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


def _keys(
    key: jax.Array, labels: list[tuple[str, int]], *counts: jax.typing.ArrayLike
) -> jax.Array:
    """A raw threefry key, row by row, for each label: the base key with counts and label folded in.

    A label enters by 64 bits of its digest, the same in every process (Python's own hash is not).
    """
    digests = [hashlib.blake2b(repr(label).encode(), digest_size=8).digest() for label in labels]
    words = jnp.array([np.frombuffer(digest, ">u4").astype(np.uint32) for digest in digests])
    base = jax.random.wrap_key_data(key, impl="threefry2x32")
    for count in counts:
        base = jax.random.fold_in(base, count)

    def fold(words: jax.Array) -> jax.Array:
        folded = jax.random.fold_in(jax.random.fold_in(base, words[0]), words[1])
        return jax.random.key_data(folded)

    return jax.vmap(fold)(words)


def _over_stack(function: Callable[..., jax.Array], depth: int) -> Callable[..., jax.Array]:
    for _ in range(depth):
        function = jax.vmap(function)
    return function
