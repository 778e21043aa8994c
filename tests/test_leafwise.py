"""`finish` goes leaf by leaf: to the same result, with one full-size gradient alive at a time."""

import functools

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


SLOW_BASES = {
    *("identity", "zero", "sgd", "lamb", "norm clipped after", "parts", "another cycle in it"),
    *("where finite", "per layer: adam"),
}


@pytest.mark.parametrize(
    "base",
    [
        pytest.param(base, id=name, marks=pytest.mark.slow if name in SLOW_BASES else ())
        for name, base in BASES.items()
    ],
)
def test_it_does_what_an_update_does(base, compile_quickly):
    tx = florax.flora_accumulate(
        base,
        every_k_schedule=2,
        rank=losses.RANK,
        dimension_numbers=lambda path, leaf: losses.STACK if leaf.ndim == 3 else None,
    )

    @jax.jit
    def by_finish(params, state):
        def micro_step(state, grads):
            return florax.accumulate(grads, state), None

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


def test_extra_arguments_reach_the_base_optimizer():
    def update(updates, state, params=None, *, value, **_):
        return jax.tree.map(lambda g: g * value, updates), state

    base = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = florax.flora_accumulate(base, 1, rank=losses.RANK)
    params = losses.matrices()
    state = florax.accumulate(params, tx.init(params))
    moved = [
        jax.tree.map(jnp.subtract, florax.finish(tx, params, state, value=value)[0], params)
        for value in (jnp.float32(1.0), jnp.float32(2.0))
    ]
    chex.assert_trees_all_close(jax.tree.map(lambda x: 2 * x, moved[0]), moved[1], **CLOSE)


# --- memory, of programs as they are run

SIDE, RANK = 512, 8
LEAF = SIDE * SIDE * 4  # bytes

barriers_hold = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="XLA for CPUs of that age removes barriers"
)


def shapes(count, stacked):
    """So many matrices, one by one or in a stack."""
    if stacked:
        return {"w": jax.ShapeDtypeStruct((count, SIDE, SIDE), jnp.float32)}
    return {f"w{i}": jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32) for i in range(count)}


def loss_fn(params, x):
    if "w" in params:
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])
    else:
        for w in params.values():
            x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


BATCHES = jax.ShapeDtypeStruct((3, 4, SIDE), jnp.float32)


def accumulation(base, stacked):
    return florax.flora_accumulate(florax.per_layer(base, True) if stacked else base, 4, RANK)


def memory(function, *args, donate_argnums=(0, 1)):
    compiled = jax.jit(function, donate_argnums=donate_argnums).lower(*args).compile()
    return compiled.memory_analysis()


MEMORY_BASES = {
    "sgd": optax.sgd(0.1),
    "adam": optax.adam(0.1),
    "adafactor": optax.adafactor(0.1),
    "flora": florax.flora(0.1, RANK),
}


@barriers_hold
@pytest.mark.parametrize("stacked", [False, True], ids=["leaves", "layers"])
@pytest.mark.parametrize("base", MEMORY_BASES.values(), ids=MEMORY_BASES.keys())
def test_more_leaves_need_no_more_memory(base, stacked):
    """Three matrices more add no array of a matrix's size, only projections and sketches."""
    tx = accumulation(base, stacked)
    used = {}
    for count in (2, 5):
        params = shapes(count, stacked)
        state = jax.eval_shape(tx.init, params)
        used[count] = memory(functools.partial(florax.finish, tx), params, state)
        # In place: what is not aliased are pointers to the results.
        assert used[count].output_size_in_bytes - used[count].alias_size_in_bytes < 1024
    # Of each: the sketch and the projection, and as much again of momentum's.
    thin = 3 * 4 * SIDE * RANK * 4
    assert used[5].temp_size_in_bytes - used[2].temp_size_in_bytes <= thin


@pytest.mark.parametrize("stacked", [False, True], ids=["leaves", "layers"])
def test_a_whole_step_takes_less_than_the_gradients(stacked):
    """Parameters and state are aliased; beside them a decompressed gradient and a layer's weight,

    and one buffer for what the update makes of them.
    """
    tx = accumulation(optax.sgd(0.1), stacked)
    params = shapes(8, stacked)
    state = jax.eval_shape(tx.init, params)
    used = memory(florax.value_and_update(loss_fn, tx), params, state, BATCHES)
    assert used.output_size_in_bytes - used.alias_size_in_bytes < 1024
    if jax.__version_info__ >= (0, 11) or stacked:
        assert used.temp_size_in_bytes < 3 * LEAF


@pytest.mark.parametrize("stacked", [False, True], ids=["leaves", "layers"])
def test_accumulating_born_gradients_takes_a_gradient_less(stacked):
    """The gradient of a matrix, or of the whole stack that a dense scan collects.

    In return there are the sketches of one micro-batch, and the projections twice.
    """
    count = 4
    tx = accumulation(optax.sgd(0.1), stacked)
    params = shapes(count, stacked)
    state = jax.eval_shape(tx.init, params)

    def accumulating(grad):
        def run(state, params, batches):
            def micro_step(state, x):
                return florax.accumulate(grad(params, x, state), state), None

            return jax.lax.scan(micro_step, state, batches)[0]

        return memory(run, state, params, BATCHES, donate_argnums=0).temp_size_in_bytes

    def born(params, x, state):
        return florax.value_and_grad(loss_fn)(params, x, opt_state=state)[1]

    dense = accumulating(lambda params, x, state: jax.grad(loss_fn)(params, x))
    less = dense - accumulating(born)
    assert less >= LEAF * (count if stacked else 1) - 3 * count * SIDE * RANK * 4
