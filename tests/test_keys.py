"""Keys and projections of many leaves, made together, are those of each."""

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_array_equal

from florax import _dimensions, _keys, _leaves

SHAPES = {"a": (6, 9), "b": (3, 6, 9), "c": (9, 12), "d": (6, 9), "e": (6, 9)}


def leaves(projection):
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    return _leaves.Plan(2, "smaller", projection, None)(
        params, stacks={_dimensions.names(params)[1]: 0}
    )


def keys_of(plan):
    words = [jnp.array(_keys.words(leaf.path)) for leaf in plan]
    return _keys.of_all_matrices(plan, words, _keys.base_key(0), 3)


@pytest.mark.parametrize("projection", [pytest.param("gaussian", marks=pytest.mark.slow), "cosine"])
@pytest.mark.parametrize(
    "limit", [250, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 100, float("inf")))]
)
def test_projections_do_not_depend_on_what_is_drawn_with_them(projection, limit):
    plan = leaves(projection)
    keys = keys_of(plan)
    drawn = jax.jit(lambda keys: _keys.draw_all(plan, keys, limit))(keys)
    start = 0
    for leaf, together in zip(plan, drawn, strict=True):
        own = keys[start : start + leaf.matrices]
        alone = jax.vmap(leaf.draw_matrix)(own).reshape(together.shape)
        assert_array_equal(together, alone)
        assert together.nbytes == leaf.projection_bytes
        start += leaf.matrices


def test_chunks_are_alike_in_order_and_bounded():
    plan = leaves("gaussian")
    size = plan[0].projection_bytes  # of a, d and e; b has three times as much
    assert _keys.chunks(plan) == [[0, 1, 3, 4], [2]]
    assert _keys.chunks(plan, 2 * size) == [[0], [1], [2], [3, 4]]
    assert _keys.chunks(plan, 0) == [[0], [1], [2], [3], [4]]


def test_parts_are_those_of_split():
    array = jnp.arange(20).reshape(10, 2)
    for sizes in ([10], [3, 3, 4], [1] * 10):
        parts = _keys.split(array, sizes)
        assert [len(part) for part in parts] == sizes
        assert_array_equal(jnp.concatenate(parts), array)
