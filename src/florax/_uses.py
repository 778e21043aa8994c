"""The uses of a weight, and the backward rules by which each adds to the weight's sketch.

A use is linear in the weight: output = Σ W · other. Its part of the weight's gradient is
Σ d_output · other, and with the projections A its part of the sketch is, for y = x W,

    xᵀ (dy Aᵀ)        or, where the projected side is the contracted one,        (x Aᵀ)ᵀ dy:

fewer operations than the gradient, and no array of the weight's size. A use that is no product is
one with nothing, of W itself: the cotangent of that use exists, and is compressed on the spot.
"""

import abc
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from florax import _meshes, _pieces, _terms, _views


class Source(NamedTuple):
    """What the sketch of a part of a weight is made with.

    Attributes:
      keys: of all matrices of the leaf, or seeds, shape `(n, words)`, or in a row with those of
        others, `(words,)`; or, of a single one, its projection, shape `(rank, *columns)`, float32.
      positions: the places at which parts were taken, as far as they are traced.
      scales: the factors by which it is multiplied.
    """

    keys: jax.Array
    positions: tuple[jax.Array, ...] = ()
    scales: tuple[jax.Array, ...] = ()


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
class Use(abc.ABC):
    """A way to use an array of weights; static.

    Attributes:
      weight: the letters of the array's axes.
      other: the letters of the other operand's axes; empty if there is none.
      output: the letters of the result's axes.
    """

    weight: str
    other: str
    output: str

    @abc.abstractmethod
    def apply(self, array: jax.Array, other: Any) -> jax.Array:
        """The result with another array in the place of the weight."""

    @abc.abstractmethod
    def sketch(
        self, view: _views.View, d_output: _terms.Term, other: Any, a: _terms.Term | None
    ) -> _terms.Term:
        """The sketch of what is in view; without projections, its gradient."""

    def check(self, piece: _pieces.Piece, shape: tuple[int, ...]) -> None:
        """Raise `Opaque` if a piece of an array of that shape cannot be followed into the use."""
        for part in piece.view.scales:
            self._place(piece.view, part)
            if not self.has_gradient(self.of(part)):
                raise _views.Opaque("is of its product with a factor along another axis")
        if piece.view.is_square and self.other:
            raise _views.Opaque("is of its square")

    def has_gradient(self, letters: str) -> bool:
        """Whether `_d_scale` can give that of a factor along these axes."""
        return set(letters) <= set(self.output)

    def is_dense(self, view: _views.View) -> bool:
        """Whether the cotangent of the result has all of a compressed matrix that is in view."""
        long = {k for k, n in zip(self.weight, view.shape, strict=True) if n > 1}
        rows = set(self.kept(view)) & long - set(self.of(view.keys))
        columns = set(self.of(view.columns)) & long
        is_matrix = view.leaf.rank is not None and rows and columns
        return bool(is_matrix and rows | columns <= set(self.output))

    def of(self, part: _views.Part) -> str:
        """The letters of a part's axes."""
        return "".join(self.weight[axis] for axis in part.order())

    def kept(self, view: _views.View) -> str:
        """The letters of what is kept."""
        return self.of(view.sketch)

    def cut(self, piece: _pieces.Piece, other: Any, bounds: dict[str, tuple[int, int]]) -> Any:
        """The other operand as the piece meets it."""
        return None if other is None else _terms.Term(self.other, other).cut(bounds).array

    def add(
        self, piece: _pieces.Piece, total: jax.Array, d_output: jax.Array, operands: Operands
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The total with the sketch of a piece added; the cotangents of its factors."""
        view, (source,) = piece.view, operands.sources
        corners = zip(self.weight, piece.offset, view.shape, strict=True)
        bounds = {letter: (first, first + size) for letter, first, size in corners}
        dy = _terms.Term(self.output, d_output).cut(bounds)
        other = self.cut(piece, operands.other, bounds)
        root = (
            None
            if operands.root is None
            else _terms.Term(self.weight, operands.root).cut(bounds).array
        )
        scales = [
            _terms.Term(self.of(part), part.take(scale, source.positions))
            for part, scale in zip(view.scales, source.scales, strict=True)
        ]
        d_scales = [jnp.zeros_like(scale) for scale in source.scales]
        # Of two sketches of the same weight one gives them.
        if root is not None and not view.leaf.is_across:
            for number, d_scale in self._d_scales(piece, dy, other, root, scales).items():
                d_scales[number] = view.scales[number].update(
                    d_scales[number], source.positions, functools.partial(_replaced, new=d_scale)
                )

        late = []  # factors of the sketch
        if view.is_square:  # the derivative is 2 W
            other, late = root, [_terms.Term("", jnp.float32(2))]
        a = None
        if view.leaf.rank is not None:
            letters = self.of(view.keys) + _terms.RANK + self.of(view.columns)
            a = _terms.Term(letters, view.draw(source.keys, source.positions))
        for part, scale in zip(view.scales, scales, strict=True):
            place = self._place(view, part)
            if place == "late":
                late.append(scale)
            elif place == "projections" and a is not None:
                a = a.times(scale)
            elif place == "output":
                dy = dy.times(scale)
            else:
                other = _terms.Term(self.other, other).times(scale).array
        sketch = self.sketch(view, dy, other, a)
        for scale in late:
            sketch = sketch.times(scale)
        return self.add_sketch(view, total, sketch, other, source), tuple(d_scales)

    def add_sketch(
        self, view: _views.View, total: jax.Array, sketch: _terms.Term, other: Any, source: Source
    ) -> jax.Array:
        """Add to the total what `sketch` gave."""
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
        self,
        piece: _pieces.Piece,
        dy: _terms.Term,
        other: Any,
        root: jax.Array,
        scales: list[_terms.Term],
    ) -> dict[int, jax.Array]:
        """The cotangents of the factors, by one more product each: no gradient of the weight."""
        found = {}
        for number in range(piece.baked, len(scales)):
            array, own_dy, own_other = _terms.Term(self.weight, root), dy, other
            if piece.view.is_square:
                array = array.times(array)
            for scale in (*scales[piece.baked : number], *scales[number + 1 :]):
                if set(scale.letters) <= set(self.output):
                    own_dy = own_dy.times(scale)
                elif set(scale.letters) <= set(self.other):
                    own_other = _terms.Term(self.other, own_other).times(scale).array
                else:
                    array = array.times(scale)
            own = self._d_scale(scales[number].letters, own_dy, own_other, array)
            found[number] = own.array
        return found

    def _d_scale(
        self, letters: str, dy: _terms.Term, other: Any, array: _terms.Term
    ) -> _terms.Term:
        result = _terms.Term(self.output, self.apply(array.array, other))
        return _terms.einsum([dy, result], letters, _terms.wide(dy.array.dtype))


def _replaced(old: jax.Array, new: jax.Array) -> jax.Array:
    return new.astype(old.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def record(
    use: Use,
    pieces: tuple[_pieces.Piece, ...],
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
    use: Use, pieces: tuple[_pieces.Piece, ...], output: jax.Array, totals: Any, operands: Operands
) -> tuple[Any, Operands]:
    return (output, totals), operands


def _backward(
    use: Use, pieces: tuple[_pieces.Piece, ...], operands: Operands, cotangents: Any
) -> Any:
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
