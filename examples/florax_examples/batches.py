"""Which examples a micro-batch holds: known from the seed and its number alone."""

import functools
from typing import Any

import jax
import numpy as np


class Shuffled:
    """Endless micro-batches of the rows of `data`, each epoch in a new order.

    Args:
      data: a tree of arrays that share their first axis, the examples.
      size: examples in a micro-batch. What is left over at the end of an epoch is left out.
      seed: of the orders.
    """

    def __init__(self, data: Any, size: int, seed: int):
        self.data, self.size, self.seed = data, size, seed
        self.examples = count(data)
        if size > self.examples:
            raise ValueError(f"a micro-batch of {size} needs as many examples, got {self.examples}")
        self.per_epoch = self.examples // size
        self._order = functools.lru_cache(2)(self._draw)

    def __getitem__(self, number: int) -> Any:
        epoch, index = divmod(number, self.per_epoch)
        rows = self._order(epoch)[index * self.size :][: self.size]
        return jax.tree.map(lambda x: x[rows], self.data)

    def stacked(self, first: int, number: int) -> Any:
        """`number` of them from the `first` on, with a leading axis of micro-batches."""
        batches = [self[first + i] for i in range(number)]
        return jax.tree.map(lambda *x: np.stack(x), *batches)

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.examples)


def count(data: Any) -> int:
    """The number of examples."""
    return len(jax.tree.leaves(data)[0])


def in_order(data: Any, size: int) -> Any:
    """All examples in batches of `size`, with a mask of the real ones: the last is filled up."""
    total = count(data)
    for start in range(0, total, size):
        rows = np.arange(start, start + size)
        yield jax.tree.map(lambda x, rows=rows: x[rows % total], data), rows < total
