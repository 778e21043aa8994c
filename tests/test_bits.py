"""Accumulators in 8, 4 or 2 bits: their bytes, their states, and the same bits everywhere."""

import functools
import io
import math
import pickle

import chex
import draws
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import florax
from florax import _sketches

INTEGERS = {jnp.int8: 8, jnp.int4: 4, jnp.int2: 2}


def full_size(path, leaf):
    return None


def momentum(rank=3, dtype=jnp.int8, **arguments):
    arguments = {"resample_every": 2, "accumulator_dtype": dtype, **arguments}
    return florax.flora_momentum(rank, **arguments)


def accumulate(rank=3, dtype=jnp.int8, opt=None, every=3, **arguments):
    opt = optax.sgd(1.0) if opt is None else opt
    return florax.flora_accumulate(opt, every, rank, accumulator_dtype=dtype, **arguments)


def by_night(*values):
    return [pytest.param(*value, marks=pytest.mark.slow) for value in values]


EACH_DTYPE = pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4, jnp.int2])
BOTH = pytest.mark.parametrize("make", [momentum, accumulate])
PARAMS = {"bias": jnp.linspace(-1, 1, 40), "layer": [{"kernel": jnp.sin(jnp.arange(1, 241.0))}]}
PARAMS["layer"][0]["kernel"] = PARAMS["layer"][0]["kernel"].reshape(12, 20)


def gradients(seed, like=None):
    return draws.normal_like(seed, PARAMS if like is None else like)


@functools.cache
def compiled(update):
    return jax.jit(update)


def run(tx, state, seeds, params=PARAMS):
    """The updates of every step, and the last state."""
    updates = []
    for seed in seeds:
        own, state = compiled(tx.update)(gradients(seed, params), state, params)
        updates.append(own)
    return updates, state


# --- bytes


def bytes_of(shape, dtype):
    """Of an array: integers in words, with a scale of four bytes for every block."""
    if dtype not in INTEGERS:
        return math.prod(shape) * jnp.dtype(dtype).itemsize
    axes = min(1, len(shape))
    while axes < len(shape) and math.prod(shape[-axes:]) < 32:
        axes += 1
    row = math.prod(shape[len(shape) - axes :])
    blocks = -(-row // 64)
    words = -(-INTEGERS[dtype] * -(-row // blocks) // 32)
    return math.prod(shape[: len(shape) - axes]) * blocks * 4 * (words + 1)


SHAPES = {
    "bias": (100,),
    "convolution": (3, 3, 8, 16),
    "few": (3,),
    "scalar": (),
    "stacked norm": (3, 10),
    "stacked kernel": (3, 48, 70),
    "tall": (96, 72),
    "wide": (72, 96),
}
STACKED = {name: name.startswith("stacked") for name in SHAPES}


def kept_shape(name, rank, side):
    shape = SHAPES[name]
    *stack, n, m = shape if len(shape) > 1 else (0, 0)
    if name in ("convolution", "stacked norm") or rank is None or not n or rank >= min(n, m):
        return shape
    return (*stack, max(n, m) if side == "smaller" else min(n, m), rank)


@BOTH
@pytest.mark.parametrize("side", ["smaller", "larger"])
@pytest.mark.parametrize("rank", [None, 8, 40])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, *INTEGERS], ids=str)
def test_the_bytes_are_those_of_the_theory_and_of_the_report(make, side, rank, dtype):
    params = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in SHAPES.items()}
    settings = dict(rank=full_size if rank is None else rank, dtype=dtype, side=side)
    expected = {}
    for name in SHAPES:
        layers, shape = (), kept_shape(name, rank, side)
        if make is momentum and STACKED[name]:  # every layer by itself
            layers, shape = shape[:1], shape[1:]
        expected[f"['{name}']"] = math.prod(layers) * bytes_of(shape, dtype or jnp.float32)
    if make is momentum:
        tx = florax.per_layer(momentum(**settings), STACKED)
    else:
        tx = accumulate(**settings, opt=florax.per_layer(optax.sgd(0.1), STACKED))
    report = florax.state_report(tx, params)
    got = {}
    for row in report.rows:
        got[row.path] = got.get(row.path, 0) + row.state_bytes
        assert row.full_bytes == 4 * math.prod(row.shape) or dtype == jnp.bfloat16
        assert row.dtype == jnp.dtype(dtype or jnp.float32).name
    assert got == expected
    sketches = _sketches.find(jax.eval_shape(tx.init, params), _sketches.Sketches)
    kept = [x for own in sketches for x in jax.tree.leaves(own.arrays)]
    assert report.state_bytes == sum(x.size * x.dtype.itemsize for x in kept)


@BOTH
@pytest.mark.parametrize("dtype, bits", [(jnp.int8, 8.5), (jnp.int4, 4.5), (jnp.int2, 2.5)])
def test_a_large_matrix_takes_its_bits_and_half_a_bit_an_entry(make, dtype, bits):
    params = jax.ShapeDtypeStruct((1024, 4096), jnp.float32)
    (row,) = florax.state_report(make(full_size, dtype), params).rows
    assert row.state_bytes / row.full_bytes == bits / 32
    (row,) = florax.state_report(make(256, dtype), params).rows
    assert row.state_bytes / row.full_bytes == 256 / 1024 * bits / 32


# --- saved and restored


def with_pickle(tx, state, directory):
    (directory / "state").write_bytes(pickle.dumps(jax.device_get(state)))
    return pickle.loads((directory / "state").read_bytes())


def with_orbax(tx, state, directory):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory / "state", jax.eval_shape(tx.init, PARAMS))


def with_flax(tx, state, directory):
    serialization = pytest.importorskip("flax.serialization")
    return serialization.from_bytes(tx.init(PARAMS), serialization.to_bytes(state))


def with_savez(tx, state, directory):
    file = io.BytesIO()
    np.savez(file, *jax.tree.leaves(state))
    file.seek(0)
    saved = np.load(file)
    leaves = [jnp.asarray(saved[name]) for name in saved.files]
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(tx.init, PARAMS)), leaves)


OF_BOTH = accumulate(dtype=jnp.int4, opt=optax.chain(optax.adam(0.1), momentum(2, jnp.int2)))
SAVED = {
    "momentum": momentum(dtype=jnp.int8, nesterov=True),
    "momentum in 4 bits": momentum(dtype=jnp.int4),
    "accumulation": accumulate(dtype=jnp.int8, opt=optax.adam(0.1)),
    "both sides": accumulate(dtype=jnp.int8, side="both", projection="cosine"),
    "both": OF_BOTH,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "save_and_restore",
    [with_orbax, with_savez, with_pickle, with_flax],
)
@pytest.mark.parametrize("tx", SAVED.values(), ids=SAVED.keys())
def test_a_restored_state_goes_on_bit_for_bit(tx, save_and_restore, tmp_path):
    if save_and_restore is with_flax:
        pytest.importorskip("flax.serialization")
    # A cycle of 3 and projections for 2 updates: 5 steps are in the middle, the next three cross.
    _, middle = run(tx, tx.init(PARAMS), range(5))
    restored = save_and_restore(tx, middle, tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(middle)
    chex.assert_trees_all_equal(restored, middle)
    chex.assert_trees_all_equal(run(tx, restored, range(5, 8)), run(tx, middle, range(5, 8)))


# --- other bits


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("now", [jnp.int4, jnp.int2, None])
def test_the_state_says_in_how_many_bits_it_is_whatever_is_asked_for_later(make, now):
    """As in floats, a state goes on as it was made: no number is read in the wrong bits."""
    made, other = make(dtype=jnp.int8), make(dtype=now)
    _, state = run(made, made.init(PARAMS), range(1))
    chex.assert_trees_all_equal(run(other, state, range(1, 4)), run(made, state, range(1, 4)))


@BOTH
@pytest.mark.parametrize(
    "saved, now", [(jnp.int8, jnp.int4), *by_night([jnp.int4, jnp.int8], [jnp.int8, jnp.int2])]
)
@pytest.mark.parametrize("size", [3, 200])
def test_arrays_restored_into_a_state_of_other_bits_are_never_read_wrong(make, saved, now, size):
    """Those of 3 entries have as many words in 8 and in 4 bits."""
    params = jnp.linspace(1, 2, size)
    made, other = make(dtype=saved), make(dtype=now)
    _, state = run(made, made.init(params), range(1), params)
    restored = jax.tree.unflatten(jax.tree.structure(other.init(params)), jax.tree.leaves(state))
    with pytest.raises(ValueError, match="made under other settings"):
        other.update(params, restored, params)
    if size > 4:
        with pytest.raises(ValueError, match=f"in {jnp.dtype(now).name}, got .*other numbers"):
            jax.jit(other.update)(params, restored, params)
    else:
        for _ in range(2):
            updates, restored = jax.jit(other.update)(params, restored, params)
        assert jnp.isnan(updates).all()


# --- meshes

WIDE = {
    "bias": jnp.zeros(640),
    "kernel": jnp.zeros((16, 1024)),
    "stack": jnp.zeros((8, 6, 8, 16)),
}
SPECS = {
    "rows": {"bias": P("x"), "kernel": P("x"), "stack": P("x")},
    "columns": {"bias": P(("x", "y")), "kernel": P(None, ("x", "y")), "stack": P(None, None, "x")},
    "both": {"bias": P("y"), "kernel": P("x", "y"), "stack": P("y", None, "x", None)},
    "last": {"bias": P(), "kernel": P("y"), "stack": P(None, "y", None, "x")},
}


def sharded(tree, specs, mesh):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def both(rank):
    """An accumulation in 8 bits around a momentum in 4."""
    return accumulate(rank, jnp.int8, momentum(rank, jnp.int4), every=2)


@functools.cache
def on_one_device(tx):
    return jax.device_get(run(tx, jax.jit(tx.init)(WIDE), range(5), WIDE))


def on_mesh(tx, axis_type, specs):
    mesh = meshes.make((4, 2), ("x", "y"), axis_type)
    with jax.set_mesh(mesh):
        params = sharded(WIDE, specs, mesh)
        state, updates = jax.jit(tx.init)(params), []
        update = jax.jit(tx.update)
        for seed in range(5):
            grads = sharded(gradients(seed, WIDE), specs, mesh)
            own, state = update(grads, state, params)
            updates.append(own)
        return jax.device_get((updates, state))


FULL_SIZE, SKETCHED = both(full_size), both(3)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS.keys())
def test_on_a_mesh_the_bits_are_those_of_one_device(axis_type, specs):
    """Two micro-batches: the halves of numbers are exact, of thirds XLA makes two kinds.

    And without its optimizations it does not fuse products with sums.
    """
    chex.assert_trees_all_equal(on_mesh(FULL_SIZE, axis_type, specs), on_one_device(FULL_SIZE))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_sketches_on_a_mesh_are_those_of_one_device_but_for_single_roundings(axis_type):
    """Sums over divided columns are taken in another order, which tips one rounding in thousands.

    A few times 2⁻²⁴ · 127 of a scale is what such sums may differ by: less than 10⁻³ of the
    entries, and four or eight of these are in a word.
    """
    updates, state = on_mesh(SKETCHED, axis_type, SPECS["both"])
    _, alone = on_one_device(SKETCHED)
    pairs = [
        (tree.sketch.arrays[name], other.sketch.arrays[name])
        for tree, other in [(state, alone), (state.inner_opt_state, alone.inner_opt_state)]
        for name in WIDE
    ]
    for a, b in pairs:
        np.testing.assert_allclose(a.scales, b.scales, rtol=1e-3)
        assert np.mean(a.words != b.words) < 0.01
    chex.assert_tree_all_finite(updates)


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS.keys())
@BOTH
def test_on_an_explicit_mesh_words_and_scales_are_divided_as_what_is_before_them(make, specs):
    mesh = meshes.make((4, 2), ("x", "y"), AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = sharded(WIDE, specs, mesh)
        arrays = jax.eval_shape(make(full_size).init, params).sketch.arrays
        for name in ("kernel", "stack"):
            rows = specs[name][0]
            for own in (arrays[name].words, arrays[name].scales):
                assert own.sharding.spec[0] == rows
        # The kernel's columns are divided by 8 at most; of its blocks there are 16.
        columns = (*specs["kernel"], None)[1]
        assert arrays["kernel"].words.sharding.spec[1] == columns


# --- among other transformations


WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip(0.5), tx, optax.scale(2.0)),
    "masked": lambda tx: optax.masked(tx, {"bias": False, "layer": True}),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(0.1)}, {"bias": "a", "layer": "b"}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "per_layer": lambda tx: florax.per_layer(tx, {"bias": False, "layer": True}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_a_wrapped_one_runs_without_compiling_again_in_the_dtypes_that_it_has(make, wrap):
    tx, traced = wrap(make(3, jnp.int8)), []

    @functools.partial(jax.jit, donate_argnums=1)
    def update(grads, state, params):
        traced.append(1)
        return tx.update(grads, state, params)

    state = tx.init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, PARAMS), state)
    like, structure = jax.eval_shape(tx.init, PARAMS), jax.tree.structure(state)
    for seed in range(4):
        updates, state = update(gradients(seed), state, PARAMS)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, like)
        assert jax.tree.structure(state) == structure
    assert len(traced) == 1
    chex.assert_tree_all_finite(updates)


@pytest.mark.slow
@EACH_DTYPE
def test_hyperparameters_are_injected_with_the_dtype_static(dtype):
    injected = optax.inject_hyperparams(
        florax.flora_momentum, static_args=("rank", "accumulator_dtype")
    )(3, decay=0.8, accumulator_dtype=dtype)
    plain = florax.flora_momentum(3, jnp.float32(0.8), accumulator_dtype=dtype)
    updates, state = run(injected, injected.init(PARAMS), range(3))
    expected, inner = run(plain, plain.init(PARAMS), range(3))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.inner_state, inner)


@pytest.mark.slow
@BOTH
def test_a_donated_state_is_given_up_and_gives_the_same(make):
    tx = make(3, jnp.int8)
    expected = tx.init(PARAMS)
    state = jax.tree.map(jnp.copy, expected)
    donating = jax.jit(tx.update, donate_argnums=1)
    for seed in range(4):
        before = state.sketch.arrays["bias"].words
        updates, state = donating(gradients(seed), state, PARAMS)
        wanted, expected = compiled(tx.update)(gradients(seed), expected, PARAMS)
        assert before.is_deleted()
        chex.assert_trees_all_equal((updates, state), (wanted, expected))


@BOTH
@pytest.mark.parametrize("kept", INTEGERS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_have_the_dtype_of_the_gradients(make, kept, dtype):
    params = optax.tree.cast(PARAMS, dtype)
    tx = make(3, kept)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_integers_work_in_64_bit_mode():
    with jax.enable_x64(True):
        params = optax.tree.cast(PARAMS, jnp.float64)
        for make in (momentum, accumulate):
            tx = make(3, jnp.int8)
            state = jax.eval_shape(tx.init, params)
            updates, after = jax.eval_shape(tx.update, params, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


# --- the numbers


@pytest.mark.slow
@EACH_DTYPE
def test_a_skipped_micro_step_changes_no_bit(dtype):
    def skip_large(grads, step, params):
        return grads["bias"][0] > 100, ()

    tx = accumulate(3, dtype, should_skip_update_fn=skip_large)
    _, before = run(tx, tx.init(PARAMS), range(2))
    large = {**gradients(2), "bias": jnp.full(40, 1e3)}
    updates, after = compiled(tx.update)(large, before, PARAMS)
    chex.assert_trees_all_equal(after.sketch, before.sketch)
    assert not optax.tree.norm(updates) and after.mini_step == before.mini_step
    chex.assert_trees_all_equal(run(tx, after, range(3, 5)), run(tx, before, range(3, 5)))


def block_of_each(size, bits):
    """The block that every entry of a vector is in."""
    blocks = -(-size // 64)
    words = -(-bits * -(-size // blocks) // 32)
    return np.arange(size) // (words * 32 // bits)


@pytest.mark.parametrize(
    "dtype, use_grad_mean",
    [*by_night((jnp.int8, True)), (jnp.int4, False), *by_night((jnp.int2, True))],
    ids=["mean of 8 bits", "sum of 4", "mean of 2"],
)
def test_the_base_optimizer_sees_the_mean_within_the_scales_of_its_roundings(dtype, use_grad_mean):
    count, size = 8, 200
    bits = INTEGERS[dtype]
    tx = accumulate(full_size, dtype, every=count, use_grad_mean=use_grad_mean)
    params, block = jnp.zeros(size), block_of_each(size, bits)
    grads = np.asarray(draws.normal(0, count, size))
    state, allowed = tx.init(params), np.zeros(size)
    for n, grad in enumerate(grads, 1):
        updates, state = compiled(tx.update)(grad, state, params)
        scales = np.asarray(state.sketch.arrays.scales)
        if n == count:  # of the last one the largest entries of the blocks tell
            most = 2 ** (bits - 1) - 1
            scales = np.array([abs(updates[block == b]).max() for b in range(block[-1] + 1)]) / most
        # A rounding errs by less than a scale; in a mean it then counts n/τ.
        allowed += scales[block] * (n / count if use_grad_mean else 1)
    exact = grads.astype(np.float64).mean(0) if use_grad_mean else grads.astype(np.float64).sum(0)
    # And some sums in float32 of numbers below 32.
    assert np.all(abs(-updates - exact) < allowed + 8 * count * 2.0**-20)
    # Where it is right on average, errors do not add up: mostly the half of that.
    assert np.mean(abs(-updates - exact) < allowed / 2) > 0.5


@pytest.mark.slow
def test_8_bits_are_right_on_average_over_base_keys():
    """The mean over many keys of the roundings is what float32 accumulates."""
    count, grads = 500, draws.normal(1, 3, 240)

    def end(dtype, key):
        tx = accumulate(full_size, dtype, key=key)
        state = tx.init(grads[0])
        for grad in grads:
            updates, state = tx.update(grad, state)
        return updates

    keys = jax.random.bits(jax.random.key(2), (count, 2), jnp.uint32)
    many = np.asarray(jax.jit(jax.vmap(lambda key: end(jnp.int8, key)))(keys), np.float64)
    errors = many - end(jnp.float32, 0)
    standard_error = errors.std(0) / math.sqrt(count)
    # Some roundings in float32 of numbers below 4, and of quotients below 128 of a scale.
    assert np.all(abs(errors.mean(0)) < 5 * standard_error + 2.0**-18)


@pytest.mark.slow
def test_what_is_not_finite_is_forgotten_with_its_cycle():
    tx = accumulate(full_size, jnp.int8, every=2)
    bad = {**gradients(0), "bias": jnp.full(40, jnp.nan)}
    _, state = compiled(tx.update)(bad, tx.init(PARAMS), PARAMS)
    updates, state = compiled(tx.update)(gradients(1), state, PARAMS)
    assert jnp.isnan(updates["bias"]).all()
    chex.assert_tree_all_finite(updates["layer"])
    (_, updates), _ = run(tx, state, range(2))
    chex.assert_tree_all_finite(updates)


KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.mark.parametrize(
    "rank, bits, kind",
    [
        pytest.param(None, jnp.int4, "auto", id="full-auto", marks=pytest.mark.slow),
        pytest.param(None, jnp.int4, "explicit", id="full-explicit", marks=pytest.mark.slow),
        pytest.param(8, jnp.int8, "auto", id="short-auto", marks=pytest.mark.slow),
        pytest.param(8, jnp.int8, "explicit", id="short-explicit", marks=pytest.mark.slow),
    ],
)
def test_a_whole_step_on_a_mesh_is_that_of_one_device(rank, bits, kind):
    """Rank 8 is shorter than a block, which then has several rows, of several devices."""
    width = 64
    params = {
        "embed": draws.normal(0, 16, width) / 4,
        "up": draws.normal(1, 3, width, 2 * width) / 8,
        "down": draws.normal(2, 3, 2 * width, width) / 8,
    }
    divided = {"embed": P("data"), "up": P(None, "data"), "down": P(None, "data")}

    def loss_fn(params, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w[0]) @ w[1], None

        x, _ = jax.lax.scan(layer, x @ params["embed"], (params["up"], params["down"]))
        return jnp.mean((x @ params["embed"].T - 1) ** 2)

    opt = florax.per_layer(optax.sgd(1.0), {"embed": False, "up": True, "down": True})
    tx = florax.flora_accumulate(opt, 4, lambda path, leaf: rank, accumulator_dtype=bits)
    step = jax.jit(florax.value_and_update(loss_fn, tx))
    x = draws.normal(3, 4, 8, 16)
    expected = step(params, tx.init(params), x)[1]
    mesh = meshes.make((2, 4), ("data", "model"), KINDS[kind])
    with jax.set_mesh(mesh):
        shardings = {name: NamedSharding(mesh, spec) for name, spec in divided.items()}
        own = jax.device_put(params, shardings)
        x = jax.device_put(x, NamedSharding(mesh, P()))
        got = step(own, jax.jit(tx.init)(own), x)[1]
    for name, new in got.items():
        off = abs(np.asarray(new) - np.asarray(expected[name]))
        assert np.mean(off > 1e-4 * abs(expected[name] - params[name]).max()) < 0.01
