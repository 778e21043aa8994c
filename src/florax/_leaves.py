"""One leaf: how it is seen as matrices and whether it is compressed, decided once, in `Plan`.

What `init`, `update` and `state_report` know of a leaf they read from its `Leaf`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from florax import _checks, _dimensions, _meshes, _projection, _stored

Side = Literal["smaller", "larger", "both"]

_SUFFIX = " across"  # of the name of a sketch beside another
SIDES: tuple[Side, ...] = get_args(Side)


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
    projection: _projection.Projection = "gaussian"
    # Where both sides are projected: the sketch of the rows beside that of the columns, as a leaf.
    across: "Leaf | None" = None
    is_across: bool = False

    @property
    def parts(self) -> tuple["Leaf", ...]:
        """A leaf for each of its sketches; itself if it has one, or is kept dense."""
        if self.across is None:
            return (self,)
        return (dataclasses.replace(self, across=None), self.across)

    @property
    def of(self) -> str:
        """The name of the leaf that it is, or is a part of."""
        return self.path.removesuffix(_SUFFIX) if self.is_across else self.path

    @property
    def side(self) -> int:
        """Size of the projected side."""
        return math.prod(self.shape[axis] for axis in self.columns)

    @property
    def projected(self) -> tuple[int, int] | None:
        """Rank of its sketch and size of the projected side; None if it is kept dense."""
        return None if self.rank is None else (self.rank, self.side)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of what the state keeps: `(*batch, *rows, rank)`, or the leaf's own if dense."""
        if self.rank is None:
            return self.shape
        return (*(self.shape[i] for i in self.batch + self.rows), self.rank)

    @property
    def kept_axes(self) -> tuple[int | None, ...]:
        """Which axes of the leaf those of what is kept are; None for the rank."""
        dense = tuple(range(len(self.shape)))
        return dense if self.rank is None else (*self.batch, *self.rows, None)

    @property
    def geometry(self) -> tuple[Any, ...]:
        """What decides how its sketch is read."""
        own = (self.shape, self.rank, self.rows, self.columns, self.batch, self.projection)
        return own if self.across is None else (*own, self.across.rank)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.shape[axis] for axis in self.batch)

    @property
    def matrices(self) -> int:
        """How many matrices the leaf is a stack of."""
        return math.prod(self.stack_shape)

    @property
    def drawn_like(self) -> tuple[Any, ...]:
        """Leaves for which this is the same have their projections drawn by the same program."""
        return (self.projection, self.rank, tuple(self.shape[axis] for axis in self.columns))

    @property
    def projection_bytes(self) -> int:
        """Size of its projections, float32."""
        assert self.rank is not None
        return 4 * self.matrices * self.rank * self.side

    def layer(self, axis: int) -> "Leaf":
        """One layer of a stack along that axis: as a leaf of its own.

        Its projections are those of the stack with the layer's number folded into the key.
        """
        rows, columns, batch = (
            tuple(own - (own > axis) for own in axes if own != axis)
            for axes in (self.rows, self.columns, self.batch)
        )
        shape = self.shape[:axis] + self.shape[axis + 1 :]
        across = self.across and self.across.layer(axis)
        return dataclasses.replace(
            self, shape=shape, rows=rows, columns=columns, batch=batch, across=across
        )

    def draw_matrix(self, seed: jax.Array) -> jax.Array:
        """The projection of one matrix, `(rank, *columns)`, from its key or seed (`_keys`)."""
        assert self.rank is not None
        columns = tuple(self.shape[axis] for axis in self.columns)
        drawn: jax.Array = _projection.draw(self.projection, seed, self.rank, columns)
        return drawn

    def seed_matrix(self, key: jax.Array) -> jax.Array:
        """The key of one matrix, with what is slow to draw of its projection (`_projection`)."""
        assert self.rank is not None
        return _projection.seed(self.projection, key, self.rank, self.side)

    def compress(self, grad: jax.Array, projection: jax.Array) -> jax.Array:
        """Sketch a gradient of the leaf's shape: `(*batch, *rows, rank)`, float32 at least."""
        stack, rows, columns = (
            _meshes.division(grad, own) for own in (self.batch, self.rows, self.columns)
        )
        # Divided along the axes that are summed over, as the gradient is, so that the sketch is
        # what is summed over devices; else XLA may bring the whole gradient together.
        projection = _meshes.divide(projection, (*stack, None, *columns))
        sharding = _meshes.spec((*stack, *rows, None)) if _meshes.is_explicit(grad) else None
        return _projection.compress(grad, projection, self.columns, self.batch, sharding)

    def decompress(
        self, sketch: jax.Array, projection: jax.Array, like: jax.Array | None = None
    ) -> jax.Array:
        """Turn a sketch back into an array of the leaf's shape, float32 at least.

        On a mesh with explicit axes it is divided as `like`, the leaf or its gradient, is.
        """
        if isinstance(like, jax.Array):  # not of what was born compressed, without parameters
            stack, columns = (_meshes.division(like, own) for own in (self.batch, self.columns))
            projection = _meshes.divide(projection, (*stack, None, *columns))
        columns_first = self.columns < self.rows
        own = functools.partial(_projection.decompress, columns_first=columns_first)
        matrices = _over_stack(own, len(self.batch))(sketch, projection)
        sides = (self.columns, self.rows) if columns_first else (self.rows, self.columns)
        order = self.batch + sides[0] + sides[1]
        return matrices.transpose([order.index(axis) for axis in range(len(order))])

    def reconstruct(
        self,
        sketch: jax.Array,
        solved: tuple[jax.Array, jax.Array],
        across: jax.Array,
        like: jax.Array | None = None,
    ) -> jax.Array:
        """As `decompress`, of two sketches: `across` is B, and `solved` are those of `_projection`.

        G = [C, Bᵀ] [top; bottom].
        """
        stack, last = len(self.batch), len(self.batch) + len(self.rows)
        across = jnp.moveaxis(across, stack, last)
        across = _meshes.divide(across, _meshes.division(sketch, range(last)))
        wide = jnp.concatenate([sketch.astype(across.dtype), across], axis=-1)
        return self.decompress(wide, jnp.concatenate(solved, axis=stack), like)

    def transfer(self, sketch: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        """Carry a sketch over from the projections `old` to `new`."""
        stack = _meshes.division(sketch, range(len(self.batch)))
        old, new = _meshes.divide(old, stack), _meshes.divide(new, stack)
        return _over_stack(_projection.transfer, len(self.batch))(sketch, old, new)

    def zeros(self, like: jax.Array, dtype: jax.typing.DTypeLike) -> _stored.Stored:
        """A sketch of zero, or zeros if dense, for the leaf or gradient `like`."""
        kept = tuple(axis for axis in self.kept_axes if axis is not None)
        return _stored.zeros(self.stored_shape, dtype, like, kept)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The settings of a transformation from which it is decided how every leaf is kept."""

    rank: _dimensions.Rank
    side: Side
    projection: _projection.Projection
    dimension_numbers: _dimensions.DimensionNumbers | None

    def __post_init__(self) -> None:
        """Raise, before there are parameters, for what is wrong whatever they are."""
        rank = self.rank
        if isinstance(rank, jax.Array) or _checks.is_int(rank):
            _checks.positive_int("rank", rank, static=True)
        elif isinstance(rank, bool | float | str) or rank is None:
            raise TypeError(
                "rank must be an int, a function of path and leaf, or a tree of ints, got "
                f"{rank!r}."
            )
        _checks.one_of("side", self.side, SIDES)
        _checks.one_of("projection", self.projection, _projection.PROJECTIONS)
        if self.side == "both" and self.projection != "cosine":
            raise ValueError(
                "side='both' needs projections with orthonormal rows, got projection="
                f"{self.projection!r}. Pass projection='cosine'."
            )

    @property
    def said(self) -> tuple[Any, ...]:
        """What can be compared of the settings: functions and trees are not."""
        return (self.side, self.projection, self.rank if _checks.is_int(self.rank) else None)

    def __call__(
        self, params: Any, stacks: Mapping[str, int] = MappingProxyType({})
    ) -> tuple[Leaf, ...]:
        """Decide for every leaf of `params`, in flattening order, how it is kept.

        `stacks` names the leaves that are stacks of layers, and the axis of these.
        """
        flat = jax.tree_util.tree_leaves_with_path(params)
        names = [_dimensions.name(path) for path, _ in flat]
        ranks = _dimensions.resolve("rank", self.rank, params)
        dimensions = _dimensions.resolve("dimension_numbers", self.dimension_numbers, params)
        return tuple(
            self._leaf(name, leaf, r, d, stacks.get(name))
            for name, (_, leaf), r, d in zip(names, flat, ranks, dimensions, strict=True)
        )

    def _leaf(self, path: str, leaf: Any, rank: Any, dimensions: Any, axis: int | None) -> Leaf:
        shape, dtype = shape_and_dtype(path, leaf)
        check_dtype(path, dtype)
        batch = () if axis is None else (axis,)
        if dimensions is None and len(shape) == 2 + len(batch):
            rows, columns = (own for own in range(len(shape)) if own != axis)
            dimensions = _dimensions.FloraDimensionNumbers(rows, columns, batch)
        if dimensions is not None:
            if not isinstance(dimensions, _dimensions.FloraDimensionNumbers):
                raise TypeError(
                    f"dimension_numbers of {path} must be a florax.FloraDimensionNumbers or None, "
                    f"got {dimensions!r}."
                )
            dimensions = dimensions.normalized(len(shape), path)

        dense = Leaf(path, shape, dtype)
        if rank is None:
            return dataclasses.replace(dense, reason="rank is None")
        if dimensions is None:  # a rank, too, is of matrices only
            ndim = len(shape) - len(batch)
            hint = ", no dimension_numbers" if ndim > 2 else ""
            return dataclasses.replace(dense, reason=f"{ndim}-D{hint}")
        _checks.positive_int(f"rank of {path}", rank, static=True)
        if not {*batch} <= {*dimensions.batch}:
            raise ValueError(
                f"per_layer takes {path} for a stack of layers along axis {axis}, "
                f"dimension_numbers do not: {dimensions}. Name axis {axis} as batch."
            )
        # The layers first: then layer i has the keys of the stack with i folded in (`_keys`).
        batch += tuple(own for own in dimensions.batch if own != axis)
        rows, columns = dimensions.rows, dimensions.columns
        n, m = (math.prod(shape[axis] for axis in axes) for axes in (rows, columns))
        if rank >= min(n, m):
            return dataclasses.replace(dense, reason=f"rank {rank} ≥ min({n}, {m})")
        if (n > m) if self.side == "larger" else (n < m):
            rows, columns = columns, rows
        compressed = dataclasses.replace(
            dense,
            rank=int(rank),
            rows=rows,
            columns=columns,
            batch=batch,
            projection=self.projection,
        )
        if self.side == "both":
            compressed = _paired(compressed)
        for part in compressed.parts:
            if self.projection == "cosine" and part.side > _projection.MAX_COSINE_COLUMNS:
                own = "smaller" if part.side == min(n, m) else "larger"
                also = "side='smaller' and " if self.side == "both" else ""
                raise ValueError(
                    "projection='cosine' is exact up to "
                    f"{_projection.MAX_COSINE_COLUMNS} columns, but {path} of shape {shape} has "
                    f"{part.side} on its {own} side. Use {also}projection='gaussian', or "
                    "rank=None for this leaf."
                )
        return compressed


def _paired(leaf: Leaf) -> Leaf:
    """A leaf of n × m, n at least m, with two sketches in the place of one of its rank.

    Up to two fifths of the entries are those of C: the wider it is, the better the guess, and the
    wider the other sketch, the less noise in what is added to the guess. At a half both sketches of
    a square would be as wide, and nothing left to tell how far the guess is off. Its rank is in
    multiples of the power of two of which the leaf's has eight to fifteen: accelerators multiply in
    tiles, and a part of one takes the time of all of it.
    """
    assert leaf.rank is not None
    unit = 2 ** max(0, leaf.rank.bit_length() - 4)
    first = 2 * leaf.rank // (5 * unit) * unit
    if first < 1:
        raise ValueError(
            f"side='both' keeps two sketches in the place of one of rank {leaf.rank}, too small a "
            f"rank for {leaf.path}. Pass rank=3 or more, or side='smaller'."
        )
    across = dataclasses.replace(
        leaf,
        path=leaf.path + _SUFFIX,
        rank=(leaf.rank - first) * math.prod(leaf.shape[i] for i in leaf.rows) // leaf.side,
        rows=leaf.columns,
        columns=leaf.rows,
        is_across=True,
    )
    return dataclasses.replace(leaf, rank=first, across=across)


def shape_and_dtype(path: str, leaf: Any) -> tuple[tuple[int, ...], jnp.dtype]:
    """Of an array, a shape or a number."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return tuple(leaf.shape), jnp.dtype(leaf.dtype)
    if isinstance(leaf, bool | int | float | complex):
        return (), jnp.dtype(jnp.result_type(leaf))
    raise TypeError(
        f"{path} is no array but a {type(leaf).__name__}, {leaf!r}. Pass the arrays of a model "
        "only: of an Equinox module eqx.filter(model, eqx.is_inexact_array), of a flax.nnx one "
        "nnx.state(model, nnx.Param)."
    )


def check_dtype(path: str, dtype: Any) -> None:
    """Raise unless a leaf of that dtype can be trained."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{path} has dtype {dtype}; only real floating-point leaves can be trained. Leave it "
            "out of what the transformation sees, for example with optax.masked."
        )


def _over_stack(function: Callable[..., jax.Array], depth: int) -> Callable[..., jax.Array]:
    for _ in range(depth):
        function = jax.vmap(function)
    return function
