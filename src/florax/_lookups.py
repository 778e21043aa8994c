"""Lookups: gathers of whole slices along one axis of a weight, as of an embedding's rows."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from florax import _meshes, _pieces, _terms, _uses, _views


@dataclasses.dataclass(frozen=True)
class Lookup(_uses.Use):
    """A gather along one axis, as in an embedding; `other` are the axes of the indices.

    Attributes:
      axis: the letter of the array's axis that is indexed.
      size: of that axis.
      clips: whether indices out of range are the nearest; else they are none.
    """

    axis: str
    size: int
    clips: bool

    @classmethod
    def gather(cls, shape: tuple[int, ...], indices_ndim: int, params: dict[str, Any]) -> "Lookup":
        """Raise `Opaque` unless single positions along one axis are taken, and all of the others.

        Axes of the indices that are mapped along with axes of the array have these' letters.
        """
        numbers, weight = params["dimension_numbers"], _terms.letters(len(shape))
        indices = _terms.others(indices_ndim - 1)
        mapped = tuple(numbers.operand_batching_dims)
        for mine, yours in zip(mapped, numbers.start_indices_batching_dims, strict=True):
            indices[yours] = weight[mine]
        axes = tuple(numbers.start_index_map)
        single = len(axes) == 1 and tuple(numbers.collapsed_slice_dims) == axes
        sizes = tuple(1 if axis in (*axes, *mapped) else n for axis, n in enumerate(shape))
        if not single or tuple(params["slice_sizes"]) != sizes:
            raise _views.Opaque("takes more than whole slices along one axis")
        whole = iter([k for axis, k in enumerate(weight) if axis not in (*axes, *mapped)])
        taken = iter(indices)
        count = len(shape) - 1 - len(mapped) + len(indices)
        output = [next(whole) if i in numbers.offset_dims else next(taken) for i in range(count)]
        clips = params["mode"] == jax.lax.GatherScatterMode.CLIP
        return cls(
            weight, "".join(indices), "".join(output), weight[axes[0]], shape[axes[0]], clips
        )

    def check(self, piece: _pieces.Piece, shape: tuple[int, ...]) -> None:
        super().check(piece, shape)
        if piece.view.is_square:
            raise _views.Opaque("is of its square")

    def apply(self, array: jax.Array, other: Any) -> jax.Array:
        taken = self._taken(_terms.Term(self.weight, array), other)
        return _terms.einsum([taken], self.output, array.dtype).array

    def _taken(self, term: _terms.Term, indices: jax.Array) -> _terms.Term:
        """What is at the indices, where axes that both have are mapped."""
        both = "".join(k for k in self.other if k in term.letters)
        rest = "".join(k for k in term.letters if k not in both)
        new = "".join(k for k in self.other if k not in both)
        array = _terms.einsum([term], both + rest, term.array.dtype).array
        order = [self.other.index(k) for k in both + new]
        take = functools.partial(jnp.take, axis=rest.index(self.axis), mode="fill", fill_value=0)
        for _ in both:
            take = jax.vmap(take)
        letters = both + rest.replace(self.axis, new)
        return _terms.Term(letters, take(array, indices.transpose(order)))

    def cut(self, piece: _pieces.Piece, other: Any, bounds: dict[str, tuple[int, int]]) -> Any:
        first, last = bounds[self.axis]
        if self.clips:
            other = jnp.clip(other, 0, self.size - 1)
        other = super().cut(piece, other, bounds)
        return jnp.where((other >= first) & (other < last), other - first, last - first)

    def sketch(
        self, view: _views.View, d_output: _terms.Term, other: Any, a: _terms.Term | None
    ) -> _terms.Term:
        kept = self.kept(view)
        if self.axis in kept:
            kept = self.other + "".join(k for k in kept if k != self.axis and k not in self.other)
        to = _terms.wide(d_output.array.dtype)
        d_output = d_output._replace(array=_terms.computed(d_output.array))
        if a is None:
            return _terms.einsum([d_output], kept, to)
        a = a._replace(array=a.array.astype(d_output.array.dtype))
        if self.axis in a.letters:
            a = self._taken(a, other)
        return _terms.einsum([d_output, a], kept + _terms.RANK, to)

    def add_sketch(
        self,
        view: _views.View,
        total: jax.Array,
        sketch: _terms.Term,
        other: Any,
        source: _uses.Source,
    ) -> jax.Array:
        kept = self.kept(view)
        if self.axis not in kept:
            return super().add_sketch(view, total, sketch, other, source)
        lead, position = len(self.other), kept.index(self.axis)
        mapped = [k for k in kept if k in self.other]
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(lead, sketch.array.ndim)),
            inserted_window_dims=(position,),
            scatter_dims_to_operand_dims=(position,),
            operand_batching_dims=tuple(kept.index(k) for k in mapped),
            scatter_indices_batching_dims=tuple(self.other.index(k) for k in mapped),
        )

        def scattered(part: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
            mode = jax.lax.GatherScatterMode.FILL_OR_DROP
            return jax.lax.scatter_add(part, indices, rows, numbers, mode=mode)

        def added(part: jax.Array) -> jax.Array:
            rows = sketch.array.astype(part.dtype)
            if not _meshes.varying(rows) - _meshes.varying(part):
                return _meshes.automatically(scattered, part, other[..., None], rows)
            # Every device of a shard_map has rows of its own.
            own = _meshes.varying_as(jnp.zeros_like(part), rows)
            return part + _meshes.summed_to(scattered(own, other[..., None], rows), part)

        return view.sketch.update(total, source.positions, added)
