"""`finish` goes leaf by leaf, and by layers, to the result of an update."""

import chex
import jax
import jax.numpy as jnp
import losses
import optax
import pytest

import florax

# Sums of at most 13 products of size 1, as one fused program and as many.
CLOSE = dict(rtol=1e-5, atol=2e-6)

PARAMS = {
    "bias": losses.normal(losses.INNER),
    "layers": losses.normal(losses.LAYERS, losses.WIDTH, losses.INNER),
    "matrix": losses.normal(losses.WIDTH, losses.INNER),
    "none": None,
}
# Of two micro-batches.
STACKED_GRADIENTS = jax.tree.map(lambda w: jnp.stack([w, jnp.cos(9 * w)]), PARAMS)


def is_stack(path, leaf):
    return leaf.ndim == 3


def all_at_once(updates, state, params=None):
    """Mixes all leaves, and gives some of them back as they are."""
    mean = sum(jnp.mean(g) for g in jax.tree.leaves(updates))
    return jax.tree.map(lambda g: g - mean if g.ndim == 2 else g, updates), mean


BASES = {
    "identity": optax.identity(),
    "zero": optax.set_to_zero(),
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(optax.linear_schedule(0.1, 0.0, 9), eps=0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=4),
    "lion": optax.lion(0.1),
    "lamb": optax.lamb(0.1),
    "flora": florax.flora(0.1, losses.RANK, resample_every=1),
    "norm clipped before": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1, eps=0.1)),
    "norm clipped after": optax.chain(optax.adam(0.1, eps=0.1), optax.clip_by_global_norm(0.1)),
    "mean of all": optax.GradientTransformation(lambda params: jnp.zeros(()), all_at_once),
    "where finite": optax.apply_if_finite(optax.adam(0.1, eps=0.1), 3),
    "parts": optax.partition(
        {"adam": optax.adam(0.1, eps=0.1), "none": optax.set_to_zero()},
        {"bias": "none", "layers": "adam", "matrix": "adam", "none": "none"},
    ),
    "another cycle in it": optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    "per layer: adam": florax.per_layer(optax.adam(0.1, eps=0.1), is_stack),
    "per layer: norm clipped": florax.per_layer(
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)), is_stack
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
def test_it_does_what_an_update_does(base):
    tx = florax.flora_accumulate(
        base,
        every_k_schedule=2,
        rank=losses.RANK,
        dimension_numbers=lambda path, leaf: losses.STACK if leaf.ndim == 3 else None,
    )

    @jax.jit
    def by_finish(params, state):
        def micro_step(state, grads):
            return florax.accumulate(tx, grads, state), None

        state, _ = jax.lax.scan(micro_step, state, STACKED_GRADIENTS)
        return florax.finish(tx, params, state)

    @jax.jit
    def by_update(params, state):
        def micro_step(state, grads):
            updates, state = tx.update(grads, state, params)
            return state, updates

        state, updates = jax.lax.scan(micro_step, state, STACKED_GRADIENTS)
        return optax.apply_updates(params, jax.tree.map(lambda u: u[-1], updates)), state

    finished = updated = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        finished, updated = by_finish(*finished), by_update(*updated)
        chex.assert_trees_all_close(finished, updated, **CLOSE)
        chex.assert_trees_all_equal_shapes_and_dtypes(finished, updated)


@pytest.mark.slow
def test_extra_arguments_reach_the_base_optimizer():
    def update(updates, state, params=None, *, value, **_):
        return jax.tree.map(lambda g: g * value, updates), state

    base = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = florax.flora_accumulate(base, 1, rank=losses.RANK)
    params = losses.matrices()
    state = florax.accumulate(tx, params, tx.init(params))
    moved = [
        jax.tree.map(jnp.subtract, florax.finish(tx, params, state, value=value)[0], params)
        for value in (jnp.float32(1.0), jnp.float32(2.0))
    ]
    chex.assert_trees_all_close(jax.tree.map(lambda x: 2 * x, moved[0]), moved[1], **CLOSE)
