"""How a leaf is seen as matrices: its axes, its side and its rank."""

import math

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import DictKey
from numpy.testing import assert_allclose

import florax
from florax import FloraDimensionNumbers as Axes
from florax import _keys, _leaves


def plan(params, rank=3, side="smaller", projection="gaussian", dimension_numbers=None):
    return _leaves.Plan(rank, side, projection, dimension_numbers)(params)


def shapes_of(**shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def normal_projection(leaf):
    """Of the shape of those that are drawn for the leaf."""
    keys = jax.ShapeDtypeStruct((leaf.matrices, 2), jnp.uint32)
    (shape,) = (a.shape for a in jax.eval_shape(lambda keys: _keys.draw([leaf], [keys]), keys))
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32) / 2


# --- axes

# The leaf's shape, its axes, and the shape of the stack of matrices that they make of it.
GEOMETRIES = {
    "matrix": ((12, 20), Axes(0, 1), (1, 12, 20)),
    "matrix_transposed": ((12, 20), Axes(1, 0), (1, 20, 12)),
    "attention_in": ((24, 4, 5), Axes(rows=0, columns=(1, 2)), (1, 24, 20)),
    "attention_out": ((4, 5, 24), Axes(rows=(0, 1), columns=2), (1, 20, 24)),
    "conv_by_position": ((3, 2, 8, 12), Axes(2, 3, batch=(0, 1)), (6, 8, 12)),
    "conv_positions_in_rows": ((3, 2, 8, 12), Axes((0, 1, 2), 3), (1, 48, 12)),
    "conv_positions_in_columns": ((3, 2, 8, 12), Axes(3, (0, 1, 2)), (1, 12, 48)),
    "layers": ((3, 12, 20), Axes(1, 2, batch=0), (3, 12, 20)),
    "layers_last": ((12, 20, 3), Axes(0, 1, batch=2), (3, 12, 20)),
    "layers_of_experts": ((2, 3, 12, 20), Axes(2, 3, batch=(0, 1)), (6, 12, 20)),
    "layers_of_attention": ((3, 24, 4, 5), Axes(1, (2, 3), batch=0), (3, 24, 20)),
    "axes_in_another_order": ((2, 3, 4, 5, 24), Axes((3, 2), 4, batch=(1, 0)), (6, 20, 24)),
}


@pytest.fixture(params=GEOMETRIES.values(), ids=GEOMETRIES.keys())
def geometry(request):
    return request.param


@pytest.mark.parametrize("side", ["smaller", "larger"])
def test_a_leaf_is_a_stack_of_matrices_each_with_a_projection_of_its_own(geometry, side):
    shape, axes, (stack, n, m) = geometry
    (leaf,) = plan(jnp.zeros(shape), side=side, dimension_numbers=axes)
    if (n < m) == (side == "smaller"):  # the other side is projected
        n, m = m, n
    order = leaf.batch + leaf.rows + leaf.columns
    gradient = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    matrices = gradient.transpose(order).reshape(stack, n, m).astype(np.float64)

    projection = normal_projection(leaf)
    a = projection.reshape(stack, 3, m).astype(np.float64)
    sketch = leaf.compress(gradient, projection)
    assert sketch.shape == leaf.stored_shape
    expected = matrices @ a.transpose(0, 2, 1)
    # Sums of at most 48 float32 products of size 1.
    assert_allclose(np.reshape(sketch, (stack, n, 3)), expected, atol=1e-5)

    again = leaf.decompress(sketch, projection)
    assert again.shape == shape
    again = again.transpose(order).reshape(stack, n, m)
    assert_allclose(again, expected @ a, atol=1e-5)

    moved = leaf.transfer(sketch, projection, projection)
    assert_allclose(
        np.reshape(moved, (stack, n, 3)), expected @ a @ a.transpose(0, 2, 1), atol=1e-4
    )


@pytest.mark.parametrize("side", ["smaller", "larger"])
def test_a_stack_is_compressed_as_its_matrices_would_be_alone(side):
    (stack,) = plan(jnp.zeros((2, 3, 12, 20)), side=side, dimension_numbers=Axes(2, 3, (0, 1)))
    (alone,) = plan(jnp.zeros((12, 20)), side=side)
    gradient = draws.normal(0, *stack.shape)
    a = normal_projection(stack)
    sketch = stack.compress(gradient, a)
    again = stack.decompress(sketch, a)
    for i in np.ndindex(2, 3):
        # The same sums of at most 20 products of size 1 in another order.
        assert_allclose(sketch[i], alone.compress(gradient[i], a[i]), atol=1e-5)
        assert_allclose(again[i], alone.decompress(sketch[i], a[i]), atol=1e-5)


def test_negative_axes_count_from_the_end(geometry):
    shape, axes, _ = geometry
    groups = (axes.rows, axes.columns, axes.batch)
    negative = Axes(*(tuple(axis - len(shape) for axis in group) for group in groups))
    leaf = jnp.zeros(shape)
    assert plan(leaf, dimension_numbers=negative) == plan(leaf, dimension_numbers=axes)


def test_the_order_of_axes_that_are_taken_together_plays_no_part():
    leaf = jnp.zeros((2, 3, 4, 5, 24))
    one, other = Axes((2, 3), 4, batch=(0, 1)), Axes((3, 2), 4, batch=(1, 0))
    assert plan(leaf, dimension_numbers=one) == plan(leaf, dimension_numbers=other)


@pytest.mark.parametrize("shape", [(), (8,), (3, 12, 20), (3, 2, 8, 12)])
def test_without_dimension_numbers_only_leaves_of_two_axes_are_compressed(shape):
    (leaf,) = plan(jnp.zeros(shape))
    assert leaf.rank is None and leaf.stored_shape == shape
    assert leaf.reason.startswith(f"{len(shape)}-D")


# --- side and rank


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("side, projected", [("smaller", 12), ("larger", 20)])
def test_the_named_side_is_projected_whichever_axis_it_is(shape, side, projected):
    (leaf,) = plan(jnp.zeros(shape), side=side)
    assert [shape[axis] for axis in leaf.columns] == [projected]
    assert leaf.stored_shape == (12 + 20 - projected, 3)


@pytest.mark.parametrize("side", ["smaller", "larger"])
def test_of_a_square_the_columns_are_projected(side):
    (leaf,) = plan(jnp.zeros((12, 12)), side=side)
    assert leaf.columns == (1,)


@pytest.mark.parametrize("side", ["smaller", "larger"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_rank_compresses_if_it_is_below_both_sides(shape, side):
    (below,) = plan(jnp.zeros(shape), rank=11, side=side)
    (not_below,) = plan(jnp.zeros(shape), rank=12, side=side)
    assert below.rank == 11
    assert (not_below.rank, not_below.reason) == (None, f"rank 12 ≥ min{shape}")


NETWORK = {
    "embed": jax.ShapeDtypeStruct((50, 20), jnp.float32),
    "layers": [shapes_of(kernel=(12, 20), bias=(20,)), shapes_of(kernel=(20, 12), bias=(12,))],
    "nothing": None,
}


def rank_by_path(path, leaf):
    return None if path[0] == DictKey("embed") else 4


RANKS = {
    "function": rank_by_path,
    "prefix": {"embed": None, "layers": 4, "nothing": None},
    "prefix_of_layers": {"embed": None, "layers": [4, 4], "nothing": None},
    "tree": {"embed": None, "layers": [{"kernel": 4, "bias": 4}] * 2, "nothing": None},
    "numpy": {"embed": None, "layers": np.int64(4), "nothing": None},
}


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS.keys())
def test_a_rank_may_be_a_function_or_a_tree_or_a_prefix_of_one(rank):
    found = {leaf.path: (leaf.rank, leaf.reason) for leaf in plan(NETWORK, rank=rank)}
    assert found == {
        "['embed']": (None, "rank is None"),
        "['layers'][0]['bias']": (None, "1-D"),
        "['layers'][0]['kernel']": (4, ""),
        "['layers'][1]['bias']": (None, "1-D"),
        "['layers'][1]['kernel']": (4, ""),
    }


EXPERTS = Axes(rows=2, columns=3, batch=(0, 1))
MODEL = {"experts": shapes_of(up=(2, 3, 12, 20), down=(2, 3, 20, 12)), "head": jnp.zeros((20, 50))}
DIMENSION_NUMBERS = {
    "function": lambda path, leaf: EXPERTS if len(leaf.shape) == 4 else None,
    "prefix": {"experts": EXPERTS, "head": None},
    "tree": {"experts": {"up": EXPERTS, "down": EXPERTS}, "head": Axes(0, 1)},
}


@pytest.mark.parametrize("given", DIMENSION_NUMBERS.values(), ids=DIMENSION_NUMBERS.keys())
def test_dimension_numbers_may_be_a_function_or_a_tree_or_a_prefix_of_one(given):
    found = {
        leaf.path: (leaf.batch, leaf.rows, leaf.columns)
        for leaf in plan(MODEL, dimension_numbers=given)
    }
    assert found == {
        "['experts']['down']": ((0, 1), (2,), (3,)),
        "['experts']['up']": ((0, 1), (3,), (2,)),  # the smaller side is the first
        "['head']": ((), (1,), (0,)),
    }


def test_one_value_for_dimension_numbers_holds_for_every_leaf():
    leaves = plan(MODEL["experts"], dimension_numbers=EXPERTS)
    assert [leaf.batch for leaf in leaves] == [(0, 1), (0, 1)]


def test_functions_are_given_the_path_and_the_leaf():
    seen = []

    def rank(path, leaf):
        seen.append((path, leaf.shape))

    plan(MODEL, rank=rank)
    assert seen == [
        ((DictKey("experts"), DictKey("down")), (2, 3, 20, 12)),
        ((DictKey("experts"), DictKey("up")), (2, 3, 12, 20)),
        ((DictKey("head"),), (20, 50)),
    ]


def test_the_same_decision_is_taken_by_every_transformation():
    """What is decided once, from shapes, is what both keep in their states."""
    params = shapes_of(kernel=(12, 20), stack=(3, 12, 20), bias=(20,))
    expected = plan(params, projection="cosine")
    momentum = jax.eval_shape(florax.flora_momentum(3).init, params)
    flora = jax.eval_shape(florax.flora(0.1, 3).init, params)
    assert momentum.sketch.plan == flora[1].sketch.plan == expected
    for leaf, array in zip(expected, momentum.sketch.leaves(), strict=True):
        assert array.shape == leaf.stored_shape
        assert math.prod(leaf.stored_shape) <= math.prod(leaf.shape)


def test_lists_and_tuples_name_their_leaves_alike():
    assert plan([jnp.zeros((12, 20))]) == plan((jnp.zeros((12, 20)),))
