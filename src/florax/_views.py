"""A weight as a traced program sees it: which of its axes is which, and which part is in view.

A program uses a weight transposed, reshaped, cast, scaled, a layer at a time. A `View` follows it
through these and knows, for every axis of what it has become, which axis of the sketch, of the
stack of keys or of the projections it is. No array moves: the steps from a whole to the part in
view are noted, and taken where a use of the weight adds to its sketch.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from florax import _leaves, _meshes


class Opaque(Exception):
    """A weight cannot be followed through an operation; why not is the message."""


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step from a whole to the part in view.

    Attributes:
      kind: of the step.
      before: the shape that it is taken from.
      axes: the new shape of a "reshape", the axes of a "reverse", the starts and limits of a
        "slice"; of a "take", at a place that is traced, the axis, the size and the place's number.
    """

    kind: str
    before: tuple[int, ...]
    axes: tuple[Any, ...]

    def read(self, array: jax.Array, positions: Sequence[jax.Array], lead: int) -> jax.Array:
        """Take it; axes before the first `lead` and behind those of `before` stay as they are."""
        head, tail = array.shape[:lead], array.shape[lead + len(self.before) :]
        if self.kind == "reshape":
            return array.reshape(*head, *self.axes, *tail)
        if self.kind == "reverse":
            return jax.lax.rev(array, [axis + lead for axis in self.axes])
        if self.kind == "slice":
            first, last = self.axes
            return jax.lax.slice(array, (0,) * lead + first + (0,) * len(tail), head + last + tail)
        axis, size, number = self.axes
        taken: jax.Array = jax.lax.dynamic_slice_in_dim(
            array, positions[number], size, axis + lead, allow_negative_indices=False
        )
        return taken

    def write(self, array: jax.Array, part: jax.Array, positions: Sequence[jax.Array]) -> jax.Array:
        """The array with what was read replaced."""
        if self.kind == "reshape":
            return part.reshape(array.shape)
        if self.kind == "reverse":
            return jax.lax.rev(part, self.axes)
        if self.kind == "slice":
            first, _ = self.axes
            return jax.lax.dynamic_update_slice(
                array, part, first + (0,) * (array.ndim - len(first))
            )
        axis, _, number = self.axes
        updated: jax.Array = jax.lax.dynamic_update_slice_in_dim(
            array, part, positions[number], axis, allow_negative_indices=False
        )
        return updated


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a whole (a sketch, a stack of keys, projections, a factor) in view; static.

    Attributes:
      axes: per axis of the view the axis of the part that it is; None if it is none of the part's.
      shape: of the part. Axes that are none of the view's have size 1.
      steps: from the whole to the part.
    """

    axes: tuple[int | None, ...]
    shape: tuple[int, ...]
    steps: tuple[_Step, ...] = ()

    @classmethod
    def of(cls, own: Sequence[int], shape: Sequence[int]) -> "Part":
        """Of a view of that shape, whose axes `own` are those of the whole, in its order."""
        axes = tuple(own.index(axis) if axis in own else None for axis in range(len(shape)))
        return cls(axes, tuple(shape[axis] for axis in own))

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the whole."""
        return self.steps[0].before if self.steps else self.shape

    def order(self) -> list[int]:
        """The view's axes in the order of the part's."""
        named = {part: axis for axis, part in enumerate(self.axes) if part is not None}
        return [named[part] for part in sorted(named)]

    def take(
        self, whole: jax.Array, positions: Sequence[jax.Array] = (), lead: int = 0
    ) -> jax.Array:
        """The part, its axes those of `order`; others, before and behind, stay."""
        for step in self.steps:
            whole = step.read(whole, positions, lead)
        return self._named(whole, lead)

    def update(
        self,
        whole: jax.Array,
        positions: Sequence[jax.Array],
        function: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """The whole, with `function` applied to what `take` gives."""
        return self._update(whole, positions, lambda part: function(self._named(part, 0)))

    def add(self, whole: jax.Array, positions: Sequence[jax.Array], array: jax.Array) -> jax.Array:
        """The whole, with an array like what `take` gives added to that.

        In the shape that is read: were it another, XLA would copy on a GPU what it reads before it
        writes.
        """

        def added(part: jax.Array) -> jax.Array:
            own = _meshes.divide_as(array.astype(part.dtype), self._named(part, 0))
            return part + own.reshape(part.shape)

        return self._update(whole, positions, added)

    def _update(
        self,
        whole: jax.Array,
        positions: Sequence[jax.Array],
        function: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """Read, change, write back: inside a loop the whole is updated in place, a part at a time.

        What `function` is given has axes of size 1 that are none of the view's.
        """
        read = [whole]
        for step in self.steps:
            read.append(step.read(read[-1], positions, 0))
        new = function(read[-1]).reshape(read[-1].shape)
        for step, array in zip(reversed(self.steps), reversed(read[:-1]), strict=True):
            new = step.write(array, new, positions)
        return new

    def own(self) -> "Part":
        """The same of an array that is this part, as `take` gives it, and no more."""
        named = sorted(axis for axis in self.axes if axis is not None)
        axes = tuple(None if axis is None else named.index(axis) for axis in self.axes)
        return Part(axes, tuple(self.shape[axis] for axis in named))

    def leading(self, count: int) -> "Part | None":
        """The same of what has no such part's last axes, `count` of them.

        None if a step on the way changes these, or takes a part of them.
        """
        steps = []
        for step in self.steps:
            lead = len(step.before) - count
            last, axes = step.before[lead:], step.axes
            if step.kind == "reshape":
                is_apart = axes[len(axes) - count :] == last
                axes = axes[: len(axes) - count]
            elif step.kind == "slice":
                first, limits = axes
                is_apart = first[lead:] == (0,) * count and limits[lead:] == last
                axes = (first[:lead], limits[:lead])
            else:  # the axes of a "reverse", and the first of what a "take" has
                is_apart = all(a < lead for a in (axes[:1] if step.kind == "take" else axes))
            if not is_apart:
                return None
            steps.append(_Step(step.kind, step.before[:lead], axes))
        lead = len(self.shape) - count
        own = tuple(None if axis is None or axis >= lead else axis for axis in self.axes)
        return Part(own, self.shape[:lead], tuple(steps))

    def _named(self, part: jax.Array, lead: int) -> jax.Array:
        sizes = [self.shape[axis] for axis in sorted(a for a in self.axes if a is not None)]
        head, tail = part.shape[:lead], part.shape[lead + len(self.shape) :]
        shape = (*head, *sizes, *tail)
        return part if part.shape == shape else part.reshape(shape)

    def _then(self, kind: str, axes: tuple[Any, ...], shape: Sequence[int]) -> "Part":
        steps = (*self.steps, _Step(kind, self.shape, axes))
        return dataclasses.replace(self, shape=tuple(shape), steps=steps)

    def transpose(self, permutation: Sequence[int]) -> "Part":
        return dataclasses.replace(self, axes=tuple(self.axes[axis] for axis in permutation))

    def broadcast(self, sources: Sequence[int | None]) -> "Part":
        axes = tuple(None if axis is None else self.axes[axis] for axis in sources)
        return dataclasses.replace(self, axes=axes)

    def reverse(self, axes: Sequence[int]) -> "Part":
        own = tuple(a for a in (self.axes[axis] for axis in axes) if a is not None)
        return self._then("reverse", own, self.shape) if own else self

    def slice(self, cut: dict[int, tuple[int, int]]) -> "Part":
        own = {self.axes[axis]: bounds for axis, bounds in cut.items()}
        own.pop(None, None)
        if not own:
            return self
        bounds = [own.get(axis, (0, size)) for axis, size in enumerate(self.shape)]
        return self._then("slice", tuple(zip(*bounds, strict=True)), [b - a for a, b in bounds])

    def place(self, axis: int, size: int, number: int) -> "Part":
        position = self.axes[axis]
        if position is None:
            return self
        shape = [size if i == position else n for i, n in enumerate(self.shape)]
        return self._then("take", (position, size, number), shape)

    def reshape(self, groups: list[tuple[list[int], list[int]]], shape: Sequence[int]) -> "Part":
        pieces: list[tuple[int, ...]] = [(size,) for size in self.shape]
        placed = []
        for old, new in groups:
            own = [self.axes[axis] for axis in old]
            first = own[0]
            if own == [None] * len(own):
                continue
            if first is None or own != list(range(first, first + len(own))):
                raise Opaque("merges axes that are not of one side")
            rest = [()] * (len(own) - 1)
            pieces[first : first + len(own)] = [tuple(shape[axis] for axis in new), *rest]
            placed.append((first, new))
        axes: list[int | None] = [None] * len(shape)
        for first, new in placed:
            start = sum(map(len, pieces[:first]))
            for offset, axis in enumerate(new):
                axes[axis] = start + offset
        new_shape = sum(pieces, ())
        part = self if new_shape == self.shape else self._then("reshape", new_shape, new_shape)
        return dataclasses.replace(part, axes=tuple(axes))


@dataclasses.dataclass(frozen=True)
class View:
    """How a weight, or a part of it, is seen; static.

    What is seen is the weight, or its square, times factors. An axis that the program added is none
    of the weight's.

    Attributes:
      leaf: the weight's leaf.
      shape: of what the weight has become.
      sketch: the part of the sketch in view; the rank is behind its axes.
      keys: the part of the stack of keys.
      words: where its own begin and end, if the words of the keys are in a row with others'.
      columns: the part of the projections' columns.
      scales: what is seen of each factor.
      is_square: whether it is the square that is seen.
    """

    leaf: _leaves.Leaf
    shape: tuple[int, ...]
    sketch: Part
    keys: Part
    columns: Part
    words: tuple[int, int] | None = None
    scales: tuple[Part, ...] = ()
    is_square: bool = False

    @classmethod
    def of(cls, leaf: _leaves.Leaf) -> "View":
        """The weight itself."""
        kept = tuple(axis for axis in leaf.kept_axes if axis is not None)
        sketch, keys, columns = (
            Part.of(own, leaf.shape) for own in (kept, leaf.batch, leaf.columns)
        )
        return cls(leaf, leaf.shape, sketch, keys, columns)

    def _each(self, shape: Sequence[int], move: Callable[[Part], Part]) -> "View":
        return dataclasses.replace(
            self,
            shape=tuple(shape),
            sketch=move(self.sketch),
            keys=move(self.keys),
            columns=move(self.columns),
            scales=tuple(map(move, self.scales)),
        )

    def transpose(self, permutation: Sequence[int]) -> "View":
        """With its axes in another order: only the names of axes change, no array does."""
        shape = [self.shape[axis] for axis in permutation]
        return self._each(shape, lambda part: part.transpose(permutation))

    def broadcast(self, shape: Sequence[int], axes: Sequence[int]) -> "View":
        """Repeated; `axes` are those of the new shape that it had."""
        sources: list[int | None] = [None] * len(shape)
        for axis, to in enumerate(axes):
            if self.shape[axis] == shape[to]:
                sources[to] = axis
        return self._each(shape, lambda part: part.broadcast(sources))

    def reverse(self, axes: Sequence[int]) -> "View":
        """With axes the other way round."""
        return self._each(self.shape, lambda part: part.reverse(axes))

    def slice(self, starts: Sequence[int], limits: Sequence[int]) -> "View":
        """A block of it."""
        bounds = list(zip(starts, limits, strict=True))
        cut = {a: b for a, b in enumerate(bounds) if b != (0, self.shape[a])}
        return self._each([b - a for a, b in bounds], lambda part: part.slice(cut))

    def place(self, axis: int, size: int, number: int) -> "View":
        """A block along one axis; where, is the traced position of that number."""
        shape = [size if i == axis else n for i, n in enumerate(self.shape)]
        return self._each(shape, lambda part: part.place(axis, size, number))

    def reshape(self, shape: Sequence[int]) -> "View":
        """With axes merged or split; rows with rows and columns with columns only."""
        groups = axis_groups(self.shape, tuple(shape))
        return self._each(shape, lambda part: part.reshape(groups, shape))

    def scaled(self, shape: Sequence[int]) -> "View":
        """Times a factor of that shape, its axes those of the view or of size 1."""
        own = [axis for axis, size in enumerate(shape) if size > 1]
        sides = self.sketch.order(), [*self.keys.order(), *self.columns.order()]
        if tuple(shape) == self.shape and not any(set(own) <= set(side) for side in sides):
            raise Opaque("is of every entry by itself")
        return dataclasses.replace(self, scales=(*self.scales, Part.of(own, shape)))

    def layer_keys(self, keys: jax.Array, positions: Sequence[jax.Array]) -> jax.Array:
        """The keys of every position along the first axis, shape `(positions, n, words)`."""
        first = jnp.moveaxis(self._keys(keys, positions), self.keys.order().index(0), 0)
        return first.reshape(self.shape[0], -1, first.shape[-1])

    def with_layer_keys(self, words: tuple[int, int]) -> "View":
        """A layer of it, for which these are the whole."""
        shape = tuple(self.shape[axis] for axis in self.keys.order() if axis)
        own = sorted(a for a in self.keys.axes[1:] if a is not None)
        axes = (None, *(None if a is None else own.index(a) for a in self.keys.axes[1:]))
        return dataclasses.replace(self, keys=Part(axes, shape), words=words)

    def with_own_sketch(self) -> "View":
        """The same for a sketch of what is in view, and of no more."""
        return dataclasses.replace(self, sketch=self.sketch.own())

    def draw(self, keys: jax.Array, positions: Sequence[jax.Array]) -> jax.Array:
        """The projections in view, `(*stack, rank, *columns)`, float32.

        Their axes are those of `keys` and `columns`. Given are the keys of all matrices, shape
        `(n, words)`; or, of a single one, its projection.
        """
        if not jnp.issubdtype(keys.dtype, jnp.integer):
            return self.columns.take(keys, positions, 1)
        keys = self._keys(keys, positions)
        draw = self.leaf.draw_matrix
        for _ in range(keys.ndim - 1):
            draw = jax.vmap(draw)
        return self.columns.take(draw(keys), positions, keys.ndim)

    def _keys(self, keys: jax.Array, positions: Sequence[jax.Array]) -> jax.Array:
        """Those in view, of all of them; the words last."""
        whole, width = self.keys.whole, keys.shape[-1]
        if self.words is not None:
            keys = jax.lax.slice_in_dim(keys, *self.words)
            width = keys.size // math.prod(whole)
        return self.keys.take(keys.reshape(*whole, width), positions)

    def add(self, total: jax.Array, sketch: jax.Array, positions: Sequence[jax.Array]) -> jax.Array:
        """Add the sketch of the part in view to the whole."""
        return self.sketch.add(total, positions, sketch)


def axis_groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes with equal products in both shapes, without axes of size 1."""
    if 0 in old:
        raise Opaque("has no entries")
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
