"""Where parts of weights stand in an array: all of it, or side by side as in a concatenation."""

import dataclasses
from collections.abc import Sequence

import jax

from florax import _views


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a weight in an array, which may be a concatenation; static.

    Attributes:
      number: of the weight's leaf.
      view: of the part.
      offset: per axis of the array where the part begins.
      baked: how many of its factors the root of the array has already.
    """

    number: int
    view: _views.View
    offset: tuple[int, ...]
    baked: int = 0

    def moved(self, view: _views.View, offset: Sequence[int]) -> "Piece":
        """Seen otherwise, and elsewhere."""
        return dataclasses.replace(self, view=view, offset=tuple(offset))

    def transpose(self, permutation: Sequence[int]) -> "Piece":
        offset = [self.offset[axis] for axis in permutation]
        return self.moved(self.view.transpose(permutation), offset)

    def reverse(self, axes: Sequence[int], shape: Sequence[int]) -> "Piece":
        """In an array of that shape with axes the other way round."""
        corners = enumerate(zip(shape, self.offset, self.view.shape, strict=True))
        offset = [n - first - own if i in axes else first for i, (n, first, own) in corners]
        return self.moved(self.view.reverse(axes), offset)

    def broadcast(self, old: Sequence[int], shape: Sequence[int], axes: Sequence[int]) -> "Piece":
        """In an array of shape `old` that is broadcast, its axes becoming `axes`."""
        own, offset = list(shape), [0] * len(shape)
        for axis, to in enumerate(axes):
            if old[axis] == shape[to]:
                own[to], offset[to] = self.view.shape[axis], self.offset[axis]
        return self.moved(self.view.broadcast(own, axes), offset)

    def reshape(self, old: tuple[int, ...], new: tuple[int, ...]) -> "Piece":
        """In an array that is reshaped; axes that it does not fill stay as they are."""
        shape, offset = list(new), [0] * len(new)
        for before, after in _views.axis_groups(old, new):
            if all(self.view.shape[axis] == old[axis] for axis in before):
                continue
            if len(before) + len(after) > 2:
                raise _views.Opaque("merges or splits what was concatenated")
            (axis,), (to,) = before, after
            shape[to], offset[to] = self.view.shape[axis], self.offset[axis]
        return self.moved(self.view.reshape(shape), offset)

    def squeeze(self, axes: Sequence[int]) -> "Piece":
        """Without axes along which it has size 1, wherever it stands there."""
        rest = [axis for axis in range(len(self.offset)) if axis not in axes]
        view = self.view.reshape([self.view.shape[axis] for axis in rest])
        return self.moved(view, [self.offset[axis] for axis in rest])

    def insert(self, axis: int) -> "Piece":
        """With one more axis of size 1."""
        view = self.view.reshape((*self.view.shape[:axis], 1, *self.view.shape[axis:]))
        return self.moved(view, (*self.offset[:axis], 0, *self.offset[axis:]))

    def shift(self, by: Sequence[int]) -> "Piece":
        """Elsewhere in an array."""
        offset = [first + n for first, n in zip(self.offset, by, strict=True)]
        return self.moved(self.view, offset)

    def block(self, starts: Sequence[int], limits: Sequence[int]) -> "Piece | None":
        """What of it is in a block of the array; None if nothing is."""
        sizes = self.view.shape
        first = [max(a - o, 0) for a, o in zip(starts, self.offset, strict=True)]
        last = [min(b - o, n) for b, o, n in zip(limits, self.offset, sizes, strict=True)]
        if any(a >= b for a, b in zip(first, last, strict=True)):
            return None
        offset = [max(o - a, 0) for o, a in zip(self.offset, starts, strict=True)]
        return self.moved(self.view.slice(first, last), offset)

    def place(self, axis: int, size: int, number: int) -> "Piece":
        """A block along one axis at the traced position of that number."""
        return self.moved(self.view.place(axis, size, number), self.offset)

    def times(self, scale: jax.Array) -> tuple["Piece", jax.Array]:
        """With a factor, of the array's axes or of size 1; and the part of the factor."""
        for axis, (first, n) in enumerate(zip(self.offset, self.view.shape, strict=True)):
            if scale.shape[axis] not in (1, n):
                scale = jax.lax.slice_in_dim(scale, first, first + n, axis=axis)
        view = self.view.scaled(scale.shape)
        return self.moved(view, self.offset), scale.reshape(view.scales[-1].shape)
