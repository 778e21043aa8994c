"""A weight as a traced program sees it, and the backward pass that leaves its gradient a sketch.

A program uses a weight transposed, reshaped, cast, a layer at a time. A `View` follows it through
these and knows, for every axis of what it has become, which axis of the sketch or of the projection
it is. When a product consumes the view, `record` makes the product's backward pass add the sketch

    C += xᵀ (dy Aᵀ)        or, where the projected side is the contracted one,   C += (x Aᵀ)ᵀ dy,

in place of dW = xᵀ dy: fewer operations, and no array of the weight's size.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from florax import _leaves, _meshes, _projection


class Opaque(Exception):
    """A view cannot be followed through an operation; the weight then keeps its dense gradient."""


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step from a weight's whole sketch to the part that a view stands for.

    `axes` is the new shape of a "reshape", the axis of an "index", the starts and limits of a
    "slice".
    """

    kind: str
    axes: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Part:
    """The part of a sketch, or of a projection's columns, that a view stands for; static.

    Attributes:
      axes: per axis of the view the axis of the part that it is; None if it is none of the part's.
      shape: of the part; of a sketch, the rank last.
      steps: from the whole to the part.
    """

    axes: tuple[int | None, ...]
    shape: tuple[int, ...]
    steps: tuple[_Step, ...] = ()

    def order(self) -> list[int]:
        """The view's axes in the order of the part's."""
        named = {part: axis for axis, part in enumerate(self.axes) if part is not None}
        return [named[part] for part in sorted(named)]

    def transpose(self, permutation: Sequence[int]) -> "_Part":
        return dataclasses.replace(self, axes=tuple(self.axes[axis] for axis in permutation))

    def index(self, axis: int) -> "_Part":
        position = self.axes[axis]
        assert position is not None
        axes = [a if a is None or a < position else a - 1 for a in _without(self.axes, axis)]
        step = _Step("index", (position,))
        return _Part(tuple(axes), _without(self.shape, position), (*self.steps, step))

    def slice(self, cut: dict[int, tuple[int, int]]) -> "_Part":
        own = {self.axes[axis]: bounds for axis, bounds in cut.items()}
        own.pop(None, None)
        if not own:
            return self
        bounds = [own.get(axis, (0, size)) for axis, size in enumerate(self.shape)]
        first, last = zip(*bounds, strict=True)
        shape = tuple(b - a for a, b in bounds)
        return _Part(self.axes, shape, (*self.steps, _Step("slice", (first, last))))

    def reshape(self, groups: list[tuple[list[int], list[int]]], shape: Sequence[int]) -> "_Part":
        pieces: list[tuple[int, ...]] = [(size,) for size in self.shape]
        placed = []
        for old, new in groups:
            own = [self.axes[axis] for axis in old]
            first = own[0]
            if own == [None] * len(own):
                continue
            if first is None or own != list(range(first, first + len(own))):
                raise Opaque("merges rows with columns")
            rest = [()] * (len(own) - 1)
            pieces[first : first + len(own)] = [tuple(shape[axis] for axis in new), *rest]
            placed.append((first, new))
        axes: list[int | None] = [None] * len(shape)
        for first, new in placed:
            start = sum(map(len, pieces[:first]))
            for offset, axis in enumerate(new):
                axes[axis] = start + offset
        new_shape = sum(pieces, ())
        steps = self.steps
        if new_shape != self.shape:
            steps = (*steps, _Step("reshape", new_shape))
        return _Part(tuple(axes), new_shape, steps)


@dataclasses.dataclass(frozen=True)
class View:
    """How a weight is seen; static.

    An axis of size 1 that the program added is neither the sketch's nor the columns'.

    Attributes:
      leaf: the weight's leaf.
      shape: of what the weight has become.
      sketch: the part of the sketch that the view stands for.
      columns: the part of the projection's columns that the view stands for.
      batch: the axes of it that are still stacked, in the order of the leaf's batch axes.
      first_key: the row of the source's keys with which those of the view begin.
    """

    leaf: _leaves.Leaf
    shape: tuple[int, ...]
    sketch: _Part
    columns: _Part
    batch: tuple[int, ...]
    first_key: int = 0

    @classmethod
    def of(cls, leaf: _leaves.Leaf) -> "View":
        """The weight itself."""
        axes = range(len(leaf.shape))
        kept = tuple(axes) if leaf.rank is None else leaf.batch + leaf.rows

        def part(own: tuple[int, ...], shape: tuple[int, ...]) -> _Part:
            return _Part(tuple(own.index(a) if a in own else None for a in axes), shape)

        columns = part(leaf.columns, tuple(leaf.shape[axis] for axis in leaf.columns))
        return cls(leaf, leaf.shape, part(kept, leaf.stored_shape), columns, leaf.batch)

    def transpose(self, permutation: Sequence[int]) -> "View":
        """With its axes in another order: only the names of axes change, no array does."""
        return dataclasses.replace(
            self,
            shape=tuple(self.shape[axis] for axis in permutation),
            sketch=self.sketch.transpose(permutation),
            columns=self.columns.transpose(permutation),
            batch=tuple(list(permutation).index(axis) for axis in self.batch),
        )

    def index(self, axis: int) -> "View":
        """One position along a batch axis; which one, and its keys, are in its `Source`."""
        if not self.batch or axis != self.batch[0]:
            raise Opaque("takes single positions of an axis that is no batch axis")
        return dataclasses.replace(
            self,
            shape=_without(self.shape, axis),
            sketch=self.sketch.index(axis),
            columns=dataclasses.replace(self.columns, axes=_without(self.columns.axes, axis)),
            batch=tuple(a if a < axis else a - 1 for a in self.batch[1:]),
        )

    def slice(self, starts: Sequence[int], limits: Sequence[int]) -> "View":
        """A block of it."""
        bounds = list(zip(starts, limits, strict=True))
        cut = {a: b for a, b in enumerate(bounds) if b != (0, self.shape[a])}
        if any(axis in self.batch for axis in cut):
            raise Opaque("takes a part of a stack")
        return dataclasses.replace(
            self,
            shape=tuple(limit - start for start, limit in bounds),
            sketch=self.sketch.slice(cut),
            columns=self.columns.slice(cut),
        )

    def reshape(self, shape: Sequence[int]) -> "View":
        """With axes merged or split; rows with rows and columns with columns only."""
        groups = _groups(self.shape, tuple(shape))
        batch: dict[int, int] = {}
        for old, new in groups:
            if any(axis in self.batch for axis in old):
                if len(old) != 1 or len(new) != 1:
                    raise Opaque("merges or splits a batch axis")
                batch[old[0]] = new[0]
        if len(batch) != len(self.batch):
            raise Opaque("drops a batch axis")
        return dataclasses.replace(
            self,
            shape=tuple(shape),
            sketch=self.sketch.reshape(groups, shape),
            columns=self.columns.reshape(groups, shape),
            batch=tuple(batch[axis] for axis in self.batch),
        )

    def draw(self, keys: jax.Array) -> jax.Array:
        """The projections as the view sees them, `(*batch, rank, *columns)`, float32.

        `keys` are a `Source`'s.
        """
        stack = tuple(self.shape[axis] for axis in self.batch)
        keys = keys[self.first_key : self.first_key + math.prod(stack)].reshape(*stack, 2)
        draw = self.leaf.draw_matrix
        for _ in stack:
            draw = jax.vmap(draw)
        drawn = draw(keys)
        lead = drawn.shape[: drawn.ndim - len(self.leaf.columns)]
        for step in self.columns.steps:
            if step.kind == "reshape":
                drawn = drawn.reshape(*lead, *step.axes)
            else:
                first, last = step.axes
                drawn = jax.lax.slice(drawn, (0,) * len(lead) + first, lead + last)
        return drawn

    def add(self, total: jax.Array, sketch: jax.Array, positions: Sequence[jax.Array]) -> jax.Array:
        """Add a sketch of the view's part to the whole; `positions` are the indices taken."""
        return _add(total, sketch, self.sketch.steps, tuple(positions))


def _add(
    total: jax.Array, part: jax.Array, steps: tuple[_Step, ...], positions: tuple[jax.Array, ...]
) -> jax.Array:
    # Read, add, write back: inside a loop the whole is then updated in place, a part at a time.
    if not steps:
        part = part.reshape(total.shape).astype(total.dtype)
        return total + _meshes.divide_as(part, total)
    step, steps = steps[0], steps[1:]
    if step.kind == "reshape":
        return _add(total.reshape(step.axes), part, steps, positions).reshape(total.shape)
    if step.kind == "slice":
        first, last = step.axes
        new = _add(jax.lax.slice(total, first, last), part, steps, positions)
        return jax.lax.dynamic_update_slice(total, new, first)
    (axis,) = step.axes
    own: jax.Array = jax.lax.dynamic_index_in_dim(total, positions[0], axis, keepdims=False)
    new = _add(own, part, steps, positions[1:])
    updated: jax.Array = jax.lax.dynamic_update_index_in_dim(total, new, positions[0], axis)
    return updated


def _without(values: tuple[Any, ...], at: int) -> tuple[Any, ...]:
    return values[:at] + values[at + 1 :]


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes with equal products in both shapes, without axes of size 1."""
    groups: list[tuple[list[int], list[int]]] = []
    left = [axis for axis, size in enumerate(old) if size != 1]
    right = [axis for axis, size in enumerate(new) if size != 1]
    while left:
        a, b = [left.pop(0)], [right.pop(0)]
        while (m := math.prod(old[i] for i in a)) != (n := math.prod(new[i] for i in b)):
            if m < n:
                a.append(left.pop(0))
            else:
                b.append(right.pop(0))
        groups.append((a, b))
    return groups


@dataclasses.dataclass(frozen=True)
class Product:
    """A `dot_general` of a view and another array; static.

    The letters name axes as in an einsum: the same letter in two operands is the same axis.

    Attributes:
      view: of the weight.
      weight: the letters of the weight's axes.
      other: the letters of the other operand's axes.
      output: the letters of the product's axes.
      precision: of the product, as the program asked for it.
    """

    view: View
    weight: str
    other: str
    output: str
    precision: Any

    def __post_init__(self) -> None:
        if self.view.leaf.rank is not None:
            self._projected()

    @classmethod
    def of(
        cls, view: View, other_ndim: int, numbers: Any, weight_is_right: bool, precision: Any
    ) -> "Product":
        """Name the axes; raise `Opaque` if the projected side is neither free nor contracted."""
        (contract_left, contract_right), (batch_left, batch_right) = numbers
        if weight_is_right:
            contract, contract_other = contract_right, contract_left
            batch, batch_other = batch_right, batch_left
        else:
            contract, contract_other = contract_left, contract_right
            batch, batch_other = batch_left, batch_right
        ndim = len(view.shape)
        weight = [chr(ord("a") + axis) for axis in range(ndim)]
        other = [chr(ord("A") + axis) for axis in range(other_ndim)]
        for mine, yours in zip((*contract, *batch), (*contract_other, *batch_other), strict=True):
            other[yours] = weight[mine]
        free = [weight[i] for i in range(ndim) if i not in (*contract, *batch)]
        free_other = [
            other[i] for i in range(other_ndim) if i not in (*contract_other, *batch_other)
        ]
        order = (free_other, free) if weight_is_right else (free, free_other)
        output = [weight[axis] for axis in batch] + order[0] + order[1]
        return cls(view, "".join(weight), "".join(other), "".join(output), precision)

    @classmethod
    def of_patches(
        cls, view: View, shape: tuple[int, ...], params: dict[str, Any]
    ) -> tuple["Product", tuple[int, ...]]:
        """A convolution whose windows tile its input: a product with patches.

        Args:
          view: of the kernel.
          shape: of the input.
          params: of the convolution.

        Returns:
          The product, and the shape in which the input is the array of patches that it multiplies.
        """
        numbers = params["dimension_numbers"]
        batch, feature, *space = numbers.lhs_spec
        windows = [view.shape[axis] for axis in numbers.rhs_spec[2:]]
        ones = [params["feature_group_count"], params["batch_group_count"]]
        ones += [*(params["lhs_dilation"] or ()), *(params["rhs_dilation"] or ())]
        tiles = list(params["window_strides"]) == windows
        tiles &= all(shape[axis] % size == 0 for axis, size in zip(space, windows, strict=True))
        if not tiles or any(n != 1 for n in ones) or any(map(any, params["padding"])):
            raise Opaque("has windows that do not tile its input")
        weight = [chr(ord("a") + axis) for axis in range(len(view.shape))]
        output_feature, input_feature, *window = (weight[axis] for axis in numbers.rhs_spec)
        position = [chr(ord("A") + axis) for axis in range(len(space))]
        letters = {batch: "Y", feature: input_feature}
        sizes: dict[int, tuple[int, ...]] = {axis: (n,) for axis, n in enumerate(shape)}
        for axis, size, at, within in zip(space, windows, position, window, strict=True):
            letters[axis] = at + within
            sizes[axis] = (shape[axis] // size, size)
        output = [""] * len(shape)
        for axis, letter in zip(numbers.out_spec, ("Y", output_feature, *position), strict=True):
            output[axis] = letter
        other = "".join(letters[axis] for axis in range(len(shape)))
        product = cls(view, "".join(weight), other, "".join(output), params["precision"])
        return product, sum((sizes[axis] for axis in range(len(shape))), ())

    def _letters(self, part: _Part) -> str:
        return "".join(self.weight[axis] for axis in part.order())

    def _projected(self) -> tuple[str, str]:
        """The letters of the operand that the projection meets, and those of the third array."""
        columns = self._letters(self.view.columns)
        both = set(self.other) & set(self.output)
        if set(columns) <= set(self.output) - both:
            return self.output, self.other
        if set(columns) <= set(self.other) - both:
            return self.other, self.output
        raise Opaque("contracts a part of the projected side")

    def add(
        self, total: jax.Array, d_output: jax.Array, other: jax.Array, source: "Source"
    ) -> jax.Array:
        """Add the sketch of this use to the total."""
        sketch = self.sketch(d_output, other, source.keys)
        return self.view.add(total, _meshes.summed_to(sketch, total), source.positions)

    def sketch(self, d_output: jax.Array, other: jax.Array, keys: jax.Array) -> jax.Array:
        """The sketch of the weight's gradient, its axes as in the view's part of the sketch."""
        kept = self._letters(self.view.sketch)
        wide = jnp.promote_types(other.dtype, jnp.float32)
        if self.view.leaf.rank is None:
            return self.einsum((self.output, d_output), (self.other, other), kept, wide)
        projected, third = self._projected()
        near, far = (d_output, other) if projected is self.output else (other, d_output)
        a = self.view.draw(keys)
        columns = self._letters(self.view.columns)
        # Without columns of size 1 that the program dropped.
        lead = a.shape[: a.ndim - len(self.view.columns.shape)]
        a = a.reshape(*lead, *(self.view.shape[axis] for axis in self.view.columns.order()))
        stack = "".join(self.weight[axis] for axis in self.view.batch)
        # What all matrices of a stack share meets the projection of each.
        alone = "".join(letter for letter in stack if letter not in projected)
        rest = alone + "".join(letter for letter in projected if letter not in columns) + _RANK
        # A value of its own: XLA would merge this product with that of the same operand and the
        # weight, and copy the weight for it.
        near = jax.lax.optimization_barrier(near)  # type: ignore[no-untyped-call]
        # Accumulated in float32 whatever it is rounded to, and rounded inside the product.
        thin = self.einsum(
            (projected, near),
            (f"{stack}{_RANK}{columns}", a.astype(near.dtype)),
            rest,
            far.dtype,
        )
        return self.einsum((third, far), (rest, thin), kept + _RANK, wide)

    def einsum(
        self, left: tuple[str, jax.Array], right: tuple[str, jax.Array], result: str, dtype: Any
    ) -> jax.Array:
        """The product of two arrays with named axes; divided as they are on explicit meshes."""
        sharding = None
        if _meshes.is_explicit(left[1]) or _meshes.is_explicit(right[1]):
            along = {
                letter: axis
                for letters, array in (right, left)
                for letter, axis in zip(
                    letters, _meshes.division(array, range(array.ndim)), strict=True
                )
            }
            sharding = _meshes.spec(tuple(along[letter] for letter in result))
        return jnp.einsum(
            f"{left[0]},{right[0]}->{result}",
            left[1],
            right[1],
            precision=self.precision,
            preferred_element_type=dtype,
            out_sharding=sharding,
        )


_RANK = "Z"  # the letter of the sketch's last axis


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A gather of whole rows of a view, as in an embedding; static.

    Attributes:
      view: of the weight, whose first axis is indexed.
      mode: what becomes of indices out of range.
    """

    view: View
    mode: Any

    @classmethod
    def of(cls, view: View, indices_ndim: int, params: dict[str, Any]) -> "Lookup":
        """Raise `Opaque` unless single rows are taken, their entries the last axes."""
        numbers, sizes = params["dimension_numbers"], tuple(params["slice_sizes"])
        ndim, indices_ndim = len(view.shape), indices_ndim - 1
        whole_rows = (
            sizes == (1, *view.shape[1:])
            and tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
            and tuple(numbers.offset_dims) == tuple(range(indices_ndim, indices_ndim + ndim - 1))
            and not numbers.operand_batching_dims
        )
        rank_axis = view.leaf.rank is not None
        in_order = all(
            [axis for axis in part.axes if axis is not None] == list(range(count))
            for part, count in (
                (view.sketch, len(view.sketch.shape) - rank_axis),
                (view.columns, len(view.columns.shape)),
            )
        )
        plain = in_order and not view.sketch.steps and not view.batch
        if not whole_rows or not plain or view.sketch.axes[0] is None:
            raise Opaque("takes something other than rows")
        return cls(view, params["mode"])

    def add(
        self, total: jax.Array, d_output: jax.Array, other: jax.Array, source: "Source"
    ) -> jax.Array:
        """Add the sketches of the rows that were taken to the total, row by row."""
        view, lead = self.view, other.ndim - 1
        rows = d_output.astype(total.dtype)
        if view.leaf.rank is not None:
            columns = tuple(axis + lead - 1 for axis in view.columns.order())
            a = view.draw(source.keys)
            rows = _projection.compress(d_output, a, columns).astype(total.dtype)
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(lead, rows.ndim)),
            inserted_window_dims=(0,),
            scatter_dims_to_operand_dims=(0,),
        )
        if not _meshes.varying(rows) - _meshes.varying(total):
            return jax.lax.scatter_add(total, other, rows, numbers, mode=self.mode)
        # Every device of a shard_map has rows of its own.
        own = _meshes.varying_as(jnp.zeros_like(total), rows)
        own = jax.lax.scatter_add(own, other, rows, numbers, mode=self.mode)
        return total + _meshes.summed_to(own, total)


class Source(NamedTuple):
    """What the sketch of a view is made with.

    Attributes:
      keys: those of the matrices in view are the rows from `View.first_key` on; shape `(n, 2)`. A
        loop hands all weights' keys into its body as one array, which the backward pass then
        slices: that is a buffer and a copy a layer, not one for every weight.
      positions: the batch indices that led to the view.
    """

    keys: jax.Array
    positions: tuple[jax.Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def record(
    use: Product | Lookup,
    output: jax.Array,
    other: jax.Array,
    total: jax.Array,
    source: Source,
) -> tuple[jax.Array, jax.Array]:
    """Let the sketch of the weight in `output` be added to the cotangent of `total`.

    Returns `output` and `total` unchanged: `total` only carries the sum of the sketches backward
    through the program, from use to use, as a loop carries an accumulator, and that is what makes
    it one buffer, updated in place. `other` is the other operand: of the product, or the indices.
    """
    del use, other, source
    return output, total


def _record_forward(
    use: Product | Lookup, output: jax.Array, other: jax.Array, total: jax.Array, source: Source
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    return (output, total), (other, source)


def _record_backward(
    use: Product | Lookup, residuals: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Any, ...]:
    other, source = residuals
    d_output, d_total = cotangents
    return d_output, None, use.add(d_total, d_output, other, source), None


record.defvjp(_record_forward, _record_backward)
