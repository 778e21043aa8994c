"""What was accumulated of gradients, on the way back to them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from florax import _keys, _leaves, _meshes, _projection, _sketches, _stacks, _stored


class Sum(NamedTuple):
    """What a state has accumulated of one leaf's gradient.

    Attributes:
      leaf: the leaf.
      arrays: its sketch, or, kept dense, the gradient; of a leaf of two sketches both, and once
        they are `solved`, the first and what it and the other projection are multiplied with.
      keys: of the matrices of each projection that is to be drawn, or seeds; or the projections.
      is_right: whether it was accumulated under the settings of the transformation.
    """

    leaf: _leaves.Leaf
    arrays: list[_stored.Stored]
    keys: list[jax.Array]
    is_right: jax.Array | bool = True

    def layer(self, axis: int, index: jax.Array) -> "Sum":
        """That of one layer of a stack along that axis."""
        # Of the first layer's matrices first.
        whole = [own.reshape(self.leaf.shape[axis], -1, own.shape[-1]) for own in self.keys]
        keys, place = _stacks.take(whole, index), self.leaf.kept_axes.index(axis)
        arrays = []
        for array in self.arrays:
            if _stored.is_quantized(array) and place >= array.words.ndim - 1:
                array = _stored.read(array)  # layers and blocks are along the same axis
            arrays.append(_stacks.take(array, index, jax.tree.map(lambda _: place, array)))
        return self._replace(leaf=self.leaf.layer(axis), arrays=arrays, keys=keys)

    def read(self, arrays: Sequence[_stored.Stored]) -> list[jax.Array]:
        """Its arrays, or NaN, as numbers."""
        return [_sketches.where_true(self.is_right, _stored.read(array)) for array in arrays]

    def mean(
        self, projection: jax.Array | None, like: Any, arrays: Sequence[_stored.Stored]
    ) -> jax.Array:
        """The gradient, in the dtype of `like` and divided as it is; of `arrays`, which it has."""
        gradient, *solved = self.read(arrays)
        if solved and projection is not None:
            top, bottom = solved
            gradient = self.leaf.reconstruct(gradient, (top, bottom), projection, like)
        elif projection is not None:
            gradient = self.leaf.decompress(gradient, projection, like)
        if isinstance(like, jax.Array):
            gradient = _meshes.divide_as(gradient, like)
        is_sketch = _sketches.is_sketch(like)
        return gradient.astype(self.leaf.dtype if is_sketch else jnp.result_type(like))


def of(
    sketches: _sketches.Sketches,
    arrays: Sequence[_stored.Stored],
    keys: Mapping[str, jax.Array],
    is_right: jax.Array | bool = True,
) -> list[Sum]:
    """Per leaf, of arrays in the order of `sketches.parts`, and of keys or projections by name."""
    rest = iter(arrays)
    return [
        Sum(
            leaf,
            [next(rest) for _ in leaf.parts],
            [keys[part.path] for part in leaf.parts if part.rank],
            is_right,
        )
        for leaf in sketches.plan
    ]


def draw(sums: Sequence[Sum]) -> list[jax.Array | None]:
    """Per sum, solved, the projection that is still needed; None for what is kept dense."""
    drawn = [own.keys[-1] if own.keys else None for own in sums]
    numbers = [i for i, own in enumerate(drawn) if own is not None and _are_keys(own)]
    if numbers:
        leaves = [sums[i].leaf.parts[-1] for i in numbers]
        own = _keys.draw(leaves, [sums[i].keys[-1] for i in numbers])
        for i, projection in zip(numbers, own, strict=True):
            drawn[i] = projection
    return drawn


def solved(sums: Sequence[Sum]) -> list[Sum]:
    """The same, where every leaf of two sketches is solved for, those that are alike together.

    On a GPU the many small steps of a single matrix would take longer than its products.
    """
    found = list(sums)
    groups: dict[Any, list[int]] = {}
    for i, own in enumerate(sums):
        if len(own.keys) == 2:
            # Stored in integers, what has other axes may have the same type.
            sides = [part.drawn_like for part in own.leaf.parts]
            types = [jax.typeof(x) for x in jax.tree.leaves((own.arrays, own.keys))]
            groups.setdefault((own.leaf.stack_shape, *sides, *types), []).append(i)
    for members in groups.values():
        for i, own in zip(members, _solve([sums[i] for i in members]), strict=True):
            found[i] = own
    return found


# What is there of the largest array of a matrix at a time, in bytes.
_TOGETHER = 2**25


def _solve(sums: Sequence[Sum]) -> list[Sum]:
    """Of leaves that are alike."""
    leaf = sums[0].leaf
    depth, count = len(leaf.batch), leaf.matrices
    each = [[*own.read(own.arrays), *own.keys] for own in sums]
    columns = _meshes.division(each[0][1], range(depth, depth + len(leaf.columns)))
    specs = _meshes.spec((None, None, *columns))

    def of_all(each: list[list[jax.Array]]) -> tuple[jax.Array, jax.Array]:
        flat = [
            [x.reshape(count, *x.shape[1 if _are_keys(x) else depth :]) for x in own]
            for own in each
        ]
        right, left, *keys = (jnp.concatenate(own) for own in zip(*flat, strict=True))
        return _solve_all(leaf, right, left, *keys)

    both = _meshes.into((specs, specs), of_all, each)
    parts = zip(*(jnp.split(x, len(sums)) for x in both), strict=True)
    return [
        own._replace(
            arrays=[own.arrays[0], *(x.reshape(*leaf.stack_shape, *x.shape[1:]) for x in part)],
            keys=own.keys[1:],
        )
        for own, part in zip(sums, parts, strict=True)
    ]


def _solve_all(
    leaf: _leaves.Leaf, right: jax.Array, left: jax.Array, keys: jax.Array, across: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of matrices along the first axis, in three loops over them.

    Factoring small matrices is slow on a GPU unless there are many of them: all B C, which are
    small, come first, and are factored together.
    """
    first, second = leaf.parts
    k, l, n, m = (first.rank, second.rank, second.side, first.side)  # noqa: E741
    assert k is not None and l is not None

    def mix(xs: Any) -> Any:
        right, left, across = xs
        return _projection.mix(right, left, _drawn(second, across))

    def solve(xs: Any) -> Any:
        left, keys, *mixed = xs
        return _projection.solve(left, _drawn(first, keys), n, *mixed)

    mixed, exponents = _map(mix, (right, left, across), l * n)
    bases = _map(_projection.orthonormal, mixed, k * (k + l))
    both: tuple[jax.Array, jax.Array] = _map(solve, (left, keys, mixed, exponents, bases), l * m)
    return both


def _map(function: Callable[[Any], Any], arrays: Any, size: int) -> Any:
    """Over the first axis, as many at once as there may be where one has an array of that size."""
    count, together = len(jax.tree.leaves(arrays)[0]), max(1, _TOGETHER // (4 * size))
    if count <= together:
        return jax.vmap(function)(arrays)
    return jax.lax.map(function, arrays, batch_size=together)


def _drawn(part: _leaves.Leaf, keys: jax.Array) -> jax.Array:
    """From the key, or seed, of one matrix; or what was drawn before."""
    return part.draw_matrix(keys) if _are_keys(keys) else keys


def _are_keys(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.integer))
