"""Products, sums and the weight itself: what `dot_general` and `reduce_sum` make of a weight."""

import dataclasses
import math
from typing import Any

import jax

from florax import _terms, _uses, _views


@dataclasses.dataclass(frozen=True)
class Product(_uses.Use):
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
        weight = _terms.letters(ndim)
        other = _terms.others(other_ndim)
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
        weight = _terms.letters(ndim)
        return cls(weight, "", "".join(weight[i] for i in range(ndim) if i not in axes))

    def apply(self, array: jax.Array, other: Any) -> jax.Array:
        terms = [
            _terms.Term(self.weight, array),
            *([] if other is None else [_terms.Term(self.other, other)]),
        ]
        return _terms.einsum(terms, self.output, _terms.wide(array.dtype), self.precision).array

    def has_gradient(self, letters: str) -> bool:
        return not self.other or set(letters) <= set(self.other) or super().has_gradient(letters)

    def _d_scale(
        self, letters: str, dy: _terms.Term, other: Any, array: _terms.Term
    ) -> _terms.Term:
        to = _terms.wide(dy.array.dtype)
        if other is None:
            return _terms.einsum([dy, array], letters, to)
        if set(letters) <= set(self.output):
            return super()._d_scale(letters, dy, other, array)
        d_other = _terms.einsum([dy, array], self.other, to, self.precision)
        return _terms.einsum([d_other, _terms.Term(self.other, other)], letters, to)

    def sketch(
        self, view: _views.View, d_output: _terms.Term, other: Any, a: _terms.Term | None
    ) -> _terms.Term:
        kept, terms = self.kept(view), [d_output]
        if other is not None:
            terms.append(_terms.Term(self.weight if view.is_square else self.other, other))
        to = _terms.wide(terms[-1].array.dtype)
        if a is not None:
            kept += _terms.RANK
            terms = self._ordered(terms, a, set(self.of(view.columns)), kept)
        there = "".join(k for k in kept if any(k in term.letters for term in terms))
        sketch = _terms.einsum(terms, there, to, self.precision)
        if there == kept:
            return sketch
        # Along axes that were summed over it is the same everywhere.
        shape = [*(view.shape[self.weight.index(k)] for k in kept if k != _terms.RANK)]
        shape += [view.leaf.rank] if view.leaf.rank is not None else []
        axes = tuple(kept.index(k) for k in there)
        return _terms.Term(kept, jax.lax.broadcast_in_dim(sketch.array, shape, axes))

    def _ordered(
        self, terms: list[_terms.Term], a: _terms.Term, columns: set[str], kept: str
    ) -> list[_terms.Term]:
        """The last two factors of the three, or all if they are two; the others multiplied."""
        near, *rest = terms
        if not rest:
            return [near._replace(array=_terms.computed(near.array)), a]
        (far,) = rest
        if columns & set(far.letters):
            if columns & set(near.letters):
                # The projected side is an axis of both: whichever takes the fewest operations.
                def cost(first: _terms.Term, second: _terms.Term, third: _terms.Term) -> int:
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

    def _between(self, first: _terms.Term, second: _terms.Term, later: str) -> str:
        """The letters of the product of two that a third meets, the rank last."""
        own = dict.fromkeys(second.letters + first.letters)
        own = dict.fromkeys([*(k for k in own if k not in first.letters), *first.letters])
        letters = "".join(k for k in own if k in later and k != _terms.RANK)
        return letters + (_terms.RANK if _terms.RANK in own else "")

    def _thin(
        self, first: _terms.Term, second: _terms.Term, far: _terms.Term, kept: str
    ) -> _terms.Term:
        # Accumulated in float32 whatever it is rounded to, and rounded inside the product.
        array, to = _terms.computed(first.array), _terms.computed(far.array).dtype
        terms = [
            _terms.Term(first.letters, array),
            _terms.Term(second.letters, second.array.astype(array.dtype)),
        ]
        return _terms.einsum(
            terms, self._between(first, second, far.letters + kept), to, self.precision
        )
