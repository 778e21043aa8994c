"""A FLORA state: found wherever it stands, restored in any container, refused if wrong."""

import dataclasses
import functools
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from draws import normal, normal_like
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import florax
from florax import _keys, _sketches, _stored

PARAMS = {
    "bias": jnp.zeros(8),
    "layers": {"kernel": jnp.ones((3, 12, 8)), "norm": jnp.ones((3, 8))},
    "matrix": jnp.ones((12, 8)),
}
STACKED = {"bias": False, "layers": True, "matrix": False}


def rank(path, leaf):
    return 3 if leaf.ndim == 2 else None


def momentum(**arguments):
    return florax.flora_momentum(**{"rank": 3, "resample_every": 2, **arguments})


def accumulate(opt=None, **arguments):
    arguments = {"every_k_schedule": 3, "rank": 3, **arguments}
    return florax.flora_accumulate(optax.sgd(1.0) if opt is None else opt, **arguments)


def run(tx, gradients, params=PARAMS):
    """The state after these gradients."""
    state = tx.init(params)
    for grads in gradients:
        _, state = jax.jit(tx.update)(grads, state, params)
    return state


GRADIENTS = [normal_like(seed, PARAMS) for seed in range(5)]

# --- found and counted

STATES = {
    "momentum": momentum(),
    "accumulate": accumulate(),
    "both": accumulate(optax.chain(optax.adafactor(0.1), momentum(rank=2))),
    "both sides": accumulate(side="both", projection="cosine"),
    "16 bits": momentum(accumulator_dtype=jnp.bfloat16),
    "per layer": florax.per_layer(florax.flora(0.1, 3), STACKED),
    "per layer inside": accumulate(florax.per_layer(florax.flora(0.1, rank), STACKED)),
    "per layer outside": florax.per_layer(accumulate(momentum()), STACKED),
    "chain": optax.chain(optax.clip(1.0), optax.chain(momentum(), optax.scale(0.1))),
    "named chain": optax.named_chain(("a", momentum()), ("b", optax.adam(0.1))),
    "masked": optax.masked(momentum(), {"bias": False, "layers": True, "matrix": True}),
    "partition": optax.partition(
        {"a": momentum(), "b": accumulate()}, {"bias": "a", "layers": "b", "matrix": "a"}
    ),
    "injected": optax.inject_hyperparams(florax.flora, static_args="rank")(0.1, rank=3),
    "MultiSteps": optax.MultiSteps(momentum(), 2).gradient_transformation(),
    "of the user": optax.GradientTransformation(
        lambda params: {"mine": (momentum().init(params), 1)}, lambda g, s, p=None: (g, s)
    ),
}


@pytest.mark.parametrize("tx", STATES.values(), ids=STATES.keys())
def test_the_bytes_of_the_report_are_those_of_the_state(tx):
    sketches = _sketches.find(tx.init(PARAMS), _sketches.Sketches)
    kept = [x for sketch in sketches for x in jax.tree.leaves(sketch.arrays)]
    report = florax.state_report(tx, PARAMS)
    assert report.state_bytes == sum(x.nbytes for x in kept) > 0
    for row in report.rows:
        shares = [(row.rank, row.side), row.across] if row.rank else []
        share = sum(rank / side for rank, side in filter(None, shares))
        assert row.rank is None or row.state_bytes / row.full_bytes == pytest.approx(share)


def test_a_stack_that_is_taken_for_a_matrix_beside_stacks_that_are_not_is_reported_loudly():
    params = {
        "norm": jnp.ones((48, 64)),
        "kernel": jnp.ones((48, 64, 64)),
        "head": jnp.ones((9, 9)),
    }
    table = str(florax.state_report(momentum(), params))
    assert re.search(r"Note: \['norm'\] .*48×64.* one matrix.*\['kernel'\].*per_layer", table)
    for tx in (florax.per_layer(momentum(), {"norm": True, "kernel": True, "head": False}),):
        assert "Note" not in str(florax.state_report(tx, params))
    assert "Note" not in str(florax.state_report(momentum(), PARAMS["layers"]["norm"]))


# --- saved and restored


@pytest.mark.parametrize("tx", STATES.values(), ids=STATES.keys())
def test_a_state_pickles_and_compares_whatever_function_was_given(tx):
    state = tx.init(PARAMS)
    again = pickle.loads(pickle.dumps(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    chex.assert_trees_all_equal(again, state)


def test_a_skip_function_is_no_part_of_the_state():
    """Not even of its tree structure: states of equal transformations are equal."""
    states = [
        accumulate(should_skip_update_fn=lambda *args: (False, ())).init(PARAMS) for _ in range(2)
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    pickle.dumps(states[0])


def containers():
    """The same parameters and gradients in other containers, in the same order."""
    linen = pytest.importorskip("flax.linen", reason="flax comes with the extra `examples`")
    nnx = pytest.importorskip("flax.nnx")
    names = {1: ("x",), 2: ("x", "y"), 3: (None, "x", "y")}

    def boxed(tree):
        return jax.tree.map(lambda x: linen.Partitioned(x, names[x.ndim]), tree)

    def variables(tree):
        return nnx.State(jax.tree.map(nnx.Param, tree))

    return {
        "deeper": lambda tree: {"model": tree},
        "a list": lambda tree: jax.tree.leaves(tree),
        "linen boxes": boxed,
        "nnx variables": variables,
        "nnx values": lambda tree: nnx.State(tree),
    }


@pytest.mark.parametrize(
    "to",
    [
        *(pytest.param(to, marks=pytest.mark.slow) for to in ("deeper", "a list", "linen boxes")),
        *("nnx variables", "nnx values"),
    ],
)
@pytest.mark.parametrize(
    "kind",
    [
        "16 bits",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("momentum", "both", "both sides")),
    ],
)
def test_a_state_reads_the_same_in_any_container(kind, to):
    """Arrays saved from plain dicts and restored into another container, and back."""
    tx, convert = STATES[kind], containers()[to]
    state = run(tx, GRADIENTS[:2])
    expected, after = jax.jit(tx.update)(GRADIENTS[2], state, PARAMS)
    other = convert(PARAMS)
    target = jax.tree.structure(tx.init(other))
    restored = jax.tree.unflatten(target, jax.tree.leaves(state))
    got, got_after = jax.jit(tx.update)(convert(GRADIENTS[2]), restored, other)
    # The same operations on the same numbers.
    chex.assert_trees_all_equal(jax.tree.leaves(got), jax.tree.leaves(expected))
    chex.assert_trees_all_equal(jax.tree.leaves(got_after), jax.tree.leaves(after))
    back = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(got_after))
    chex.assert_trees_all_equal(back, after)


ONE_SIDE = accumulate(projection="cosine")
BOTH_SIDES = accumulate(projection="cosine", side="both")


def test_flax_serialization_restores_a_state():
    serialization = pytest.importorskip("flax.serialization")
    for name in STATES.keys() - {"named chain"}:  # whose `OrderedDict` flax does not write
        state = STATES[name].init(PARAMS)
        some = jax.tree.map(lambda x: x + jnp.ones_like(x), state)
        restored = serialization.from_bytes(state, serialization.to_bytes(some))
        chex.assert_trees_all_equal(restored, some)
        assert jax.tree.structure(restored) == jax.tree.structure(some)


@pytest.mark.parametrize(
    "made, now",
    [
        (momentum(), momentum(projection="gaussian")),
        (momentum(), momentum(side="larger")),
        (momentum(), momentum(rank=4)),
        (accumulate(), accumulate(use_grad_mean=False)),
        (accumulate(), accumulate(projection="cosine")),
        (accumulate(rank=rank), accumulate(rank=rank, side="larger")),
        (ONE_SIDE, BOTH_SIDES),
        (BOTH_SIDES, ONE_SIDE),
    ],
    ids=[
        *("projection", "side", "rank", "mean", "of accumulation", "function"),
        *("both for one", "one for both"),
    ],
)
def test_a_state_of_other_settings_is_refused(made, now):
    """As it is, and where its arrays were restored into a state of the new settings."""
    state = run(made, GRADIENTS[:1])
    refusal = "state was made under other settings"
    for update in (now.update, jax.jit(now.update)):
        with pytest.raises(ValueError, match=refusal):
            update(GRADIENTS[1], state, PARAMS)
    if now.init(PARAMS).sketch.parts[-1].is_across != state.sketch.parts[-1].is_across:
        return  # there are not as many arrays
    restored = jax.tree.unflatten(jax.tree.structure(now.init(PARAMS)), jax.tree.leaves(state))
    with pytest.raises(ValueError, match=refusal):
        now.update(GRADIENTS[1], restored, PARAMS)


@pytest.mark.parametrize(
    "made, now",
    [
        (momentum(), momentum(projection="gaussian")),
        (accumulate(every_k_schedule=1), accumulate(every_k_schedule=1, use_grad_mean=False)),
    ],
    ids=["projection", "mean"],
)
def test_restored_under_other_settings_traced_values_become_nan_never_wrong_numbers(made, now):
    state = run(made, GRADIENTS[:1])
    restored = jax.tree.unflatten(jax.tree.structure(now.init(PARAMS)), jax.tree.leaves(state))
    updates, _ = jax.jit(now.update)(GRADIENTS[1], restored, PARAMS)
    assert jnp.isnan(updates["matrix"]).all()
    # A dense average is the same whatever the projection; a mean is no sum.
    kept = isinstance(state, florax.FloraMomentumState)
    assert jnp.isnan(updates["bias"]).all() != kept


# --- a sketch of other projections


def loss_fn(params, x):
    return jnp.mean((x @ params["matrix"] + params["bias"]) ** 2)


X = normal(9, 4, 12)
SMALL = {"bias": PARAMS["bias"], "matrix": PARAMS["matrix"]}


def born(tx, state, x=X):
    return jax.jit(lambda state: florax.value_and_grad(loss_fn, tx)(SMALL, x, opt_state=state)[1])(
        state
    )


OTHERS = {
    "key": lambda state: accumulate(key=1).init(SMALL),
    "cycle": lambda state: state._replace(
        sketch=dataclasses.replace(state.sketch, cycle=state.sketch.cycle + 1)
    ),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_a_sketch_of_another_cycle_or_key_is_refused(other):
    tx = accumulate()
    state = tx.init(SMALL)
    stale = born(tx, other(state))
    with pytest.raises(ValueError, match=r"sketch of \['matrix'\] was made for another state"):
        tx.update(stale, state, SMALL)
    with pytest.raises(ValueError, match="was made for another state"):
        florax.accumulate(tx, stale, state)
    after = jax.jit(lambda g, s: florax.accumulate(tx, g, s))(stale, state)
    assert jnp.isnan(after.sketch.arrays["matrix"]).all()
    mixed = jax.tree.map(lambda a, b: (a + 3 * b) / 4, stale, born(tx, state))
    with pytest.raises(ValueError, match="was made for another state"):
        tx.update(mixed, state, SMALL)


def test_a_stale_sketch_of_a_momentum_is_refused():
    tx = momentum(resample_every=1, residual=False)
    state = tx.init(SMALL)
    grads = born(tx, state)
    _, state = tx.update(grads, state, SMALL)
    with pytest.raises(ValueError, match="was made for another state"):
        tx.update(grads, state, SMALL)


COMBINATIONS = {
    "sum": lambda a, b: a + b,
    "mean": lambda a, b: (a + b) / 2,
    "difference": lambda a, b: a - b,
    "scaled": lambda a, b: 1e4 * a,
    "small": lambda a, b: 1e-6 * a,
    "zero": lambda a, b: 0 * a,
    "moving average": lambda a, b: 0.999 * a + 0.001 * b,
    "of many": lambda a, b: sum((a if i % 2 else b for i in range(1000)), jnp.zeros_like(a)) / 1000,
}


@functools.cache
def two_sketches():
    tx = accumulate()
    state = tx.init(SMALL)
    return tx, state, born(tx, state), born(tx, state, 2 * X)


@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_sketches_of_one_cycle_combine_as_gradients_do(combine):
    tx, state, a, b = two_sketches()
    after = tx.update(jax.tree.map(combine, a, b), state, SMALL)[1]
    # The accumulator of one micro-step is its sketch.
    expected = combine(a["matrix"].array, b["matrix"].array)
    np.testing.assert_allclose(after.sketch.arrays["matrix"], expected, rtol=1e-6)


def test_sketches_may_be_cast_and_their_norm_is_that_of_what_they_keep():
    tx = accumulate()
    state = tx.init(SMALL)
    grads = born(tx, state)
    arrays = [grads["bias"], grads["matrix"].array]
    np.testing.assert_allclose(optax.tree.norm(grads), optax.tree.norm(arrays), rtol=1e-6)
    half = optax.tree.cast(grads, jnp.bfloat16)
    after = tx.update(half, state, SMALL)[1]
    np.testing.assert_allclose(after.sketch.arrays["matrix"], arrays[1], rtol=2.0**-7)
    nan = jax.tree.map(lambda x: jnp.nan * x, grads)
    assert jnp.isnan(tx.update(nan, state, SMALL)[1].sketch.arrays["matrix"]).all()


# --- boxes of parameters, on a mesh


@pytest.fixture
def mesh():
    return meshes.make((4, 2), ("x", "y"))


@pytest.mark.slow
def test_both_sketches_in_boxes_of_linen_name_their_own_axes(mesh):
    """C those of the rows, R those of the columns: the larger side is the rows."""
    linen = pytest.importorskip("flax.linen")
    boxed = {
        "bias": linen.Partitioned(jnp.ones(8), ("x",)),
        "heads": linen.Partitioned(jnp.ones((8, 4, 6)), (None, "x", "y")),
        "matrix": linen.Partitioned(jnp.ones((12, 8)), ("y", "x")),
        "stack": linen.Partitioned(jnp.ones((4, 8, 12)), (None, "x", "y")),
    }
    numbers = {
        "heads": florax.FloraDimensionNumbers(0, (1, 2)),
        "stack": florax.FloraDimensionNumbers(1, 2, batch=0),
    }
    tx = accumulate(
        every_k_schedule=1,
        projection="cosine",
        side="both",
        dimension_numbers=lambda path, leaf: numbers.get(path[0].key),
    )
    with jax.set_mesh(mesh):
        specs = linen.get_partition_spec(jax.eval_shape(tx.init, boxed)).sketch.arrays
        assert specs == {
            "bias": P("x"),
            "heads": (P("x", "y", None), P(None, None)),
            "matrix": (P("y", None), P("x", None)),
            "stack": (P(None, "y", None), P(None, "x", None)),
        }
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        init = jax.jit(lambda p: linen.unbox(tx.init(p).sketch.arrays), out_shardings=shardings)
        assert [x.sharding.spec for x in init(boxed)["matrix"]] == [P("y", None), P("x", None)]
    updates, _ = tx.update(boxed, tx.init(boxed), boxed)
    assert updates["stack"].names == (None, "x", "y")
    plain = jax.tree.map(jnp.asarray, linen.unbox(boxed))
    expected, _ = tx.update(plain, tx.init(plain), plain)
    chex.assert_trees_all_close(linen.unbox(updates), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("logical", [False, True], ids=["Partitioned", "LogicallyPartitioned"])
@pytest.mark.parametrize("tx", [momentum(), accumulate()], ids=["momentum", "accumulate"])
def test_sketches_in_boxes_of_linen_name_their_own_axes(tx, logical, mesh):
    linen = pytest.importorskip("flax.linen")
    box = linen.LogicallyPartitioned if logical else linen.Partitioned
    boxed = {
        "bias": box(jnp.ones(8), ("x",)),
        "heads": box(jnp.ones((8, 4, 6)), (None, "x", "y")),
        "matrix": box(jnp.ones((12, 8)), ("y", "x")),  # the second side is projected
        "transposed": box(jnp.ones((8, 12)), ("y", "x")),  # the first one is
    }
    numbers = {"bias": None, "heads": florax.FloraDimensionNumbers(0, (1, 2)), "matrix": None}
    kind = type(tx.init(PARAMS))
    settings = dict(rank=3, dimension_numbers=lambda path, leaf: numbers.get(path[0].key))
    tx = momentum(**settings) if kind is florax.FloraMomentumState else accumulate(**settings)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(tx.init, boxed)
        specs = linen.get_partition_spec(shapes).sketch.arrays
        if logical:
            specs = linen.logical_to_mesh(specs, [("x", "x"), ("y", "y")])
        assert specs == {
            "bias": P("x"),
            "heads": P("x", "y", None),
            "matrix": P("y", None),
            "transposed": P("x", None),
        }
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        init = jax.jit(lambda p: linen.unbox(tx.init(p).sketch.arrays), out_shardings=shardings)
        arrays = init(boxed)
        assert arrays["matrix"].sharding.spec == P("y", None)
    updates, _ = tx.update(boxed, tx.init(boxed), boxed)
    assert updates["matrix"].names == ("y", "x")


@pytest.mark.slow
def test_boxes_may_be_empty_as_they_are_in_the_parts_of_per_layer():
    nnx = pytest.importorskip("flax.nnx")
    params = nnx.State(jax.tree.map(nnx.Param, PARAMS))
    tx = accumulate(florax.per_layer(momentum(rank=2), lambda path, leaf: "layers" in str(path)))
    state = jax.jit(tx.init)(params)
    assert [x.shape for x in jax.tree.leaves(state.sketch.arrays["layers"])] == [(3, 12, 3), (3, 8)]
    updates, _ = jax.jit(tx.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.slow
def test_an_nnx_optimizer_of_a_partitioned_model_is_made_on_a_mesh(mesh):
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            init = nnx.initializers.lecun_normal()
            self.up = nnx.Linear(
                8, 24, kernel_init=nnx.with_partitioning(init, ("x", "y")), rngs=rngs
            )
            self.attention = nnx.LinearGeneral(
                8, (4, 6), kernel_init=nnx.with_partitioning(init, ("x", None, "y")), rngs=rngs
            )

        def __call__(self, x):
            return self.up(x).sum() + self.attention(x).sum()

    axes = florax.FloraDimensionNumbers(0, (1, 2))
    with jax.set_mesh(mesh):
        model = Model(nnx.Rngs(0))
        tx = accumulate(
            momentum(),
            every_k_schedule=1,
            dimension_numbers=lambda path, leaf: axes if leaf.ndim == 3 else None,
        )
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        kept = optimizer.opt_state.sketch.arrays["up"]["kernel"]
        assert kept.get_value().shape == (24, 3)

        @nnx.jit
        def step(model, optimizer, x):
            optimizer.update(model, nnx.grad(lambda m: m(x))(model))

        before = jnp.array(model.up.kernel.get_value())
        step(model, optimizer, jnp.ones((2, 8)))
        assert jnp.any(model.up.kernel.get_value() != before)


# --- the bits


def test_projections_are_those_of_every_version():
    """Golden values: a saved state must never be read with other projections."""
    params = {"w": [jnp.zeros((12, 5))]}
    words = _keys.words("['w'][0]")
    np.testing.assert_array_equal(words, GOLDEN_WORDS)
    for projection, golden in GOLDEN.items():
        sketch = momentum(rank=2, projection=projection, key=7).init(params).sketch
        assert sketch.words["['w'][0]"].tolist() == words.tolist()
        (a,) = dataclasses.replace(sketch, cycle=jnp.int32(3)).draw().values()
        np.testing.assert_allclose(a, golden, rtol=2e-6, atol=2e-7)
    noise = _stored._noise(jnp.array([1, 2], jnp.uint32), jnp.zeros((), jnp.uint32), 4)
    np.testing.assert_allclose(noise, GOLDEN_NOISE, rtol=1e-7)


GOLDEN_WORDS = [221646640, 476658809]
GOLDEN = {
    "gaussian": np.array(
        """
         0.4149663448  1.0917173624  0.7426207662  0.7184817791 -0.3370650410
        -1.2101392746 -0.8423715234 -0.5877197981 -0.0649080053  0.8236958385
        """.split(),  # noqa: SIM905
        np.float32,
    ).reshape(2, 5),
    "cosine": np.array(
        """
         0.1954394877 -0.5116672516  0.6324555278  0.5116673112  0.1954395920
         0.4472135901  0.4472135901  0.4472135901 -0.4472135901  0.4472135901
        """.split(),  # noqa: SIM905
        np.float32,
    ).reshape(2, 5),
}
GOLDEN_NOISE = [0.3915824294090271, 0.09558713436126709, 0.11142581701278687, 0.2482842206954956]


@pytest.mark.parametrize("partitionable", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("projection", ["gaussian", "cosine"])
def test_flags_of_jax_do_not_change_them(projection, partitionable):
    sketch = momentum(projection=projection).init(PARAMS).sketch
    expected = sketch.draw()
    jax.clear_caches()
    with jax.threefry_partitionable(partitionable):
        chex.assert_trees_all_equal(sketch.draw(), expected)


# --- gradients through a state


@pytest.mark.slow
def test_a_16_bit_sketch_is_differentiated_as_a_cast_is():
    """Straight through, as `optax.ema` in 16 bits."""

    def updated(tx):
        def emitted(scale):
            _, state = tx.update(scale * SMALL["matrix"], tx.init(SMALL["matrix"]))
            update, _ = tx.update(scale * SMALL["matrix"], state)
            return jnp.sum(update.astype(jnp.float32))

        return jax.jit(lambda: (jax.grad(emitted)(2.0), jax.jvp(emitted, (2.0,), (1.0,))[1]))()

    rounded = updated(momentum(projection="cosine", accumulator_dtype=jnp.bfloat16))
    exact = updated(momentum(projection="cosine"))
    np.testing.assert_allclose(rounded, exact, rtol=2.0**-6)
    ema = updated(optax.ema(0.9, debias=False, accumulator_dtype=jnp.bfloat16))
    assert np.all(np.isfinite(ema))


# --- transfers


@pytest.mark.parametrize("tx", [momentum(), accumulate(optax.sgd(0.1))], ids=["momentum", "sgd"])
def test_init_works_where_transfers_are_disallowed(tx):
    params = jax.tree.map(jnp.asarray, SMALL)
    with jax.transfer_guard("disallow"):
        state = tx.init(params)
    chex.assert_trees_all_equal(state, tx.init(params))
