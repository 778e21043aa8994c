"""Convolutions, and products of rows in groups: uses that JAX itself transposes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from florax import _pieces, _terms, _uses, _views


@dataclasses.dataclass(frozen=True)
class _TwoSided(_uses.Use):
    """A use with the projected side wholly at one end: where the result is, or the other operand.

    That end is projected first, and the use itself, the rank in the place of that side, does the
    rest: JAX transposes it.

    Attributes:
      feature: the letter of the weight's axis that the result has.
    """

    feature: str

    def check(self, piece: _pieces.Piece, shape: tuple[int, ...]) -> None:
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
        wide_own: jax.Array = own.astype(_terms.wide(own.dtype))
        return wide_own

    def sketch(
        self, view: _views.View, d_output: _terms.Term, other: Any, a: _terms.Term | None
    ) -> _terms.Term:
        if a is None:
            own = _terms.Term(self.weight, self.transposed(other, view.shape, d_output.array))
            return _terms.einsum([own], self.kept(view), own.array.dtype)
        a = a._replace(array=a.array.astype(d_output.array.dtype))
        # The weight's axes, with the rank in the place of the projected side.
        letters = self.weight.replace(self.feature, _terms.RANK)
        sizes = {
            **dict(zip(self.weight, view.shape, strict=True)),
            _terms.RANK: view.leaf.rank or 0,
        }
        shape = tuple(sizes[k] for k in letters)
        if self.feature in a.letters:
            thin = self.project(d_output, other, a)
            own = _terms.Term(letters, self.transposed(other, shape, thin.array))
            return _terms.einsum([own], self.kept(view) + _terms.RANK, own.array.dtype)
        present = "".join(k for k in letters if k in a.letters)
        kernel = _terms.einsum([a], present, a.array.dtype).array.reshape(shape)
        thin = _terms.Term(
            self.output.replace(self.feature, _terms.RANK), self.apply(kernel, other)
        )
        return self.correlate(view, d_output, other, thin)

    def project(self, d_output: _terms.Term, other: Any, a: _terms.Term) -> _terms.Term:
        """The cotangent with its features projected, in their place."""
        thin = d_output.letters.replace(self.feature, _terms.RANK)
        return _terms.einsum([d_output, a], thin, d_output.array.dtype)

    def correlate(
        self, view: _views.View, d_output: _terms.Term, other: Any, thin: _terms.Term
    ) -> _terms.Term:
        """The sketch, from the other operand projected."""
        return _terms.einsum(
            [d_output, thin], self.kept(view) + _terms.RANK, _terms.wide(d_output.array.dtype)
        )


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
        numbers, weight = params["dimension_numbers"], _terms.letters(ndim)
        places = _terms.others(2 * ndim)
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

    def check(self, piece: _pieces.Piece, shape: tuple[int, ...]) -> None:
        super().check(piece, shape)
        if piece.view.leaf.rank is not None and self.of(piece.view.keys) != "a":
            raise _views.Opaque("has groups that are no batch axis")

    def cut(self, piece: _pieces.Piece, other: Any, bounds: dict[str, tuple[int, int]]) -> Any:
        return other

    def apply(self, array: jax.Array, other: Any) -> jax.Array:
        rows, sizes = other
        return jax.lax.ragged_dot(rows, array.astype(rows.dtype), sizes)

    def project(self, d_output: _terms.Term, other: Any, a: _terms.Term) -> _terms.Term:
        own = _terms.einsum([a], "ac" + _terms.RANK, a.array.dtype).array
        return _terms.Term("A" + _terms.RANK, self.apply(own, (d_output.array, other[1])))

    def correlate(
        self, view: _views.View, d_output: _terms.Term, other: Any, thin: _terms.Term
    ) -> _terms.Term:
        shape = (view.shape[0], view.shape[2], thin.array.shape[1])
        own = self.transposed((d_output.array, other[1]), shape, thin.array)
        return _terms.einsum(
            [_terms.Term("ac" + _terms.RANK, own)], self.kept(view) + _terms.RANK, own.dtype
        )
