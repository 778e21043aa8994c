"""What florax is compared with for quality, and Optax does not have or not for stacked layers."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

Chosen = Callable[[Any, Any], bool]  # of a leaf's path and the leaf
Rate = Callable[[Any], Any]


def galore(
    learning_rate: Rate | float, rank: int, matrices: Chosen
) -> optax.GradientTransformation:
    """Optax's GaLore, with Adam, of matrices; it knows no stacks: use it in `florax.per_layer`."""
    name = jax.tree_util.keystr

    def flat(tree: Any) -> dict[str, Any]:  # it takes no None, which `per_layer` puts for a leaf
        return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def of(params: Any) -> optax.GradientTransformation:
        numbers = {
            name(path): optax.contrib.GaLoreDimensionNumbers() if matrices(path, leaf) else None
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }
        return optax.contrib.galore(learning_rate, rank, weight_dimension_numbers=lambda _: numbers)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = of(params).update(flat(grads), state, flat(params))
        return jax.tree_util.tree_map_with_path(lambda path, _: updates[name(path)], grads), state

    return optax.GradientTransformation(lambda params: of(params).init(flat(params)), update)


# APOLLO.


class ApolloState(NamedTuple):
    count: Array
    first: Any  # moments of the compressed gradients, (..., max(n, m), rank), as Adam has them
    second: Any
    norm: Any  # of the last scaled gradient of each matrix, (..., 1, 1)


def apollo(
    learning_rate: Rate | float,
    rank: int | None,
    matrices: Chosen,
    key: Any,
    resample_every: int = 200,
) -> optax.GradientTransformation:
    """APOLLO (Zhu et al., arXiv:2412.05270): gradients scaled by what Adam does to a sketch.

    Adam's moments are those of R = G P of rank r; a gradient's rows, along its larger side, are
    scaled by ‖Adam(R)‖ / ‖R‖ of theirs. A gradient's norm grows by at most 1.01 a step. What is no
    matrix has Adam itself. A new P is drawn every 200 steps, and the moments stay as they are.

    Args:
      learning_rate: a schedule or a number.
      rank: r; None is APOLLO-Mini: rank 1, one scale a matrix, and that √128 as large.
      matrices: which leaves are, with any leading axes of layers.
      key: of the projections.
      resample_every: steps that share a projection.
    """

    def labels(params: Any) -> Any:
        def label(path: Any, leaf: Any) -> str:
            return "matrix" if matrices(path, leaf) else "other"

        return jax.tree_util.tree_map_with_path(label, params)

    scaled = optax.chain(
        _scale_by_apollo(rank or 1, rank is None, key, resample_every),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.partition({"matrix": scaled, "other": optax.adam(learning_rate)}, labels)


def _scale_by_apollo(
    rank: int, mini: bool, key: Any, resample_every: int
) -> optax.GradientTransformation:
    decays, epsilon, growth = (0.9, 0.999), 1e-6, 1.01

    def compressed(leaf: Array) -> Array:
        *stack, n, m = leaf.shape
        return jnp.zeros((*stack, max(n, m), rank), leaf.dtype)

    def init(params: Any) -> ApolloState:
        moments = jax.tree.map(compressed, params)
        norms = jax.tree.map(lambda p: jnp.zeros((*p.shape[:-2], 1, 1), p.dtype), params)
        return ApolloState(jnp.zeros((), jnp.int32), moments, moments, norms)

    def update(grads: Any, state: ApolloState, params: Any = None) -> tuple[Any, ApolloState]:
        del params
        count, number = state.count + 1, state.count // resample_every
        leaves, treedef = jax.tree.flatten(grads)
        own_key = jax.random.fold_in(key, number)
        keys = [jax.random.fold_in(own_key, i) for i in range(len(leaves))]
        moments = map(treedef.flatten_up_to, (state.first, state.second, state.norm))
        results = [one(*leaf, count) for leaf in zip(leaves, keys, *moments, strict=True)]
        parts = [treedef.unflatten(part) for part in zip(*results, strict=True)]
        return parts[0], ApolloState(count, *parts[1:])

    def one(grad: Array, key: Array, first: Array, second: Array, norm: Array, count: Array) -> Any:
        wide = grad.shape[-2] < grad.shape[-1]
        g = grad.mT if wide else grad  # the larger side first
        sketch = g @ (jax.random.normal(key, (*g.shape[:-2], g.shape[-1], rank)) / math.sqrt(rank))
        first, second = (
            decay * old + (1 - decay) * new
            for decay, old, new in zip(decays, (first, second), (sketch, sketch**2), strict=True)
        )
        means = [x / (1 - decay**count) for x, decay in zip((first, second), decays, strict=True)]
        adam = means[0] / (jnp.sqrt(means[1]) + epsilon)
        axes = (-2, -1) if mini else (-1,)
        g = g * (_norm(adam, axes) / (_norm(sketch, axes) + 1e-8))
        now = _norm(g, (-2, -1))
        limit = jnp.where(norm > 0, jnp.maximum(now / (norm + 1e-8), growth) / growth, 1.0)
        g = g / limit * (math.sqrt(128) if mini else 1.0)
        return g.mT if wide else g, first, second, now / limit

    return optax.GradientTransformation(init, update)


def _norm(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sqrt((x * x).sum(axes, keepdims=True))


# LoRA.


class Adapted(NamedTuple):
    """Parameters with adapters, W + A B, in the place of their matrices."""

    trained: Any  # {"adapters": {name: {"a", "b"}}, "rest": {name: leaf}}, names by path
    frozen: dict[str, Array]  # the matrices
    merge: Callable[[Any, Any], Any]  # of what is trained and what is frozen: the parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """W + A B for a product x @ (W + A B), without W's size in anything else."""

    w: Array
    a: Array
    b: Array

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.w + (x @ self.a) @ self.b


def adapt(
    params: Any,
    rank: int,
    matrices: Chosen,
    key: Array,
    merged: Callable[[Array, Array, Array], Any] = lambda w, a, b: w + a @ b,
) -> Adapted:
    """LoRA without its scale; A as Kaiming et al. draw it, B zero, all but matrices trained.

    `merged` makes of W, A and B what the model takes for a matrix: `Factored`, where that is used
    in products only, takes no memory.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    named = [(jax.tree_util.keystr(path), path, leaf) for path, leaf in leaves]
    frozen = {name: leaf for name, path, leaf in named if matrices(path, leaf)}
    rest = {name: leaf for name, _, leaf in named if name not in frozen}
    adapters = {}
    for i, (name, leaf) in enumerate(frozen.items()):
        *stack, n, m = leaf.shape
        bound = math.sqrt(6 / n)
        own = jax.random.fold_in(key, i)
        a = jax.random.uniform(own, (*stack, n, rank), leaf.dtype, -bound, bound)
        adapters[name] = {"a": a, "b": jnp.zeros((*stack, rank, m), leaf.dtype)}

    def merge(trained: Any, frozen: dict[str, Array]) -> Any:
        rest, adapters = trained["rest"], trained["adapters"]
        return treedef.unflatten(
            merged(frozen[name], **adapters[name]) if name in frozen else rest[name]
            for name, _, _ in named
        )

    return Adapted({"adapters": adapters, "rest": rest}, frozen, merge)


def are_stacked_too(params: Any, is_stacked: Chosen) -> Chosen:
    """Which leaves of what `adapt` trains are stacks, from which parameters are."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = {jax.tree_util.keystr(path) for path, leaf in leaves if is_stacked(path, leaf)}
    return lambda path, leaf: path[1].key in names
