"""Any tree, any settings: compressed leaves are what NumPy says, dense ones what Optax says."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import chex
import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import reference
from hypothesis import strategies as st

import florax
from florax import _dimensions

pytestmark = pytest.mark.slow

SIZES = (5, 8, 3, 9, 6, 2, 1)
DTYPES = ("float16", "bfloat16", "float32", "float64")
STEPS = 4
# A relative rounding, and a few of them for a sum of up to 9³ products, in float32 at least.
EPSILON = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "float64": 2**-24}


class Given(NamedTuple):
    """A leaf: its values over the steps, and how it is to be looked at."""

    shape: tuple[int, ...]
    dtype: str
    numbers: florax.FloraDimensionNumbers | None


class Pair(NamedTuple):
    first: Any
    second: Any


@st.composite
def leaves(draw):
    axes = draw(st.sampled_from((2, 3, 2, 4, 2, 5, 1, 0)))
    shape = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=axes, max_size=axes)))
    while math.prod(shape) > 9**3:
        shape = shape[1:]
    if shape and draw(st.integers(0, 29)) == 29:
        shape = (0, *shape[1:])
    numbers = None
    if len(shape) > 2 or (len(shape) == 2 and draw(st.booleans())):
        axes = draw(st.permutations(range(len(shape))))
        first = draw(st.integers(1, len(axes) - 1))
        second = draw(st.integers(first + 1, len(axes)))
        cut = axes[:first], axes[first:second], axes[second:]
        rows, columns, batch = (tuple(sorted(own)) for own in cut)
        numbers = florax.FloraDimensionNumbers(rows=rows, columns=columns, batch=batch)
    return Given(shape, draw(st.sampled_from(DTYPES)), numbers)


EMPTY = st.sampled_from([None, optax.MaskedNode(), (), {}])


@st.composite
def trees(draw, most):
    """From one leaf to `most`, with what is none between them, in containers of containers."""
    parts = draw(st.lists(leaves(), min_size=1, max_size=most))
    parts += draw(st.lists(EMPTY, max_size=2))
    while len(parts) > 1:
        first, second, *parts = parts
        kind = draw(st.sampled_from(("dict", "list", "pair", "dict in tuple")))
        node = {
            "dict": {"w": first, "b": second},
            "list": [first, second],
            "pair": Pair(first, second),
            "dict in tuple": ({"kernel": first}, second),
        }[kind]
        parts.append(node)
    return parts[0]


LEAVES = trees(3)


def is_given(x):
    return isinstance(x, Given)


class Case:
    """A tree of leaves with values, in the dtypes that it was drawn with."""

    def __init__(self, tree, seed):
        # A leaf is a NamedTuple, a node to JAX: it is looked up by its path.
        flat, self.treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_given)
        self.given = {_dimensions.name(path): leaf for path, leaf in flat}
        draw = np.random.default_rng(seed)
        self.values = {path: _values(draw, leaf) for path, leaf in self.given.items()}

    def tree(self):
        """With a leading axis of steps."""
        return self.treedef.unflatten([jnp.asarray(own) for own in self.values.values()])

    def numbers(self, path, leaf):
        return self.given[_dimensions.name(path)].numbers


def _values(draw, leaf):
    # Of numbers that 16 bits hold exactly, so that the reference sees what the library does.
    values = draw.integers(-64, 65, (STEPS, *leaf.shape)) / 32
    return values.astype(ml_dtypes.bfloat16 if leaf.dtype == "bfloat16" else leaf.dtype)


def view(leaf):
    """The axes of rows, columns and stack; None if it is no matrix."""
    if leaf.numbers is not None:
        return tuple(leaf.numbers.rows), tuple(leaf.numbers.columns), tuple(leaf.numbers.batch)
    return ((0,), (1,), ()) if len(leaf.shape) == 2 else None


def sides(leaf, side):
    """The kept axes, the projected ones and the stack's."""
    rows, columns, batch = view(leaf)
    n, m = (math.prod(leaf.shape[i] for i in axes) for axes in (rows, columns))
    if (n < m) == (side == "smaller") and n != m:
        rows, columns = columns, rows
    return rows, columns, batch


def as_matrices(leaf, side, x):
    kept, projected, batch = sides(leaf, side)
    n, m = (math.prod(leaf.shape[i] for i in axes) for axes in (kept, projected))
    return np.asarray(x, np.float64).transpose(batch + kept + projected).reshape(-1, n, m)


def is_compressed(leaf, rank):
    if view(leaf) is None:
        return False
    rows, columns, batch = view(leaf)
    n, m, stack = (math.prod(leaf.shape[i] for i in axes) for axes in (rows, columns, batch))
    return rank < min(n, m) and stack > 0


def check(case, tx, rank, side, expected_of, dense, cycles):
    """Run `tx` over the steps and compare each leaf with the reference, or Optax's own."""

    @jax.jit
    def run(grads):
        first = jax.tree.map(lambda x: x[0], grads)

        def step(states, grads):
            state, dense_state = states
            updates, state = tx.update(grads, state, grads)
            plain, dense_state = dense.update(grads, dense_state, grads)
            return (state, dense_state), (updates, plain)

        state = tx.init(first)
        # A scan refuses states whose structure, shapes or types an update changes.
        _, outputs = jax.lax.scan(step, (state, dense.init(first)), grads)

        def draw(cycle):
            return dataclasses.replace(state.sketch, cycle=cycle).draw()

        return outputs, jax.lax.map(draw, jnp.arange(cycles, dtype=jnp.int32))

    with jax.enable_x64(True):
        grads = case.tree()
        outputs, drawn = run(grads)
    updates, plain = outputs
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_tree_all_finite(updates)
    for (path, leaf), own, optax_own in zip(
        case.given.items(), jax.tree.leaves(updates), jax.tree.leaves(plain), strict=True
    ):
        if not is_compressed(leaf, rank):
            slack = 4 * EPSILON[leaf.dtype]  # 16-bit momenta are Optax's own, to a rounding
            np.testing.assert_allclose(_wide(own), _wide(optax_own), rtol=slack, atol=slack)
            continue
        given = np.stack([as_matrices(leaf, side, g) for g in case.values[path]])
        projections = np.stack([_flat(a, leaf, side) for a in drawn[path]])
        emitted = np.stack([as_matrices(leaf, side, _wide(u)) for u in own])
        for j in range(given.shape[1]):
            wanted = [x for x, _ in expected_of(list(given[:, j]), projections[:, j])]
            size = max(np.abs(wanted).max(), np.abs(given).max())
            # 16-bit leaves: projections, sketches and updates are rounded, each a few times.
            slack = 64 * EPSILON[leaf.dtype] * size
            np.testing.assert_allclose(emitted[:, j], wanted, atol=slack, rtol=0)


def _wide(x):
    return np.asarray(x).astype(np.float64)


def _flat(a, leaf, side):
    _, projected, batch = sides(leaf, side)
    stack, m = (math.prod(leaf.shape[i] for i in axes) for axes in (batch, projected))
    return np.asarray(a, np.float64).reshape(stack, -1, m)


many = hypothesis.settings(
    max_examples=700,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    derandomize=True,
    database=None,
)


def momentum(tree, residual, nesterov, rank, side, projection, seed, every):
    case = Case(tree, seed)
    kind = dict(residual=residual and projection == "cosine", nesterov=nesterov)
    tx = florax.flora_momentum(
        rank,
        0.75,
        every,
        side=side,
        projection=projection,
        key=seed,
        dimension_numbers=case.numbers,
        **kind,
    )
    expected = functools.partial(reference.momentum, decay=0.75, resample_every=every, **kind)
    dense = nesterov_average() if nesterov else optax.ema(0.75, debias=False)
    check(case, tx, rank, side, expected, dense, STEPS // every + 1)


def nesterov_average():
    """Optax's moving average, of which the next step is already seen."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(grads, state, params=None):
        average = jax.tree.map(lambda m, g: 0.75 * m + 0.25 * g, state, grads)
        return jax.tree.map(lambda m, g: 0.75 * m + 0.25 * g, average, grads), average

    return optax.GradientTransformation(init, update)


def accumulation(tree, mean, rank, side, projection, seed, every):
    case = Case(tree, seed)
    tx = florax.flora_accumulate(
        optax.identity(),
        every,
        rank,
        side=side,
        projection=projection,
        key=seed,
        use_grad_mean=mean,
        dimension_numbers=case.numbers,
    )
    expected = functools.partial(reference.accumulate, every_k=every, mean=mean)
    dense = optax.MultiSteps(optax.identity(), every, use_grad_mean=mean).gradient_transformation()
    check(case, tx, rank, side, expected, dense, STEPS // every + 1)


def few_bits(tree, seed, every, rank, both, dtype, residual):
    """In integers and with both sides, which have other references: nothing is lost or changed."""
    case = Case(tree, seed)
    kind = dict(
        projection="cosine",
        key=seed,
        accumulator_dtype=dtype and jnp.dtype(dtype),
        dimension_numbers=case.numbers,
    )
    transformations = [
        florax.flora_momentum(rank, 0.75, every, residual=residual, **kind),
        florax.flora_accumulate(
            optax.identity(), every, lambda *leaf: rank, side="both" if both else "smaller", **kind
        ),
    ]
    with jax.enable_x64(True):
        grads = case.tree()
        for tx in transformations:

            @jax.jit
            def run(grads, tx=tx):
                def step(state, grads):
                    updates, state = tx.update(grads, state, grads)
                    return state, updates

                return jax.lax.scan(step, tx.init(jax.tree.map(lambda x: x[0], grads)), grads)

            state, updates = run(grads)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
            chex.assert_tree_all_finite((updates, state))


SETTINGS = dict(
    rank=st.integers(1, 4),
    side=st.sampled_from(["smaller", "larger"]),
    projection=st.sampled_from(["gaussian", "cosine"]),
    seed=st.integers(0, 2**16),
    every=st.integers(1, 3),
)
FEW = dict(
    seed=st.integers(0, 2**16),
    every=st.integers(1, 3),
    rank=st.integers(3, 5),
    both=st.booleans(),
    dtype=st.sampled_from([None, "int8", "int4", "int2"]),
    residual=st.booleans(),
)
MOMENTUM = dict(residual=st.booleans(), nesterov=st.booleans(), **SETTINGS)
ACCUMULATION = dict(mean=st.booleans(), **SETTINGS)


@many
@hypothesis.given(tree=LEAVES, **MOMENTUM)
def test_momentum(**given):
    momentum(**given)


@many
@hypothesis.given(tree=LEAVES, **ACCUMULATION)
def test_accumulation(**given):
    accumulation(**given)


@many
@hypothesis.given(tree=LEAVES, **FEW)
def test_few_bits(**given):
    few_bits(**given)
