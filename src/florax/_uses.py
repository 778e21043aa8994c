"""The uses of a weight, and the backward rules by which each adds to the weight's sketch.

A use is linear in the weight: output = Σ W · other. Its part of the weight's gradient is
Σ d_output · other, and with the projections A its part of the sketch is, for y = x W,

    xᵀ (dy Aᵀ)        or, where the projected side is the contracted one,        (x Aᵀ)ᵀ dy:

fewer operations than the gradient, and no array of the weight's size. A use that is no product is
one with nothing, of W itself: the cotangent of that use exists, and is compressed on the spot.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from florax import _meshes, _views

_RANK = "Z"  # the letter of a sketch's last axis


class Term(NamedTuple):
    """An array whose axes have names: letters, as in an einsum."""

    letters: str
    array: jax.Array

    def size(self, letters: str) -> int:
        """How many entries these axes have."""
        return math.prod(
            n for n, letter in zip(self.array.shape, self.letters, strict=True) if letter in letters
        )

    def times(self, factor: "Term") -> "Term":
        """Times a factor along some of its axes."""
        axes = [self.letters.index(letter) for letter in factor.letters]
        scale = factor.array.transpose(sorted(range(len(axes)), key=axes.__getitem__))
        shape = [n if axis in axes else 1 for axis, n in enumerate(self.array.shape)]
        along = _meshes.division(self.array, range(self.array.ndim))
        scale = _meshes.divide(
            scale.reshape(shape),
            tuple(d if axis in axes else None for axis, d in enumerate(along)),
        )
        return self._replace(array=self.array * scale.astype(self.array.dtype))

    def cut(self, bounds: dict[str, tuple[int, int]]) -> "Term":
        """The block between the bounds of its axes."""
        array = self.array
        for axis, letter in enumerate(self.letters):
            first, last = bounds.get(letter, (0, array.shape[axis]))
            if (first, last) != (0, array.shape[axis]):
                array = jax.lax.slice_in_dim(array, first, last, axis=axis)
        return self._replace(array=array)


class Source(NamedTuple):
    """What the sketch of a part of a weight is made with.

    Attributes:
      keys: of all matrices of the leaf, shape `(n, 2)`.
      positions: the places at which parts were taken, as far as they are traced.
      scales: the factors by which it is multiplied.
    """

    keys: jax.Array
    positions: tuple[jax.Array, ...] = ()
    scales: tuple[jax.Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a weight in an array that is used, which may be a concatenation; static.

    Attributes:
      number: of the weight's leaf.
      view: of the part.
      offset: per axis of the array where the part begins.
      baked: how many of its factors the root has already.
    """

    number: int
    view: _views.View
    offset: tuple[int, ...]
    baked: int = 0


class Operands(NamedTuple):
    """What a use is made with, beside the weight.

    Attributes:
      other: the other operand, or the indices; None if there is none.
      root: the array before squares and factors; None if it is not needed.
      sources: per piece.
    """

    other: Any
    root: jax.Array | None
    sources: tuple[Source, ...]


@dataclasses.dataclass(frozen=True)
class Use:
    """A way to use an array of weights; static.

    Attributes:
      weight: the letters of the array's axes.
      other: the letters of the other operand's axes; empty if there is none.
      output: the letters of the result's axes.
    """

    weight: str
    other: str
    output: str

    def apply(self, array: jax.Array, other: Any) -> jax.Array:
        """The result with another array in the place of the weight."""
        raise NotImplementedError

    def sketch(self, view: _views.View, d_output: Term, other: Any, a: Term | None) -> Term:
        """The sketch of what is in view; without projections, its gradient."""
        raise NotImplementedError

    def check(self, piece: Piece, shape: tuple[int, ...]) -> None:
        """Raise `Opaque` if a piece of an array of that shape cannot be followed into the use."""
        for part in piece.view.scales:
            self._place(piece.view, part)
        if piece.view.is_square and self.other:
            raise _views.Opaque("is of its square")

    def is_dense(self, view: _views.View) -> bool:
        """Whether the cotangent of the result is as large as a compressed matrix in view."""
        sizes = dict(zip(self.weight, view.shape, strict=True))
        sides = set(self.kept(view) + self.of(view.columns)) - set(self.of(view.keys))
        own = {k for k in sides if sizes[k] > 1}
        return view.leaf.rank is not None and own <= set(self.output)

    def of(self, part: _views.Part) -> str:
        """The letters of a part's axes."""
        return "".join(self.weight[axis] for axis in part.order())

    def kept(self, view: _views.View) -> str:
        """The letters of what is kept."""
        return self.of(view.sketch)

    def cut(self, piece: Piece, other: Any, bounds: dict[str, tuple[int, int]]) -> Any:
        """The other operand as the piece meets it."""
        return None if other is None else Term(self.other, other).cut(bounds).array

    def add(
        self, piece: Piece, total: jax.Array, d_output: jax.Array, operands: Operands
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The total with the sketch of a piece added; the cotangents of its factors."""
        view, (source,) = piece.view, operands.sources
        corners = zip(self.weight, piece.offset, view.shape, strict=True)
        bounds = {letter: (first, first + size) for letter, first, size in corners}
        dy = Term(self.output, d_output).cut(bounds)
        other = self.cut(piece, operands.other, bounds)
        root = None if operands.root is None else Term(self.weight, operands.root).cut(bounds).array
        scales = [
            Term(self.of(part), part.take(scale, source.positions))
            for part, scale in zip(view.scales, source.scales, strict=True)
        ]
        d_scales = [jnp.zeros_like(scale) for scale in source.scales]
        if root is not None:
            for number, d_scale in self._d_scales(piece, dy, other, root, scales).items():
                d_scales[number] = view.scales[number].update(
                    d_scales[number], source.positions, functools.partial(_replaced, new=d_scale)
                )

        late = []
        if view.is_square:  # its derivative is 2 W
            other, late = root, [Term("", jnp.float32(2))]
        a = None
        if view.leaf.rank is not None:
            letters = self.of(view.keys) + _RANK + self.of(view.columns)
            a = Term(letters, view.draw(source.keys, source.positions))
        for part, scale in zip(view.scales, scales, strict=True):
            place = self._place(view, part)
            if place == "late":
                late.append(scale)
            elif place == "projections" and a is not None:
                a = a.times(scale)
            elif place == "output":
                dy = dy.times(scale)
            else:
                other = Term(self.other, other).times(scale).array
        total = self.add_sketch(view, total, self.sketch(view, dy, other, a), late, other, source)
        return total, tuple(d_scales)

    def add_sketch(
        self,
        view: _views.View,
        total: jax.Array,
        sketch: Term,
        late: list[Term],
        other: Any,
        source: Source,
    ) -> jax.Array:
        """Add to the total what `sketch` gave, times factors."""
        for scale in late:
            sketch = sketch.times(scale)
        return view.add(total, _meshes.summed_to(sketch.array, total), source.positions)

    def _place(self, view: _views.View, part: _views.Part) -> str:
        """What is multiplied by a factor in the backward pass, as the weight was in the forward."""
        letters = set(self.of(part))
        if letters <= set(self.kept(view)):
            return "late"
        if letters <= set(self.of(view.columns) + self.of(view.keys)):
            return "projections"
        if letters <= set(self.output):
            return "output"
        if letters <= set(self.other):
            return "other"
        raise _views.Opaque("is of a product of it")

    def _d_scales(
        self, piece: Piece, dy: Term, other: Any, root: jax.Array, scales: list[Term]
    ) -> dict[int, jax.Array]:
        """The cotangents of the factors, by one more product each: no gradient of the weight."""
        found = {}
        for number in range(piece.baked, len(scales)):
            array, own_dy, own_other = Term(self.weight, root), dy, other
            if piece.view.is_square:
                array = array.times(array)
            for scale in (s for n, s in enumerate(scales) if n not in range(piece.baked)):
                if scale is scales[number]:
                    continue
                if set(scale.letters) <= set(self.output):
                    own_dy = own_dy.times(scale)
                elif set(scale.letters) <= set(self.other):
                    own_other = Term(self.other, own_other).times(scale).array
                else:
                    array = array.times(scale)
            own = self._d_scale(scales[number].letters, own_dy, own_other, array)
            found[number] = own.array
        return found

    def _d_scale(self, letters: str, dy: Term, other: Any, array: Term) -> Term:
        result = Term(self.output, self.apply(array.array, other))
        return einsum([dy, result], letters, wide(dy.array.dtype))


def _replaced(old: jax.Array, new: jax.Array) -> jax.Array:
    return new.astype(old.dtype)


def einsum(terms: list[Term], result: str, dtype: Any, precision: Any = None) -> Term:
    """A sum of products of arrays with named axes; divided as they are on explicit meshes."""
    sharding = None
    if any(_meshes.is_explicit(term.array) for term in terms):
        along = {
            letter: axis
            for term in reversed(terms)
            for letter, axis in zip(
                term.letters, _meshes.division(term.array, range(term.array.ndim)), strict=True
            )
        }
        sharding = _meshes.spec(tuple(along[letter] for letter in result))
    array = jnp.einsum(
        f"{','.join(term.letters for term in terms)}->{result}",
        *(term.array for term in terms),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=sharding,
    )
    return Term(result, array)


def wide(dtype: Any) -> Any:
    """The dtype in which a sketch is summed: float32 at least."""
    narrow = jnp.dtype(dtype).itemsize == 1  # JAX promotes no 8-bit floats
    return jnp.float32 if narrow else jnp.promote_types(dtype, jnp.float32)


def _computed(array: jax.Array) -> jax.Array:
    """In a dtype that products are taken in: of 8-bit floats, bfloat16, which has all of them."""
    return array.astype(jnp.bfloat16) if array.dtype.itemsize == 1 else array


@dataclasses.dataclass(frozen=True)
class Product(Use):
    """A sum of products, as `dot_general`; without another operand, a sum, or the weight itself.

    Attributes:
      precision: of the product, as the program asked for it.
    """

    precision: Any = None

    @classmethod
    def dot(
        cls, ndim: int, other_ndim: int, numbers: Any, weight_is_right: bool, precision: Any
    ) -> "Product":
        """Of a `dot_general`."""
        (contract_left, contract_right), (batch_left, batch_right) = numbers
        if weight_is_right:
            contract, contract_other = contract_right, contract_left
            batch, batch_other = batch_right, batch_left
        else:
            contract, contract_other = contract_left, contract_right
            batch, batch_other = batch_left, batch_right
        weight = _letters(ndim)
        other = [chr(ord("A") + axis) for axis in range(other_ndim)]
        for mine, yours in zip((*contract, *batch), (*contract_other, *batch_other), strict=True):
            other[yours] = weight[mine]
        free = [weight[i] for i in range(ndim) if i not in (*contract, *batch)]
        free_other = [
            other[i] for i in range(other_ndim) if i not in (*contract_other, *batch_other)
        ]
        order = (free_other, free) if weight_is_right else (free, free_other)
        output = [weight[axis] for axis in batch] + order[0] + order[1]
        return cls(weight, "".join(other), "".join(output), precision)

    @classmethod
    def sum(cls, ndim: int, axes: tuple[int, ...]) -> "Product":
        """Of a sum over axes; over none, it is the weight itself."""
        weight = _letters(ndim)
        return cls(weight, "", "".join(weight[i] for i in range(ndim) if i not in axes))

    def apply(self, array: jax.Array, other: Any) -> jax.Array:
        terms = [Term(self.weight, array), *([] if other is None else [Term(self.other, other)])]
        return einsum(terms, self.output, wide(array.dtype), self.precision).array

    def _d_scale(self, letters: str, dy: Term, other: Any, array: Term) -> Term:
        to = wide(dy.array.dtype)
        if other is None:
            return einsum([dy, array], letters, to)
        if set(letters) <= set(self.output):
            return super()._d_scale(letters, dy, other, array)
        d_other = einsum([dy, array], self.other, to, self.precision)
        return einsum([d_other, Term(self.other, other)], letters, to)

    def sketch(self, view: _views.View, d_output: Term, other: Any, a: Term | None) -> Term:
        kept, terms = self.kept(view), [d_output]
        if other is not None:
            terms.append(Term(self.weight if view.is_square else self.other, other))
        to = wide(terms[-1].array.dtype)
        if a is not None:
            kept += _RANK
            terms = self._ordered(terms, a, set(self.of(view.columns)), kept)
        there = "".join(k for k in kept if any(k in term.letters for term in terms))
        sketch = einsum(terms, there, to, self.precision)
        if there == kept:
            return sketch
        # Along axes that were summed over it is the same everywhere.
        shape = [*(view.shape[self.weight.index(k)] for k in kept if k != _RANK)]
        shape += [view.leaf.rank] if view.leaf.rank is not None else []
        axes = tuple(kept.index(k) for k in there)
        return Term(kept, jax.lax.broadcast_in_dim(sketch.array, shape, axes))

    def _ordered(self, terms: list[Term], a: Term, columns: set[str], kept: str) -> list[Term]:
        """The last two factors of the three, or all if they are two; the others multiplied."""
        near, *rest = terms
        if not rest:
            return [near._replace(array=_computed(near.array)), a]
        (far,) = rest
        if columns & set(far.letters):
            if columns & set(near.letters):
                # The projected side is an axis of both: whichever takes the fewest operations.
                def cost(first: Term, second: Term, third: Term) -> int:
                    sizes = {
                        k: n
                        for t in (first, second, third)
                        for k, n in zip(t.letters, t.array.shape, strict=True)
                    }
                    thin = self._between(first, second, third.letters + kept)
                    both = [{*first.letters, *second.letters}, {*thin, *third.letters}]
                    return sum(math.prod(sizes[k] for k in own) for own in both)

                orders = [(near, a, far), (far, a, near), (near, far, a)]
                first, second, third = min(orders, key=lambda order: cost(*order))
                return [self._thin(first, second, third, kept), third]
            near, far = far, near
        # A value of its own: XLA would merge this product with that of the same operand and the
        # weight, and copy the weight for it.
        barrier = jax.lax.optimization_barrier(near.array)  # type: ignore[no-untyped-call]
        return [far, self._thin(near._replace(array=barrier), a, far, kept)]

    def _between(self, first: Term, second: Term, later: str) -> str:
        """The letters of the product of two that a third meets, the rank last."""
        own = dict.fromkeys(second.letters + first.letters)
        own = dict.fromkeys([*(k for k in own if k not in first.letters), *first.letters])
        letters = "".join(k for k in own if k in later and k != _RANK)
        return letters + (_RANK if _RANK in own else "")

    def _thin(self, first: Term, second: Term, far: Term, kept: str) -> Term:
        # Accumulated in float32 whatever it is rounded to, and rounded inside the product.
        array, to = _computed(first.array), _computed(far.array).dtype
        terms = [Term(first.letters, array), Term(second.letters, second.array.astype(array.dtype))]
        return einsum(terms, self._between(first, second, far.letters + kept), to, self.precision)


@dataclasses.dataclass(frozen=True)
class Lookup(Use):
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
        numbers, weight = params["dimension_numbers"], _letters(len(shape))
        indices = [chr(ord("A") + axis) for axis in range(indices_ndim - 1)]
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

    def check(self, piece: Piece, shape: tuple[int, ...]) -> None:
        super().check(piece, shape)
        if piece.view.is_square:
            raise _views.Opaque("is of its square")
        if any(self.axis in self.of(part) for part in piece.view.scales):
            raise _views.Opaque("indexes the axis of a factor")

    def apply(self, array: jax.Array, other: Any) -> jax.Array:
        taken = self._taken(Term(self.weight, array), other)
        return einsum([taken], self.output, array.dtype).array

    def _taken(self, term: Term, indices: jax.Array) -> Term:
        """What is at the indices, where axes that both have are mapped."""
        both = "".join(k for k in self.other if k in term.letters)
        rest = "".join(k for k in term.letters if k not in both)
        new = "".join(k for k in self.other if k not in both)
        array = einsum([term], both + rest, term.array.dtype).array
        order = [self.other.index(k) for k in both + new]
        take = functools.partial(jnp.take, axis=rest.index(self.axis), mode="fill", fill_value=0)
        for _ in both:
            take = jax.vmap(take)
        letters = both + rest.replace(self.axis, new)
        return Term(letters, take(array, indices.transpose(order)))

    def cut(self, piece: Piece, other: Any, bounds: dict[str, tuple[int, int]]) -> Any:
        first, last = bounds[self.axis]
        if self.clips:
            other = jnp.clip(other, 0, self.size - 1)
        other = super().cut(piece, other, bounds)
        return jnp.where((other >= first) & (other < last), other - first, last - first)

    def sketch(self, view: _views.View, d_output: Term, other: Any, a: Term | None) -> Term:
        kept = self.kept(view)
        if self.axis in kept:
            kept = self.other + "".join(k for k in kept if k != self.axis and k not in self.other)
        to = wide(d_output.array.dtype)
        d_output = d_output._replace(array=_computed(d_output.array))
        if a is None:
            return einsum([d_output], kept, to)
        a = a._replace(array=a.array.astype(d_output.array.dtype))
        if self.axis in a.letters:
            a = self._taken(a, other)
        return einsum([d_output, a], kept + _RANK, to)

    def add_sketch(
        self,
        view: _views.View,
        total: jax.Array,
        sketch: Term,
        late: list[Term],
        other: Any,
        source: Source,
    ) -> jax.Array:
        kept = self.kept(view)
        if self.axis not in kept:
            return super().add_sketch(view, total, sketch, late, other, source)
        for scale in late:
            sketch = sketch.times(scale)
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


@dataclasses.dataclass(frozen=True)
class _TwoSided(Use):
    """A use with the projected side wholly at one end: where the result is, or the other operand.

    That end is projected first, and the use itself, the rank in the place of that side, does the
    rest: JAX transposes it.

    Attributes:
      feature: the letter of the weight's axis that the result has.
    """

    feature: str

    def check(self, piece: Piece, shape: tuple[int, ...]) -> None:
        super().check(piece, shape)
        view, columns = piece.view, set(self.of(piece.view.columns))
        sizes = dict(zip(self.weight, view.shape, strict=True))
        if view.shape != shape or set(self.kept(view)) | columns != set(self.weight):
            raise _views.Opaque("is of a part of it")
        behind = {k for k, n in sizes.items() if n > 1 and k not in self.of(view.keys)}
        sides = {self.feature} & behind, behind - {self.feature}
        if view.leaf.rank is not None and {k for k in columns if sizes[k] > 1} not in sides:
            raise _views.Opaque("has the projected side at both ends")

    def transposed(self, other: Any, shape: tuple[int, ...], d_output: jax.Array) -> jax.Array:
        """The cotangent of an array of that shape in the place of the weight."""
        zeros = jax.eval_shape(functools.partial(jnp.zeros, shape, d_output.dtype))
        (own,) = jax.linear_transpose(lambda array: self.apply(array, other), zeros)(d_output)
        wide_own: jax.Array = own.astype(wide(own.dtype))
        return wide_own

    def sketch(self, view: _views.View, d_output: Term, other: Any, a: Term | None) -> Term:
        if a is None:
            own = Term(self.weight, self.transposed(other, view.shape, d_output.array))
            return einsum([own], self.kept(view), own.array.dtype)
        a = a._replace(array=a.array.astype(d_output.array.dtype))
        # The weight's axes, with the rank in the place of the projected side.
        letters = self.weight.replace(self.feature, _RANK)
        sizes = {**dict(zip(self.weight, view.shape, strict=True)), _RANK: view.leaf.rank or 0}
        shape = tuple(sizes[k] for k in letters)
        if self.feature in a.letters:
            thin = self.project(d_output, other, a)
            own = Term(letters, self.transposed(other, shape, thin.array))
            return einsum([own], self.kept(view) + _RANK, own.array.dtype)
        present = "".join(k for k in letters if k in a.letters)
        kernel = einsum([a], present, a.array.dtype).array.reshape(shape)
        thin = Term(self.output.replace(self.feature, _RANK), self.apply(kernel, other))
        return self.correlate(view, d_output, other, thin)

    def project(self, d_output: Term, other: Any, a: Term) -> Term:
        """The cotangent with its features projected, in their place."""
        thin = d_output.letters.replace(self.feature, _RANK)
        return einsum([d_output, a], thin, d_output.array.dtype)

    def correlate(self, view: _views.View, d_output: Term, other: Any, thin: Term) -> Term:
        """The sketch, from the other operand projected."""
        return einsum([d_output, thin], self.kept(view) + _RANK, wide(d_output.array.dtype))


@dataclasses.dataclass(frozen=True)
class Convolution(_TwoSided):
    """A convolution with kernels.

    Attributes:
      params: of the operation, by name.
    """

    params: tuple[tuple[str, Any], ...]

    @classmethod
    def of_equation(cls, ndim: int, params: dict[str, Any]) -> "Convolution":
        """Raise `Opaque` if there are groups of features or examples."""
        if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
            raise _views.Opaque("has groups")
        numbers, weight = params["dimension_numbers"], _letters(ndim)
        places = [chr(ord("A") + axis) for axis in range(2 * ndim)]
        other, output = [""] * ndim, [""] * ndim
        feature, depth = (weight[axis] for axis in numbers.rhs_spec[:2])
        for axis, letter in zip(numbers.lhs_spec, ("A", depth, *places[1:]), strict=False):
            other[axis] = letter
        for axis, letter in zip(numbers.out_spec, ("A", feature, *places[ndim:]), strict=False):
            output[axis] = letter
        own = tuple((k, v) for k, v in sorted(params.items()) if k != "out_sharding")
        return cls(weight, "".join(other), "".join(output), feature, own)

    def apply(self, array: jax.Array, other: Any) -> jax.Array:
        return jax.lax.conv_general_dilated(other, array.astype(other.dtype), **dict(self.params))


@dataclasses.dataclass(frozen=True)
class Ragged(_TwoSided):
    """Rows in groups, each times the matrix of its group; `other` is the rows and the sizes."""

    @classmethod
    def of_equation(cls, params: dict[str, Any]) -> "Ragged":
        """Raise `Opaque` for any other form of it."""
        numbers = params["ragged_dot_dimension_numbers"]
        form = (
            numbers.dot_dimension_numbers,
            tuple(numbers.lhs_ragged_dimensions),
            tuple(numbers.rhs_group_dimensions),
        )
        if form != ((((1,), (1,)), ((), ())), (0,), (0,)) or params["group_offset"] is not None:
            raise _views.Opaque("is no plain ragged_dot")
        return cls("abc", "Ab", "Ac", "c")

    def check(self, piece: Piece, shape: tuple[int, ...]) -> None:
        super().check(piece, shape)
        if piece.view.leaf.rank is not None and self.of(piece.view.keys) != "a":
            raise _views.Opaque("has groups that are no batch axis")
        if piece.view.scales:
            raise _views.Opaque("is of its product with a factor")

    def cut(self, piece: Piece, other: Any, bounds: dict[str, tuple[int, int]]) -> Any:
        return other

    def apply(self, array: jax.Array, other: Any) -> jax.Array:
        rows, sizes = other
        return jax.lax.ragged_dot(rows, array.astype(rows.dtype), sizes)

    def project(self, d_output: Term, other: Any, a: Term) -> Term:
        own = einsum([a], "ac" + _RANK, a.array.dtype).array
        return Term("A" + _RANK, self.apply(own, (d_output.array, other[1])))

    def correlate(self, view: _views.View, d_output: Term, other: Any, thin: Term) -> Term:
        shape = (view.shape[0], view.shape[2], thin.array.shape[1])
        own = self.transposed((d_output.array, other[1]), shape, thin.array)
        return einsum([Term("ac" + _RANK, own)], self.kept(view) + _RANK, own.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def record(
    use: Use,
    pieces: tuple[Piece, ...],
    output: jax.Array,
    totals: dict[int, jax.Array],
    operands: Operands,
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """Let the sketches of the weights in `output` be added to the cotangents of `totals`.

    Returns `output` and `totals` unchanged: a total, by number of the leaf, only carries the sum of
    the sketches backward through the program, from use to use, as a loop carries an accumulator,
    and that is what makes it one buffer, updated in place.
    """
    del use, pieces, operands
    return output, totals


def _forward(
    use: Use, pieces: tuple[Piece, ...], output: jax.Array, totals: Any, operands: Operands
) -> tuple[Any, Operands]:
    return (output, totals), operands


def _backward(use: Use, pieces: tuple[Piece, ...], operands: Operands, cotangents: Any) -> Any:
    d_output, totals = cotangents
    totals, sources = dict(totals), []
    for piece, source in zip(pieces, operands.sources, strict=True):
        add = functools.partial(use.add, piece)
        own = operands._replace(sources=(source,))
        totals[piece.number], d_scales = _meshes.within(
            d_output, add, totals[piece.number], d_output, own
        )
        sources.append(Source(None, None, d_scales))  # type: ignore[arg-type]
    return d_output, totals, Operands(None, None, tuple(sources))


record.defvjp(_forward, _backward)


def _letters(ndim: int) -> str:
    return "".join(chr(ord("a") + axis) for axis in range(ndim))
