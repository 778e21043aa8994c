"""Gradients born compressed are the compressed gradients."""

import losses
import jax
import jax.numpy as jnp
import numpy as np
import pytest

@pytest.fixture(scope="module", autouse=True)
def quickly(compile_quickly):
    pass


import florax


def is_sketch(node):
    return isinstance(node, florax.Sketch)


def both(case, tx, state):
    """Loss and gradients as they are born, and as JAX makes them, and the projections."""
    def compute(params, state, *batch):
        born = florax.value_and_grad(case.loss)(params, *batch, opt_state=state)
        dense = jax.value_and_grad(case.loss)(params, *batch)
        drawn = [None if leaf.rank is None else leaf.draw(state.key, state.gradient_step) for leaf in state.sketch.plan]
        return born, dense, drawn
    return jax.jit(compute)(case.params, state, *case.batch)


@pytest.mark.parametrize("name", losses.CASES)
def test_x(name):
    case = losses.CASES[name]()
    tx = case.transformation()
    state = tx.init(case.params)._replace(gradient_step=jnp.int32(3))
    (value, born), (expected, dense), drawn = both(case, tx, state)
    assert value == expected
    report = florax.gradient_report(case.loss, tx, case.params, *case.batch)
    found = {row.path: row.reason for row in report.rows if row.sketch is None}
    print(report)
    for leaf, g, d, a in zip(state.sketch.plan, jax.tree.leaves(born, is_leaf=is_sketch), jax.tree.leaves(dense), drawn):
        if leaf.rank is None: 
            np.testing.assert_array_equal(g, d); continue
        if leaf.path in case.dense:
            assert not is_sketch(g)
            print("exact", (g == d).all())
            assert case.dense[leaf.path] in found[leaf.path]
        else:
            assert is_sketch(g)
            w = leaf.compress(d.astype(jnp.promote_types(d.dtype,jnp.float32)), a)
            err = np.linalg.norm(g.array-w)/(np.linalg.norm(d.astype(float))*np.linalg.norm(a.reshape(-1,losses.RANK,leaf.columns and int(np.prod([leaf.shape[i] for i in leaf.columns]))),2,axis=(1,2)).max()+1e-30)
            print("ERR", name, leaf.path, err/case.eps)
            assert err < 50*case.eps
