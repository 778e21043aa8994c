"""State bytes are those of the theory, of the arrays and of the report; the report says why."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

import florax

STACK = florax.FloraDimensionNumbers(rows=1, columns=2, batch=0)


def shapes_of(dtype=jnp.float32, **shapes):
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def stacked(path, leaf):
    return STACK if len(leaf.shape) == 3 else None


def gpt3(layers=96, width=12288, feed_forward=49152):
    """Per layer four attention matrices, two of the feed-forward network, biases and norms."""
    layer = shapes_of(
        **dict.fromkeys(("query", "key", "value", "out"), (width, width)),
        up=(width, feed_forward),
        down=(feed_forward, width),
        bias=(feed_forward,),
        norm=(width,),
    )
    return {"wte": jax.ShapeDtypeStruct((50257, width), jnp.float32), "h": [layer] * layers}


def on_layers(path, leaf):
    return 256 if "wte" not in jax.tree_util.keystr(path) else None


def compressed(report):
    return [row for row in report.rows if row.rank is not None]


def share(rows):
    return sum(row.state_bytes for row in rows) / sum(row.full_bytes for row in rows)


TRANSFORMATIONS = {
    "momentum": florax.flora_momentum,
    "accumulate": lambda rank, **kwargs: florax.flora_accumulate(
        optax.sgd(0.1), every_k_schedule=2, rank=rank, **kwargs
    ),
}


@pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS.keys())
@pytest.mark.parametrize("side, kept", [("smaller", 40), ("larger", 24)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sketch_takes_rank_times_the_kept_side(make, side, kept, dtype):
    params = shapes_of(matrix=(24, 40), transposed=(40, 24), stack=(3, 24, 40), bias=(40,))
    tx = make(rank=5, side=side, dimension_numbers=stacked, accumulator_dtype=dtype)
    expected = {"matrix": 5 * kept, "transposed": 5 * kept, "stack": 3 * 5 * kept, "bias": 40}
    state = jax.eval_shape(tx.init, params)
    assert {name: x.size for name, x in state.sketch.arrays.items()} == expected
    assert all(x.dtype == dtype for x in jax.tree.leaves(state.sketch.arrays))
    report = florax.state_report(tx, params)
    rows = {row.path: row for row in report.rows}
    for name, size in expected.items():
        row = rows[f"['{name}']"]
        assert row.state_bytes == size * jnp.dtype(dtype).itemsize
        assert row.full_bytes == math.prod(params[name].shape) * jnp.dtype(dtype).itemsize
    assert report.state_bytes == sum(expected.values()) * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS.keys())
def test_nothing_in_a_state_is_as_large_as_a_compressed_leaf(make):
    params = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes_of(a=(24, 40), b=(40, 24)))
    state = make(rank=5).init(params)
    assert max(x.size for x in jax.tree.leaves(state)) == 5 * 40
    _, state = jax.jit(make(rank=5).update)(params, state, params)
    assert max(x.size for x in jax.tree.leaves(state)) == 5 * 40


def test_the_report_counts_the_bytes_of_the_arrays():
    params = {"a": jnp.zeros((24, 40)), "b": jnp.zeros(7, jnp.bfloat16), "c": jnp.zeros(())}
    tx = florax.flora_momentum(rank=5)
    state = tx.init(params)
    assert florax.state_report(tx, params).state_bytes == sum(
        x.nbytes for x in jax.tree.leaves(state.sketch.arrays)
    )


@pytest.mark.slow
def test_gpt3_keeps_a_48th_of_its_matrices():
    params = gpt3()
    tx = optax.chain(optax.adafactor(1e-3), florax.flora_momentum(on_layers))
    report = florax.state_report(tx, params)
    rows = compressed(report)
    assert len(rows) == 96 * 6
    assert share(rows) == 256 / 12288  # 2.08 %
    assert {row.side for row in rows} == {12288}


def test_gpt3_with_stacked_layers_keeps_as_much():
    one_layer, *_ = gpt3()["h"]
    params = {"h": {n: jax.ShapeDtypeStruct((96, *s.shape), s.dtype) for n, s in one_layer.items()}}
    tx = florax.flora_momentum(256, dimension_numbers=stacked)
    stacked_rows = compressed(florax.state_report(tx, params))
    assert len(stacked_rows) == 6
    assert share(stacked_rows) == 256 / 12288
    unstacked = florax.state_report(florax.flora_momentum(on_layers), gpt3())
    assert sum(row.state_bytes for row in stacked_rows) == sum(
        row.state_bytes for row in compressed(unstacked)
    )


def test_the_report_says_why_a_leaf_stays_dense():
    params = shapes_of(
        head=(24, 40), bias=(40,), scale=(), kernel=(24, 40), small=(4, 40), stack=(3, 24, 40)
    )
    ranks = {**dict.fromkeys(params, 5), "head": None}
    reasons = {
        row.path: row.reason
        for row in florax.state_report(florax.flora_momentum(ranks), params).rows
    }
    assert reasons == {
        "['bias']": "1-D",
        "['head']": "rank is None",
        "['kernel']": "",
        "['scale']": "0-D",
        "['small']": "rank 5 ≥ min(4, 40)",
        "['stack']": "3-D, no dimension_numbers",
    }


def test_rows_name_the_leaf_and_its_geometry():
    params = shapes_of(kernel=(24, 40))
    (row,) = florax.state_report(florax.flora_momentum(5), params).rows
    assert row.transformation == "flora_momentum"
    assert (row.path, row.shape, row.rank, row.side) == ("['kernel']", (24, 40), 5, 24)


def test_accumulation_around_momentum_is_two_tables():
    inner = optax.chain(optax.adafactor(0.1), florax.flora_momentum(5))
    tx = florax.flora_accumulate(inner, every_k_schedule=2, rank=7)
    report = florax.state_report(tx, shapes_of(kernel=(24, 40)))
    assert [(row.transformation, row.rank) for row in report.rows] == [
        ("flora_accumulate", 7),
        ("flora_momentum", 5),
    ]
    assert str(report).count("kept dense because") == 2


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"bias": False, "kernel": True}),
    "partition": lambda tx: optax.partition(
        {"flora": tx, "sgd": optax.sgd(0.1)}, {"bias": "sgd", "kernel": "flora"}
    ),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "per_layer": lambda tx: florax.per_layer(tx, False),
    "named_chain": lambda tx: optax.named_chain(("flora", tx)),
}


def test_layers_are_counted_as_the_stack_that_they_are_kept_in():
    """Inside of `per_layer` a leaf is one layer's; the row is that of the parameter."""
    params = shapes_of(layers=(3, 24, 40), norm=(3, 24), head=(24, 40))
    stacked = {"layers": True, "norm": True, "head": False}
    report = florax.state_report(florax.per_layer(florax.flora_momentum(5), stacked), params)
    whole = florax.state_report(
        florax.flora_momentum(5, dimension_numbers={"layers": STACK, "norm": None, "head": None}),
        {**params, "norm": jax.ShapeDtypeStruct((3 * 24,), jnp.float32)},
    )
    kept = {row.path: (row.rank, row.side, row.state_bytes, row.full_bytes) for row in report.rows}
    assert kept == {
        row.path: (row.rank, row.side, row.state_bytes, row.full_bytes) for row in whole.rows
    }
    assert {row.path: row.shape for row in report.rows} == {
        f"['{name}']": shape.shape for name, shape in params.items()
    }


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_it_is_found_inside_of_optax_wrappers(wrap):
    report = florax.state_report(
        wrap(florax.flora_momentum(5)), shapes_of(bias=(40,), kernel=(24, 40))
    )
    assert [row.path for row in compressed(report)] == ["['kernel']"]


def test_the_table_is_aligned():
    params = shapes_of(a=(24, 40), a_longer_name=(12288, 49152), scale=())
    table = str(florax.state_report(florax.flora_momentum(5), params))
    title, header, *rows, total = table.splitlines()
    assert title == "flora_momentum"
    assert total.startswith("total of 3 leaves")
    for word in ("shape", "kept dense because"):  # text: aligned on the left
        column = header.index(word)
        assert all(row[column - 2 : column].strip() == "" for row in rows)
    for word in ("rank", "side", "state", "full size", "share"):  # numbers: on the right
        end = header.index(word) + len(word)
        assert all(row[end - 1] != " " and row[end : end + 2].strip() == "" for row in rows)


def test_bytes_are_printed_in_units_that_fit():
    params = shapes_of(byte=(3,), kibi=(512,), mebi=(2**19,), gibi=(2**29,), tebi=(2**39, 1))
    table = str(florax.state_report(florax.flora_momentum(5), params))
    for size in ("12 B", "2.0 KiB", "2.0 MiB", "2.0 GiB", "2.0 TiB"):
        assert f"  {size}  " in table


def test_an_optimizer_without_flora_is_refused():
    with pytest.raises(ValueError, match="keeps no FLORA state"):
        florax.state_report(optax.adam(0.1), shapes_of(kernel=(24, 40)))


# --- gradients


def gradient_loss(params, x):
    hidden = jnp.tanh(x @ params["up"]) + params["bias"]
    return jnp.mean(hidden @ params["down"] @ jnp.exp(params["head"]))


GRADIENT_SHAPES = shapes_of(up=(24, 40), bias=(40,), down=(40, 24), head=(24, 40))
INPUT = jax.ShapeDtypeStruct((3, 24), jnp.float32)


def test_the_report_says_which_gradients_are_born_compressed_and_what_prevents_others():
    tx = florax.flora_accumulate(optax.sgd(0.1), 2, {**dict.fromkeys(GRADIENT_SHAPES, 5)})
    report = florax.gradient_report(gradient_loss, tx, GRADIENT_SHAPES, INPUT)
    rows = {row.path: row for row in report.rows}
    assert {path: row.sketch for path, row in rows.items()} == {
        "['bias']": None,
        "['down']": (40, 5),
        "['head']": (40, 5),
        "['up']": (40, 5),
    }
    assert rows["['bias']"].reason == "1-D"
    assert rows["['up']"].dense_uses == rows["['down']"].dense_uses == ()
    (use,) = rows["['head']"].dense_uses
    assert use.startswith("exp at test_report.py:")
    assert "optax.add_decayed_weights" in str(report)
    assert [row.shape for row in report.rows] == [(40,), (40, 24), (24, 40), (24, 40)]


def test_it_says_so_of_arrays_as_of_shapes():
    tx = florax.flora_momentum(5, residual=False)
    arrays = jax.tree.map(lambda s: jnp.ones(s.shape), (GRADIENT_SHAPES, INPUT))
    of_arrays = florax.gradient_report(gradient_loss, tx, *arrays)
    assert of_arrays == florax.gradient_report(gradient_loss, tx, GRADIENT_SHAPES, INPUT)


def test_it_takes_argnums_aux_and_what_is_no_array():
    def loss(name, x, params):
        return gradient_loss(params, getattr(jnp, name)(x)), params["head"]

    tx = florax.flora_momentum(5, residual=False)
    report = florax.gradient_report(
        loss, tx, "sin", INPUT, GRADIENT_SHAPES, argnums=-1, has_aux=True
    )
    assert [row.sketch is None for row in report.rows] == [True, False, False, False]


def test_it_takes_keywords_of_the_loss():
    def loss(params, x, *, name, scale):
        return scale * gradient_loss(params, getattr(jnp, name)(x))

    tx, scale = florax.flora_momentum(5, residual=False), jax.ShapeDtypeStruct((), jnp.float32)
    report = florax.gradient_report(loss, tx, GRADIENT_SHAPES, INPUT, name="sin", scale=scale)
    assert report == florax.gradient_report(gradient_loss, tx, GRADIENT_SHAPES, INPUT)


def test_it_names_every_obstacle():
    def loss(params, x):
        kernel = params["up"]
        penalty = jnp.sum(jnp.abs(kernel)) + jnp.sum(jnp.exp(kernel))
        return gradient_loss(params, x) + penalty + jnp.max(kernel)

    report = florax.gradient_report(
        loss, florax.flora_momentum(5, residual=False), GRADIENT_SHAPES, INPUT
    )
    uses = next(row.dense_uses for row in report.rows if row.path == "['up']")
    assert [use.split()[0] for use in uses] == ["abs", "exp", "reduce_max"]
    lines = [line.strip() for line in str(report).splitlines()]
    assert all(any(line.endswith(use) for line in lines) for use in uses)


def test_a_rank_of_none_is_the_reason_there_too():
    tx = florax.flora_accumulate(optax.sgd(0.1), 2, lambda path, leaf: None)
    report = florax.gradient_report(gradient_loss, tx, GRADIENT_SHAPES, INPUT)
    assert [row.reason for row in report.rows[:2]] == ["rank is None", "rank is None"]


def test_its_table_is_aligned():
    tx = florax.flora_accumulate(optax.sgd(0.1), 2, 5)
    table = str(florax.gradient_report(gradient_loss, tx, GRADIENT_SHAPES, INPUT))
    header, *rows, note = table.splitlines()
    assert len(rows) == 4 and note.startswith("Note: ")
    for word in ("shape", "gradient", "dense because of"):
        column = header.index(word)
        assert all(row[column - 2 : column].strip() == "" for row in rows)
    assert "  sketch 40×5" in table
    assert "  dense                       1-D" in table


def test_a_nested_operation_is_named_by_its_own_line():
    """Deep in a jitted, checkpointed scan, it is the user's line that says which it was."""

    def loss(params, x):
        @jax.checkpoint
        def layer(x, w):
            return x @ jax.jit(lambda w: jnp.cumsum(w, 0))(w), None

        return jnp.mean(jax.lax.scan(layer, x, params["w"])[0])

    params = shapes_of(w=(2, 24, 24))
    tx = florax.flora_accumulate(optax.sgd(0.1), 2, 5, dimension_numbers={"w": STACK})
    (row,) = florax.gradient_report(loss, tx, params, INPUT).rows
    (use,) = row.dense_uses
    assert use.startswith("cumsum at test_report.py:")
