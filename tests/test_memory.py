"""Memory of programs as they are compiled to be run: full-size gradients come one at a time.

XLA's optimizations decide where arrays are kept, so that nothing here is compiled without them.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import florax

pytestmark = [
    pytest.mark.usefixtures("optimized"),
    pytest.mark.skipif(
        jax.default_backend() != "cpu",
        reason="bounds are of programs for the CPU; in a GPU's are 32 MiB for cuBLAS to work in",
    ),
]

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


@pytest.mark.slow
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


LAYERS_BY_DAY = pytest.mark.parametrize(
    "stacked",
    [pytest.param(False, marks=pytest.mark.slow, id="leaves"), pytest.param(True, id="layers")],
)


@LAYERS_BY_DAY
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


@pytest.mark.slow
@LAYERS_BY_DAY
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
                return florax.accumulate(tx, grad(params, x, state), state), None

            return jax.lax.scan(micro_step, state, batches)[0]

        return memory(run, state, params, BATCHES, donate_argnums=0).temp_size_in_bytes

    def born(params, x, state):
        return florax.value_and_grad(loss_fn, tx)(params, x, opt_state=state)[1]

    dense = accumulating(lambda params, x, state: jax.grad(loss_fn)(params, x))
    less = dense - accumulating(born)
    assert less >= LEAF * (count if stacked else 1) - 3 * count * SIDE * RANK * 4


@pytest.mark.parametrize(
    "accumulates, axis",
    [(False, 0), (True, 0), (False, 1)],
    ids=["at once", "accumulating", "along another axis"],
)
def test_layer_by_layer_parameters_and_state_are_updated_in_place(accumulates, axis):
    """No second copy of either: all results but the loss take the place of arguments."""
    size, height = 128, 12

    def loss(params, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.mean(jax.lax.scan(layer, x, jnp.moveaxis(params, axis, 0))[0] ** 2)

    shape = (size, height, size) if axis else (height, size, size)
    params = jax.ShapeDtypeStruct(shape, jnp.float32)
    x = jax.ShapeDtypeStruct((2, 4, size) if accumulates else (4, size), jnp.float32)
    tx = florax.per_layer(optax.adam(1e-3), True, axis=axis)
    tx = florax.flora_accumulate(tx, every_k_schedule=2, rank=4) if accumulates else tx
    state = jax.eval_shape(tx.init, params)
    step = florax.value_and_update(loss, tx, layerwise=True)
    used = memory(step, params, state, x)
    layer_bytes = 4 * size**2
    # Pointers to the results, the loss and other scalars.
    others = 8 * (1 + len(jax.tree.leaves((params, state)))) + 16
    assert used.output_size_in_bytes - used.alias_size_in_bytes <= others
    assert used.alias_size_in_bytes >= 3 * height * layer_bytes
    # A layer's weight, gradient, moments and their successors; a copy of any stack is 12 layers.
    # XLA for CPUs of jax 0.10 does make copies, and takes 29.
    if jax.__version_info__ >= (0, 11):
        assert used.temp_size_in_bytes < 10 * layer_bytes
