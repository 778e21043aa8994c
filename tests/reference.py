"""Both algorithms of the paper for one matrix, in NumPy and float64, written from its equations.

The projections are given: `projections[cycle]` is A, shape (rank, m), for the matrix with its
projected side last.
"""

import numpy as np


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
