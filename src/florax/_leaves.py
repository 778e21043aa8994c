"""One leaf: how it is seen as matrices, whether it is compressed, and its keys.

Everything here is decided once, in `plan`, from the shapes of the parameters; what `init`, `update`
and `state_report` know of a leaf they read from its `Leaf`.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from florax import _checks, _meshes, _projection

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

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.shape[axis] for axis in self.batch)

    @property
    def matrices(self) -> int:
        """How many matrices the leaf is a stack of."""
        return math.prod(self.stack_shape)

    def layer(self) -> "Leaf":
        """One layer of a stack along the first axis: as a leaf of its own.

        Its projections are those of the stack with the layer's number folded into the key.
        """
        rows, columns, batch = (
            tuple(axis - 1 for axis in axes if axis)
            for axes in (self.rows, self.columns, self.batch)
        )
        return dataclasses.replace(
            self, shape=self.shape[1:], rows=rows, columns=columns, batch=batch
        )

    def draw(self, key: jax.Array, cycle: jax.typing.ArrayLike) -> jax.Array:
        """The projections of this leaf in a cycle, float32, shape `(*batch, rank, *columns)`.

        See `draw`, which draws those of several leaves together.
        """
        (projection,) = draw((self,), key, cycle)
        assert projection is not None
        return projection

    def draw_matrix(self, key: jax.Array) -> jax.Array:
        """The projection of one matrix, shape `(rank, *columns)`, from its key (`matrix_keys`)."""
        assert self.rank is not None
        columns = tuple(self.shape[axis] for axis in self.columns)
        drawn: jax.Array = _projection.draw(self.projection, key, self.rank, columns)
        return drawn

    def compress(self, grad: jax.Array, projection: jax.Array) -> jax.Array:
        """Sketch a gradient of the leaf's shape: `(*batch, *rows, rank)`, float32 at least."""
        projection = _meshes.divide(projection, _meshes.division(grad, self.batch))
        return _projection.compress(grad, projection, self.columns, self.batch)

    def decompress(
        self, sketch: jax.Array, projection: jax.Array, like: jax.Array | None = None
    ) -> jax.Array:
        """Turn a sketch back into an array of the leaf's shape, float32 at least.

        On a mesh with explicit axes it is divided as `like`, the leaf or its gradient, is.
        """
        if like is not None:
            stack, columns = (_meshes.division(like, own) for own in (self.batch, self.columns))
            projection = _meshes.divide(projection, (*stack, None, *columns))
        matrices = _over_stack(_projection.decompress, len(self.batch))(sketch, projection)
        order = self.batch + self.rows + self.columns
        return matrices.transpose([order.index(axis) for axis in range(len(order))])

    def transfer(self, sketch: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        """Carry a sketch over from the projections `old` to `new`."""
        stack = _meshes.division(sketch, range(len(self.batch)))
        old, new = _meshes.divide(old, stack), _meshes.divide(new, stack)
        return _over_stack(_projection.transfer, len(self.batch))(sketch, old, new)

    def zeros(self, like: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """A sketch of zero, or zeros if dense, for the leaf or gradient `like`."""
        dense = tuple(range(len(self.shape)))
        kept = dense if self.rank is None else self.batch + self.rows
        zeros = jnp.zeros(self.stored_shape, dtype)
        return _meshes.divide(_meshes.varying_as(zeros, like), _meshes.division(like, kept))


def draw(
    leaves: tuple[Leaf, ...], key: jax.Array, cycle: jax.typing.ArrayLike
) -> list[jax.Array | None]:
    """The projections of all leaves in a cycle; None for those that are kept dense.

    A matrix's projection depends on the base key, the path of its leaf, its index in the stack and
    the cycle, and on nothing else: not on other leaves, the sharding or the number of devices.
    """
    return draw_from(leaves, matrix_keys(leaves, key, cycle))


def draw_from(leaves: tuple[Leaf, ...], keys: list[jax.Array]) -> list[jax.Array | None]:
    """The same from the keys of the leaves' matrices."""
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if leaf.rank is not None:
            columns = tuple(leaf.shape[axis] for axis in leaf.columns)
            groups.setdefault((leaf.projection, leaf.rank, columns), []).append(i)

    # One call a group, not one a leaf: a call takes a quarter of a second to compile, and a model
    # whose layers are not stacked has hundreds of leaves. Without the barrier XLA fuses the draw
    # into every slice of it: minutes of compilation on a GPU where it now takes seconds.
    drawn: list[jax.Array | None] = [None] * len(leaves)
    for (_, rank, columns), members in groups.items():
        stacked = jnp.concatenate([keys[i] for i in members])
        matrices = jax.vmap(leaves[members[0]].draw_matrix)(stacked)
        matrices = jax.lax.optimization_barrier(matrices)  # type: ignore[no-untyped-call]
        start = 0
        for i in members:
            stop = start + leaves[i].matrices
            drawn[i] = matrices[start:stop].reshape(*leaves[i].stack_shape, rank, *columns)
            start = stop
    return drawn


def matrix_keys(
    leaves: tuple[Leaf, ...], key: jax.Array, cycle: jax.typing.ArrayLike
) -> list[jax.Array]:
    """Per leaf the keys of its matrices in a cycle, shape `(matrices, 2)`, uint32.

    The base key with the index in the stack, the cycle and the path folded in, in this order. So
    layer i of a stack is a leaf of its own with the base key `fold(key, i)`.
    """
    if not leaves:
        return []
    stacks: dict[tuple[int, ...], jax.Array] = {}
    for leaf in leaves:
        if leaf.stack_shape not in stacks:
            stacks[leaf.stack_shape] = _stack_keys(key, leaf.stack_shape)
    keys = jnp.concatenate([stacks[leaf.stack_shape] for leaf in leaves])
    words = np.concatenate([[label_words(leaf.path)] * leaf.matrices for leaf in leaves])
    # All together: folding is a handful of tiny kernels, and a model has hundreds of matrices.
    keys = jax.vmap(lambda key, words: fold_words(fold(key, cycle), words))(
        keys, jnp.asarray(words)
    )
    bounds = np.cumsum([leaf.matrices for leaf in leaves])[:-1]
    split: list[jax.Array] = jnp.split(keys, bounds)
    return split


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
    stacked: Sequence[bool] | None = None,
) -> tuple[Leaf, ...]:
    """Decide for every leaf of `params`, in flattening order, how it is kept.

    `stacked` says which leaves are stacks of layers along their first axis.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    ranks = resolve("rank", rank, params, flat)
    dimensions = resolve("dimension_numbers", dimension_numbers, params, flat)
    return tuple(
        _plan_leaf(name(path), leaf, r, side, projection, d, is_stack)
        for (path, leaf), r, d, is_stack in zip(
            flat, ranks, dimensions, stacked or [False] * len(flat), strict=True
        )
    )


def _plan_leaf(
    path: str,
    leaf: Any,
    rank: Any,
    side: Side,
    projection: _projection.Projection,
    dimensions: Any,
    is_stack: bool,
) -> Leaf:
    shape, dtype = tuple(leaf.shape), jnp.dtype(leaf.dtype)
    check_dtype(path, dtype)
    if rank is not None:
        _checks.positive_int(f"rank of {path}", rank, static=True)
        rank = int(rank)
    if dimensions is None and len(shape) == 2 + is_stack:
        batch = (0,) if is_stack else ()
        dimensions = FloraDimensionNumbers(rows=-2, columns=-1, batch=batch)
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
        ndim = len(shape) - is_stack
        hint = ", no dimension_numbers" if ndim > 2 else ""
        return dataclasses.replace(dense, reason=f"{ndim}-D{hint}")
    if is_stack and 0 not in dimensions.batch:
        raise ValueError(
            f"per_layer takes {path} for a stack of layers, dimension_numbers do not: {dimensions}."
            " Name axis 0 as batch."
        )
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


def check_dtype(path: str, dtype: Any) -> None:
    """Raise unless a leaf of that dtype can be trained."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{path} has dtype {dtype}; only real floating-point leaves can be trained. Leave it "
            "out, for example with optax.masked."
        )


def resolve(argument: str, spec: Any, params: Any, flat: list[tuple[KeyPath, Any]]) -> list[Any]:
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


def label_words(label: Any) -> np.ndarray:
    """64 bits of a label's digest as two words, the same in every process (`hash` is not)."""
    digest = hashlib.blake2b(repr(label).encode(), digest_size=8).digest()
    return np.frombuffer(digest, ">u4").astype(np.uint32)


def fold(key: jax.Array, *data: jax.typing.ArrayLike) -> jax.Array:
    """Fold integers into a raw threefry key, one after the other."""
    for number in data:
        key = fold_words(key, jnp.stack([jnp.uint32(0), jnp.asarray(number).astype(jnp.uint32)]))
    return key


def fold_words(key: jax.Array, words: jax.Array) -> jax.Array:
    """Fold two words into a raw threefry key: it is their cipher."""
    folded: jax.Array = threefry_2x32(key, words)
    return folded


def _stack_keys(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The keys of a stack of that shape, row by row, shape `(matrices, 2)`."""
    keys = key[None]
    for size in shape:
        indices = jnp.arange(size, dtype=jnp.uint32)
        keys = jax.vmap(lambda k, i=indices: jax.vmap(fold, (None, 0))(k, i))(keys).reshape(-1, 2)
    return keys


def _over_stack(function: Callable[..., jax.Array], depth: int) -> Callable[..., jax.Array]:
    for _ in range(depth):
        function = jax.vmap(function)
    return function
