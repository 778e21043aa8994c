"""A leaf's projection depends on the base key, its path, the cycle, the slice; on nothing else."""

import dataclasses
import hashlib
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_array_equal, assert_array_max_ulp

import florax

# Users' programs are optimized, and so the bits of their projections.
pytestmark = pytest.mark.usefixtures("optimized")

KERNEL, LAYERS = "['kernel']", "['layers']"
PARAMS = {
    "kernel": jnp.zeros((24, 16)),
    "layers": jnp.zeros((3, 24, 16)),
    "other": jnp.zeros((24, 16)),
}


@pytest.fixture(params=["gaussian", "cosine"])
def projection(request):
    return request.param


def sketches(projection, *, params=PARAMS, key=0, cycle=7):
    """What a state keeps of `params`, with all that its projections are drawn from."""

    def dimension_numbers(path, leaf):
        stack = florax.FloraDimensionNumbers(rows=1, columns=2, batch=0)
        return stack if leaf.ndim == 3 else None

    tx = florax.flora_momentum(
        5, key=key, projection=projection, dimension_numbers=dimension_numbers
    )
    return dataclasses.replace(tx.init(params).sketch, cycle=jnp.int32(cycle))


def draw(path, projection, **of):
    """A, shape (5, 16), of one leaf of `params`; of the stack, shape (3, 5, 16)."""
    return sketches(projection, **of).draw()[path]


def assert_independent(a, b):
    # The correlation of 80 independent pairs has a standard error of 1/√80.
    assert abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]) < 4 / np.sqrt(80)


# --- what a projection depends on


def test_every_leaf_has_its_own_projection(projection):
    assert_independent(draw(KERNEL, projection), draw("['other']", projection))


def test_every_slice_of_a_stack_has_its_own_projection(projection):
    first, second, third = draw(LAYERS, projection)
    assert_independent(first, second)
    assert_independent(first, third)
    assert_independent(second, third)


def test_every_cycle_has_its_own_projection(projection):
    assert_independent(draw(KERNEL, projection, cycle=7), draw(KERNEL, projection, cycle=8))


def test_every_base_key_has_its_own_projection(projection):
    assert_independent(draw(KERNEL, projection, key=0), draw(KERNEL, projection, key=1))


def test_the_next_slice_is_not_the_next_cycle(projection):
    _, second, _ = draw(LAYERS, projection, cycle=7)
    first, _, _ = draw(LAYERS, projection, cycle=8)
    assert_independent(second, first)


# --- what it does not depend on


@pytest.mark.slow
def test_other_parameters_do_not_change_it(projection):
    more = {"a": jnp.zeros((9, 9)), "z": jnp.zeros(3), **PARAMS}
    fewer = {"kernel": PARAMS["kernel"]}
    for params in (more, fewer):
        assert_array_equal(draw(KERNEL, projection, params=params), draw(KERNEL, projection))


def test_the_dtype_and_the_side_kept_do_not_change_it(projection):
    params = {"kernel": jnp.zeros((100, 16), jnp.bfloat16)}
    assert_array_equal(draw(KERNEL, projection, params=params), draw(KERNEL, projection))


def test_keys_may_be_ints_or_jax_keys(projection):
    expected = draw(KERNEL, projection, key=3)
    for key in (
        np.int64(3),
        jnp.int32(3),
        jax.random.key(3, impl="threefry2x32"),
        jax.random.PRNGKey(3, impl="threefry2x32"),
    ):
        assert_array_equal(draw(KERNEL, projection, key=key), expected)


def test_keys_of_another_kind_will_do_and_are_told_apart(projection):
    a, b = (draw(KERNEL, projection, key=jax.random.key(seed, impl="rbg")) for seed in (0, 1))
    assert_independent(a, b)


def test_jit_does_not_change_it(projection):
    """Inside of a larger program, where it could be fused with what uses it."""

    @jax.jit
    def inside(kept):
        return kept.draw(), kept.compress([jnp.ones(leaf.shape) for leaf in kept.plan])

    drawn, _ = inside(sketches(projection))
    for path, a in drawn.items():
        assert_array_equal(a, draw(path, projection))


def test_a_leaf_drawn_alone_draws_the_same(projection):
    kept = sketches(projection)
    for leaf in kept.plan:
        assert_array_equal(kept.draw([leaf])[leaf.path], draw(leaf.path, projection))


def test_64_bit_mode_does_not_change_it(projection):
    expected = draw(KERNEL, projection)
    with jax.enable_x64(True):
        assert_array_equal(draw(KERNEL, projection), expected)


@pytest.mark.slow
def test_the_default_prng_does_not_change_it(projection):
    expected = draw(LAYERS, projection)
    jax.clear_caches()  # what was traced under one default is used under another
    with jax.default_prng_impl("rbg"):
        assert_array_equal(draw(LAYERS, projection), expected)


@pytest.mark.parametrize(
    "axis_type",
    [pytest.param(AxisType.Auto, id="auto", marks=pytest.mark.slow), AxisType.Explicit],
)
def test_devices_do_not_change_it(projection, axis_type):
    params = {"layers": jnp.zeros((2, 24, 16))}
    expected = draw(LAYERS, projection, params=params)
    mesh = meshes.make((4, 2), ("x", "y"), axis_type)
    kept = sketches(projection, params=params)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("y", None, "x"))
        a = jax.jit(
            lambda key: dataclasses.replace(kept, key=key).draw()[LAYERS], out_shardings=sharding
        )(kept.key)
    assert not a.sharding.is_fully_replicated
    # The random bits are the same; XLA may round what is made of them in another order.
    assert_array_max_ulp(np.asarray(a), np.asarray(expected), maxulp=2)


def test_saving_and_restoring_the_state_does_not_change_it(projection):
    kept = sketches(projection)
    again = pickle.loads(pickle.dumps(kept))
    for path, a in kept.draw().items():
        assert_array_equal(again.draw()[path], a)


TRAIN = """
import jax, jax.numpy as jnp, optax, florax

jax.config.update("jax_disable_most_optimizations", True)  # compiles faster
tx = florax.flora_accumulate(
    optax.chain(
        optax.adafactor(0.1),
        florax.flora_momentum(3, resample_every=2, projection="cosine", residual=True),
    ),
    every_k_schedule=2,
    rank=3,
)
params = {"bias": jnp.arange(8.0), "kernel": jnp.sin(jnp.arange(96.0)).reshape(12, 8)}
loss = lambda params, t: jnp.sum(jnp.cos(params["kernel"] * t) @ params["bias"])


def step(carry, t):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params, t), state, params)
    return (optax.apply_updates(params, updates), state), None


train = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(10.0)))
(params, _), _ = train((params, tx.init(params)))
trained = b"".join(bytes(memoryview(jax.device_get(x))) for x in jax.tree.leaves(params))
"""


@pytest.mark.slow
def test_training_in_another_process_gives_the_same_bits():
    """With one device instead of eight, other hashes of strings, and another default PRNG."""
    environment = {"XLA_FLAGS": "", "PYTHONHASHSEED": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg"}
    command = TRAIN + "\nimport hashlib; print(hashlib.sha256(trained).hexdigest())"
    there = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    here = {}
    exec(TRAIN, here)
    assert there.stdout.strip() == hashlib.sha256(here["trained"]).hexdigest()
