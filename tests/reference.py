"""Both algorithms of the paper for one matrix, in NumPy and float64, written from its equations.

The projections are given: `projections[cycle]` is A, shape (rank, m), for the matrix with its
projected side last.
"""

import dataclasses

import jax
import numpy as np

import florax

# Leaves that show every case: (shape, axes of rows, columns and stack).
LEAVES = {
    "tall": ((20, 12), (0,), (1,), ()),
    "wide": ((12, 20), (0,), (1,), ()),
    "stacked": ((3, 12, 20), (1,), (2,), (0,)),
}


def dimension_numbers(path, leaf):
    """`FloraDimensionNumbers` of a tree of `LEAVES`."""
    return florax.FloraDimensionNumbers(*LEAVES[path[0].key][1:])


def matrices(name, side, x):
    """A leaf as its stack of matrices, projected side last, in float64: (stack, n, m)."""
    shape, rows, columns, batch = LEAVES[name]
    smaller_first = shape[rows[0]] < shape[columns[0]]
    if smaller_first == (side == "smaller"):
        rows, columns = columns, rows
    x = np.asarray(x, np.float64).transpose(batch + rows + columns)
    return x.reshape(-1, *x.shape[-2:])


def projections(state, cycles, of=""):
    """A of every leaf, in float64: a dict of (cycle, stack, rank, m); B of " across"."""
    draw = jax.jit(lambda cycle: dataclasses.replace(state.sketch, cycle=cycle).draw())
    drawn = [draw(cycle) for cycle in range(cycles)]

    def of_leaf(path):
        of_cycles = [np.asarray(matrices[path], np.float64) for matrices in drawn]
        return np.stack([a.reshape(-1, *a.shape[-2:]) for a in of_cycles])

    return {name: of_leaf(f"['{name}']{of}") for name in LEAVES}


def relative_error(got, wanted):
    """Distance over length, 0 where both are zero."""
    distance = np.linalg.norm(np.asarray(got, np.float64) - wanted)
    return distance / np.linalg.norm(wanted) if distance else 0.0


def momentum(grads, projections, decay, resample_every, *, residual=False, nesterov=False):
    """Algorithm 2: yields (emitted update, sketch) for each of `grads`, each of shape (n, m).

    The sketch is yielded as the next step finds it: resampled, where that step starts a cycle.
    """
    sketch = np.zeros((grads[0].shape[0], projections[0].shape[0]))
    for t, grad in enumerate(grads):
        a = projections[t // resample_every]
        sketch = decay * sketch + (1 - decay) * grad @ a.T
        ahead = decay * sketch + (1 - decay) * grad @ a.T if nesterov else sketch
        update = ahead @ a + (grad - grad @ a.T @ a if residual else 0)
        if (t + 1) % resample_every == 0:
            sketch = sketch @ a @ projections[t // resample_every + 1].T
        yield update, sketch


def accumulate(grads, projections, every_k, *, mean=True):
    """Algorithm 1 in front of the identity: yields (emitted update, sketch), as `grads` come in."""
    sketch = np.zeros((grads[0].shape[0], projections[0].shape[0]))
    for t, grad in enumerate(grads):
        a = projections[t // every_k]
        sketch = sketch + grad @ a.T
        if (t + 1) % every_k == 0:
            yield sketch @ a / (every_k if mean else 1), np.zeros_like(sketch)
            sketch = np.zeros_like(sketch)
        else:
            so_far = t % every_k + 1
            yield np.zeros_like(grad), sketch / (so_far if mean else 1)


def reconstruct(right, left, a, b):
    """G̃ of C = G Aᵀ, `right`, and of (B G)ᵀ, `left`: by least squares with rows for the penalty."""
    k, l, n = len(a), len(b), b.shape[1]  # noqa: E741
    seen = b @ right
    rest = left.T - seen @ a
    y, *_ = np.linalg.lstsq(seen, rest)
    variance = np.sum((rest - seen @ y) ** 2) / ((l - k) * rest.shape[1])
    penalized = np.concatenate([seen, np.sqrt(k * variance) * np.eye(k)])
    pseudoinverse = np.linalg.pinv(penalized)[:, :l]
    y = pseudoinverse @ rest
    guess = right @ (a + y)
    explained = np.trace(seen @ pseudoinverse)
    return guess + n / (l - explained) * b.T @ (left.T - b @ guess)


def accumulate_both(grads, projections, across, every_k, *, mean=True):
    """As `accumulate`, with both sides projected: a pair in the place of the sketch."""
    total, zero = 0, np.zeros_like(grads[0])
    for t, grad in enumerate(grads):
        a, b, so_far = projections[t // every_k], across[t // every_k], t % every_k + 1
        total = total + grad
        kept = total / (so_far if mean else 1)
        pair = (kept @ a.T, kept.T @ b.T)
        if so_far == every_k:
            yield reconstruct(*pair, a, b), tuple(0 * x for x in pair)
            total = 0
        else:
            yield zero, pair
