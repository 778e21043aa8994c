"""Any tree of parameters will do: empty, scalar, with axes of size 1, with None for a leaf."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

TREES = {
    "empty": {},
    "empty_tuple": (),
    "scalar": jnp.float32(2),
    "bare_matrix": jnp.ones((12, 8)),
    "mixed": [
        ({"kernel": jnp.ones((12, 8)), "bias": None}, jnp.ones(3), optax.MaskedNode()),
        {"row": jnp.ones((1, 8)), "column": jnp.ones((8, 1)), "one": jnp.ones((1, 1, 1))},
        {"no_rows": jnp.ones((0, 8)), "nothing": jnp.ones(0)},
        None,
    ],
}


@pytest.mark.parametrize("params", TREES.values(), ids=TREES.keys())
def test_any_tree_of_parameters_is_updated(tx, params):
    update = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(2):  # both branches of an accumulation
        updates, state = update(params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_tree_all_finite(updates)
    moved = jax.tree.map(lambda u: u.size == 0 or bool(jnp.any(u != 0)), updates)
    assert all(jax.tree.leaves(moved))
