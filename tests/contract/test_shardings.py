"""On meshes states are divided as their parameters are, and sketches are what crosses the wire."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import meshes
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import florax

ROWS, COLUMNS, RANK = 256, 384, 96
BOTH = 32 + 96  # columns of the two sketches of that rank
STACK = florax.FloraDimensionNumbers(rows=1, columns=2, batch=0)
NUMBERS = {"kernel": None, "bias": None, "layers": STACK}
SPECS = {
    "rows": {"kernel": P("model"), "bias": P(), "layers": P(None, "model")},
    "columns": {"kernel": P(None, "model"), "bias": P("model"), "layers": P(None, None, "model")},
    "both": {"kernel": P("data", "model"), "bias": P("model"), "layers": P(None, "data", "model")},
    "all by rows": {
        "kernel": P(("data", "model")),
        "bias": P("model"),  # in 8 bits four blocks
        "layers": P(None, ("data", "model")),
    },
}


def adafactor():
    return optax.adafactor(1e-2, min_dim_size_to_factor=64)


def accumulate(**settings):
    return florax.flora_accumulate(
        adafactor(), 2, RANK, dimension_numbers=NUMBERS, key=1, **settings
    )


def momentum(**settings):
    return florax.flora_momentum(RANK, dimension_numbers=NUMBERS, key=1, **settings)


COSINE = {"projection": "cosine"}
KINDS = {
    "momentum": lambda: momentum(),
    "momentum, larger": lambda: momentum(side="larger"),
    "momentum, residual": lambda: momentum(residual=True, **COSINE),
    "momentum, int8": lambda: momentum(residual=True, accumulator_dtype=jnp.int8, **COSINE),
    "accumulate": lambda: accumulate(),
    "accumulate, larger": lambda: accumulate(side="larger", **COSINE),
    "accumulate, both": lambda: accumulate(side="both", **COSINE),
    "accumulate, both, int8": lambda: accumulate(side="both", accumulator_dtype=jnp.int8, **COSINE),
}
OFTEN = {("accumulate", AxisType.Explicit)}


kinds_and_axis_types = pytest.mark.parametrize(
    ("kind", "axis_type"),
    [
        pytest.param(
            kind,
            axis_type,
            id=f"{axis_type.name}-{kind}",
            marks=() if (kind, axis_type) in OFTEN else pytest.mark.slow,
        )
        for kind in KINDS
        for axis_type in (AxisType.Auto, AxisType.Explicit)
    ],
)
divisions = pytest.mark.parametrize(
    "division",
    [pytest.param(name, marks=[] if name == "both" else [pytest.mark.slow]) for name in SPECS],
)


def place(axis_type, division):
    """A mesh of eight devices, and parameters on it."""
    mesh = meshes.make((2, 4), ("data", "model"), axis_type)
    shapes = {"kernel": (ROWS, COLUMNS), "bias": (COLUMNS,), "layers": (3, ROWS, COLUMNS)}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(0), 3), strict=True))
    params = {
        name: jax.device_put(
            jax.random.normal(keys[name], shape), NamedSharding(mesh, SPECS[division][name])
        )
        for name, shape in shapes.items()
    }
    return mesh, params


def entries_on_the_wire(compiled):
    """The largest array that any collective makes, in entries."""
    largest = 0
    names = "all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute"
    for made in re.findall(rf" = (.*?) (?:{names})(?:-start)?\(", compiled.as_text()):
        for axes in re.findall(r"[a-z]\d+\[([\d,]*)\]", made):
            largest = max(largest, math.prod(int(i) for i in axes.split(",") if i))
    return largest


def kept_sides(spec, side):
    """Of a kernel the divisions of what its sketches keep: the projected axis is summed over."""
    rows, columns = (*spec, None, None)[:2]
    return {"smaller": [columns], "larger": [rows], "both": [columns, rows]}[side]


@kinds_and_axis_types
@divisions
def test_no_update_brings_a_whole_gradient_together(kind, division, axis_type):
    mesh, params = place(axis_type, division)
    tx = KINDS[kind]()
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init, out_shardings=florax.state_shardings(tx, params))(params)
        compiled = jax.jit(tx.update).lower(params, state, params).compile()
    # Of the stack all three sketches may travel at once. jax 0.10 also brings together what is
    # solved for of two sketches, which has the columns of both.
    width = BOTH if "both" in kind and jax.__version_info__ < (0, 11) else RANK
    assert entries_on_the_wire(compiled) <= 3 * width * COLUMNS < 3 * ROWS * COLUMNS


@kinds_and_axis_types
@divisions
def test_a_state_is_divided_as_its_parameters_and_stays_so(kind, division, axis_type):
    mesh, params = place(axis_type, division)
    tx = KINDS[kind]()
    with jax.set_mesh(mesh):
        shardings = florax.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        update = jax.jit(tx.update)
        for _ in range(2):
            _, state = update(params, state, params)
            assert jax.tree.map(lambda x: x.sharding, state) == shardings
        assert update._cache_size() == 1  # a state divided otherwise would compile it once more
    sketch = jax.tree.leaves(state.sketch.arrays["kernel"])
    side = next((name for name in ("larger", "both") if name in kind), "smaller")
    for array in sketch:
        assert any(
            array.sharding.is_equivalent_to(NamedSharding(mesh, P(along)), array.ndim)
            for along in kept_sides(SPECS[division]["kernel"], side)
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@divisions
def test_on_automatic_meshes_a_compiled_init_divides_sketches_too(kind, division):
    _, params = place(AxisType.Auto, division)
    tx = KINDS[kind]()
    shardings = florax.state_shardings(tx, params).sketch.arrays
    arrays = jax.jit(tx.init)(params).sketch.arrays
    for name in ("kernel", "layers"):
        for array, sharding in zip(
            jax.tree.leaves(arrays[name]), jax.tree.leaves(shardings[name]), strict=True
        ):
            assert array.sharding.is_equivalent_to(sharding, array.ndim)
            assert not array.any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["momentum, residual", "accumulate, both"])
def test_what_is_saved_on_one_mesh_goes_on_on_another(kind, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tx, updates = KINDS[kind](), []
    mesh, params = place(AxisType.Explicit, "both")
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        update = jax.jit(tx.update)
        _, state = update(params, state, params)
        with checkpoint.StandardCheckpointer() as saved:
            saved.save(tmp_path / "state", state)
        for _ in range(3):
            own, state = update(params, state, params)
            updates.append(jax.device_get(own))
    mesh, params = place(AxisType.Auto, "rows")
    shapes = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
        florax.state_shardings(tx, params),
    )
    with checkpoint.StandardCheckpointer() as saved:
        state = saved.restore(tmp_path / "state", shapes)
    update = jax.jit(tx.update)
    for expected in updates:
        own, state = update(params, state, params)
        # Sums of 256 float32 products, divided among devices otherwise; updates are about 1e-2.
        chex.assert_trees_all_close(jax.device_get(own), expected, rtol=1e-4, atol=1e-6)


def test_parameters_that_are_on_no_mesh_are_named():
    _, params = place(AxisType.Auto, "rows")
    params["bias"] = jnp.zeros(3)
    with pytest.raises(ValueError, match=r"params\['bias'\] needs a NamedSharding of a mesh"):
        florax.state_shardings(momentum(), params)


def test_parameters_on_two_meshes_are_named():
    _, params = place(AxisType.Auto, "rows")
    _, others = place(AxisType.Explicit, "rows")
    with pytest.raises(ValueError, match=r"params\['layers'\] is on another mesh"):
        florax.state_shardings(momentum(), params | {"layers": others["layers"]})


def test_parameters_that_are_none_say_so():
    with pytest.raises(ValueError, match="params has no arrays"):
        florax.state_shardings(momentum(), {})
