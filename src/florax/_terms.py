"""Arrays whose axes have names, letters as in an einsum, and sums of their products."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from florax import _meshes

RANK = "Z"  # the letter of a sketch's last axis


def letters(ndim: int) -> str:
    """Of an array's axes."""
    return "".join(chr(ord("a") + axis) for axis in range(ndim))


def others(ndim: int) -> list[str]:
    """Of the axes of another array."""
    return [chr(ord("A") + axis) for axis in range(ndim)]


class Term(NamedTuple):
    """An array whose axes have names: letters, as in an einsum."""

    letters: str
    array: jax.Array

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


def computed(array: jax.Array) -> jax.Array:
    """In a dtype that products are taken in: of 8-bit floats, bfloat16, which has all of them."""
    return array.astype(jnp.bfloat16) if array.dtype.itemsize == 1 else array
