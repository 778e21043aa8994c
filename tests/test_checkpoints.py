"""A state is plain arrays and static settings: saved and restored, training goes on bit for bit."""

import contextlib
import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import florax

with contextlib.suppress(ImportError):  # it knows of states that are made after it was imported
    import flax.serialization  # noqa: F401


MOMENTUM = dict(rank=3, resample_every=2)
ACCUMULATE = dict(rank=3, every_k_schedule=3)
TRANSFORMATIONS = {
    "momentum": florax.flora_momentum(**MOMENTUM),
    "momentum_bfloat16": florax.flora_momentum(
        **MOMENTUM, projection="gaussian", accumulator_dtype=jnp.bfloat16
    ),
    "accumulate": florax.flora_accumulate(
        optax.adam(0.1), **ACCUMULATE, should_skip_update_fn=optax.skip_not_finite
    ),
    "accumulate_both_sides": florax.flora_accumulate(
        optax.adam(0.1), **ACCUMULATE, projection="cosine", side="both"
    ),
    "accumulate_bfloat16_momentum": florax.flora_accumulate(
        optax.chain(optax.adafactor(0.1), florax.flora_momentum(**MOMENTUM)),
        **ACCUMULATE,
        accumulator_dtype=jnp.bfloat16,
    ),
    "flora": florax.flora(0.1, **MOMENTUM),
    "momentum_int8": florax.flora_momentum(**MOMENTUM, accumulator_dtype=jnp.int8),
    "accumulate_both_sides_int4": florax.flora_accumulate(
        optax.adam(0.1),
        **ACCUMULATE,
        projection="cosine",
        side="both",
        accumulator_dtype=jnp.int4,
    ),
}
PARAMS = {"bias": jnp.arange(8.0), "layer": [{"kernel": jnp.sin(jnp.arange(96.0)).reshape(12, 8)}]}


BY_DAY = {"momentum", "accumulate"}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in BY_DAY else pytest.mark.slow)
        for name in TRANSFORMATIONS
    ],
)
def tx(request):
    return TRANSFORMATIONS[request.param]


@functools.cache
def compiled(update):
    @jax.jit
    def step(params, state, t):
        grads = jax.tree.map(lambda p: jnp.cos(p * t), params)
        updates, state = update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, params, state, steps):
    for t in steps:
        params, state = compiled(tx.update)(params, state, jnp.float32(t))
    return params, state


def with_orbax(params, state, directory):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "step", (params, state))
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory / "step", like)


def with_pickle(params, state, directory):
    (directory / "step").write_bytes(pickle.dumps(jax.device_get((params, state))))
    return pickle.loads((directory / "step").read_bytes())


def with_savez(params, state, directory):
    leaves, treedef = jax.tree.flatten((params, state))
    np.savez(directory / "step.npz", *leaves)
    with np.load(directory / "step.npz") as file:
        loaded = [file[f"arr_{i}"] for i in range(len(leaves))]
    # To NumPy's files bfloat16 is two bytes without a name.
    return treedef.unflatten(x.view(own.dtype) for x, own in zip(loaded, leaves, strict=True))


def with_flax(params, state, directory):
    serialization = pytest.importorskip("flax.serialization")
    (directory / "step").write_bytes(serialization.to_bytes((params, state)))
    return serialization.from_bytes((params, state), (directory / "step").read_bytes())


@pytest.mark.parametrize(
    "save_and_restore",
    [
        with_orbax,
        pytest.param(with_savez, marks=pytest.mark.slow),
        pytest.param(with_pickle, marks=pytest.mark.slow),
        pytest.param(with_flax, marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_bit_for_bit_from_the_middle_of_a_cycle(tx, save_and_restore, tmp_path):
    middle = train(tx, PARAMS, tx.init(PARAMS), range(1, 6))  # κ = 2 and τ = 3 do not divide 5
    restored = save_and_restore(*middle, tmp_path)
    chex.assert_trees_all_equal(restored, middle)
    chex.assert_trees_all_equal(
        train(tx, *restored, range(6, 11)), train(tx, *middle, range(6, 11))
    )


def test_a_state_is_restored_into_shapes_alone(tx, tmp_path):
    """In a new process there is no state to compare with, only what `init` would make."""
    state = tx.init(PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", state)
    like = jax.eval_shape(tx.init, PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        chex.assert_trees_all_equal(checkpointer.restore(tmp_path / "step", like), state)


def test_a_state_holds_plain_arrays_and_no_typed_keys(tx):
    for leaf in jax.tree.leaves(tx.init(PARAMS)):
        assert isinstance(leaf, jax.Array)
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
