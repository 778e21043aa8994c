"""Bad input is refused early, by a message with the argument, its value and the fix."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import florax
from florax import FloraDimensionNumbers as Axes

PARAMS = {"bias": jnp.ones(8), "layers": [{"kernel": jnp.ones((12, 8))}]}


def momentum(rank=3, **arguments):
    return florax.flora_momentum(rank, **arguments)


def accumulate(rank=3, every_k_schedule=2, **arguments):
    return florax.flora_accumulate(optax.sgd(0.1), every_k_schedule, rank, **arguments)


def flora(rank=3, **arguments):
    return florax.flora(0.1, rank, **arguments)


@pytest.fixture(params=[momentum, accumulate, flora])
def make(request):
    return request.param


# --- arguments, when the transformation is made

NOT_POSITIVE = [0, -1, -(10**9)]
NOT_INTS = [2.0, 2.5, "2", True, False]


@pytest.mark.parametrize("value", NOT_POSITIVE)
def test_rank_is_at_least_1(make, value):
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {value}"):
        make(rank=value)


@pytest.mark.parametrize("value", [*NOT_INTS, None])
def test_rank_is_an_int_a_function_or_a_tree(make, value):
    with pytest.raises(TypeError, match=re.escape("rank must be an int, a function of path and")):
        make(rank=value)


@pytest.mark.parametrize("make", [momentum, flora])
@pytest.mark.parametrize("value", NOT_POSITIVE)
def test_resample_every_is_at_least_1(make, value):
    with pytest.raises(ValueError, match=f"resample_every must be at least 1, got {value}"):
        make(resample_every=value)


@pytest.mark.parametrize("make", [momentum, flora])
@pytest.mark.parametrize("value", [*NOT_INTS, None])
def test_resample_every_is_an_int(make, value):
    with pytest.raises(TypeError, match=f"resample_every must be an int, got {value!r}"):
        make(resample_every=value)


@pytest.mark.parametrize("value", NOT_POSITIVE)
def test_every_k_schedule_is_at_least_1(value):
    with pytest.raises(ValueError, match=f"every_k_schedule must be at least 1, got {value}"):
        accumulate(every_k_schedule=value)


@pytest.mark.parametrize("value", [*NOT_INTS, None])
def test_every_k_schedule_is_an_int_or_a_schedule(value):
    with pytest.raises(TypeError, match=f"every_k_schedule must be an int, got {value!r}"):
        accumulate(every_k_schedule=value)


@pytest.mark.parametrize("make", [momentum, flora])
@pytest.mark.parametrize("value", [1, 1.0, -0.1, 2.0, float("nan"), float("inf")])
def test_decay_lies_between_0_and_1(make, value):
    with pytest.raises(ValueError, match=re.escape(f"decay must lie in [0, 1), got {value}")):
        make(decay=value)


@pytest.mark.parametrize("make", [momentum, flora])
@pytest.mark.parametrize("value", ["0.9", None, True, 0.9j])
def test_decay_is_a_float(make, value):
    with pytest.raises(TypeError, match=re.escape(f"decay must be a float, got {value!r}")):
        make(decay=value)


def test_unknown_projections_are_named_with_the_known_ones(make):
    message = "projection must be one of 'gaussian', 'cosine', got 'Gaussian'"
    with pytest.raises(ValueError, match=message):
        make(projection="Gaussian")


def test_unknown_sides_are_named_with_the_known_ones(make):
    with pytest.raises(
        ValueError, match="side must be one of 'smaller', 'larger', 'both', got 'left'"
    ):
        make(side="left")


@pytest.mark.parametrize("make", [momentum, flora])
def test_residual_momentum_needs_orthonormal_projections(make):
    with pytest.raises(ValueError, match=r"residual=True.*projection='gaussian'.*Leave out"):
        make(residual=True, projection="gaussian")


@pytest.mark.parametrize("value", ["0", 0.5, None, jnp.zeros(2), jnp.zeros(3, jnp.uint32)])
def test_key_is_an_int_or_a_jax_key(make, value):
    with pytest.raises(TypeError, match=r"key must be an int or a JAX PRNG key, got .*key=0"):
        make(key=value).init(PARAMS)


@pytest.mark.parametrize("opt", [optax.adam, optax.MultiSteps(optax.sgd(0.1), 2), 0.1, None])
def test_only_a_transformation_can_be_accumulated_for(opt):
    with pytest.raises(TypeError, match="opt must be an Optax gradient transformation, got"):
        florax.flora_accumulate(opt, every_k_schedule=2, rank=3)


# --- dimension numbers


@pytest.mark.parametrize("axes", [dict(rows=(), columns=0), dict(rows=0, columns=())])
def test_a_matrix_has_rows_and_columns(axes):
    with pytest.raises(ValueError, match=r"must name at least one axis, got \(\)"):
        Axes(**axes)


@pytest.mark.parametrize("value", [0.0, "0", True, (0, 1.0), None])
def test_axes_are_ints(value):
    with pytest.raises(TypeError, match="rows must be a tuple of axes"):
        Axes(rows=value, columns=1)


@pytest.mark.parametrize(
    "axes, message",
    [
        (Axes(0, 0), "axis 0 is named more than once"),
        (Axes(0, (1, -1)), "axis 1 is named more than once"),
        (Axes(0, 1, batch=0), "axis 0 is named more than once"),
        (Axes(-1, -1), "axis 0 is missing"),
        (Axes(0, 2), "axis 2 in columns=(2,) is out of range for a leaf of 2 axes"),
        (Axes(-3, 1), "axis -3 in rows=(-3,) is out of range for a leaf of 2 axes"),
    ],
)
def test_every_axis_of_a_leaf_is_named_once(make, axes, message):
    expected = re.escape(f"dimension_numbers of ['layers'][0]['kernel']: {message}")
    given = {"bias": None, "layers": axes}
    with pytest.raises(ValueError, match=expected):
        make(dimension_numbers=given).init(PARAMS)


@pytest.mark.parametrize("value", [(0, 1), "rows", 1])
def test_dimension_numbers_are_of_their_own_type(make, value):
    expected = "dimension_numbers of .*kernel.* must be a florax.FloraDimensionNumbers or None"
    with pytest.raises(TypeError, match=expected):
        make(dimension_numbers=lambda path, leaf: value if leaf.ndim == 2 else None).init(PARAMS)


# --- trees


@pytest.mark.parametrize("argument", ["rank", "dimension_numbers"])
@pytest.mark.parametrize(
    "tree",
    [
        {"bias": None},
        {"bias": None, "layers": None, "head": None},
        {"bias": None, "layers": [None, None]},
        {"bias": None, "layers": {"kernel": None}},
        [None, None],
    ],
)
def test_trees_of_arguments_match_the_parameters(make, argument, tree):
    with pytest.raises(ValueError, match=f"{argument} is a tree that does not match the param"):
        make(**{argument: tree}).init(PARAMS)


@pytest.mark.parametrize("value, error", [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_a_bad_rank_of_one_leaf_is_reported_with_its_path(make, value, error):
    expected = re.escape("rank of ['layers'][0]['kernel'] must be")
    for rank in (
        {"bias": None, "layers": value},
        lambda path, leaf: value if leaf.ndim == 2 else None,
    ):
        with pytest.raises(error, match=expected):
            make(rank=rank).init(PARAMS)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64])
def test_only_real_floating_point_leaves_can_be_trained(make, dtype):
    params = {**PARAMS, "other": jax.ShapeDtypeStruct((3,), dtype)}
    expected = rf"\['other'\] has dtype {jnp.dtype(dtype)}; only real floating-point.*masked"
    with pytest.raises(TypeError, match=expected):
        jax.eval_shape(make().init, params)


KERNEL = PARAMS["layers"][0]["kernel"]
BAD_GRADIENTS = {
    "missing": (
        {"bias": PARAMS["bias"], "layers": [{}]},
        ValueError,
        "missing [\"['layers'][0]['kernel']\"], surplus []",
    ),
    "none": (
        {"bias": None, "layers": PARAMS["layers"]},
        ValueError,
        "missing [\"['bias']\"], surplus []",
    ),
    "surplus": ({**PARAMS, "head": KERNEL}, ValueError, "missing [], surplus [\"['head']\"]"),
    "renamed": (
        {"b": PARAMS["bias"], "layers": PARAMS["layers"]},
        ValueError,
        "missing [\"['bias']\"], surplus [\"['b']\"]",
    ),
    "transposed": (
        {"bias": PARAMS["bias"], "layers": [{"kernel": KERNEL.T}]},
        ValueError,
        "The gradient of ['layers'][0]['kernel'] has shape (8, 12), the parameter given to init "
        "had (12, 8)",
    ),
    "scalar": (
        {"bias": jnp.ones(()), "layers": PARAMS["layers"]},
        ValueError,
        "The gradient of ['bias'] has shape (), the parameter given to init had (8,)",
    ),
    "integer": (
        {"bias": jnp.ones(8, jnp.int32), "layers": PARAMS["layers"]},
        TypeError,
        "['bias'] has dtype int32",
    ),
}


@pytest.fixture(params=BAD_GRADIENTS.values(), ids=BAD_GRADIENTS.keys())
def bad_gradients(request):
    return request.param


@pytest.mark.parametrize("make", [momentum, accumulate])
def test_update_takes_gradients_of_the_parameters_given_to_init(make, bad_gradients):
    grads, error, message = bad_gradients
    tx = make()
    with pytest.raises(error, match=re.escape(message)):
        tx.update(grads, tx.init(PARAMS), PARAMS)


def test_accumulate_takes_gradients_of_the_parameters_given_to_init(bad_gradients):
    bad, error, message = bad_gradients
    tx = accumulate()
    state = tx.init(PARAMS)
    with pytest.raises(error, match=re.escape(message)):
        florax.accumulate(tx, bad, state)


@pytest.mark.parametrize("count", [0, 1], ids=["nothing accumulated", "one accumulated"])
def test_finish_takes_the_parameters_given_to_init(count, bad_gradients):
    bad, error, message = bad_gradients
    message = message.removeprefix("The gradient of ")
    tx = accumulate()
    state = tx.init(PARAMS)
    for _ in range(count):
        state = florax.accumulate(tx, PARAMS, state)
    with pytest.raises(error, match=re.escape(message)):
        florax.finish(tx, bad, state)


def test_a_side_too_long_for_exact_cosines_is_refused(make):
    params = jax.ShapeDtypeStruct((4, 2**20 + 1), jnp.float32)
    tx = make(projection="cosine", side="larger")
    with pytest.raises(ValueError, match=r"up to 1048576 columns.*1048577 on its larger side"):
        jax.eval_shape(tx.init, params)


# --- both sides


BOTH = dict(side="both", projection="cosine")


def test_both_sides_need_orthonormal_projections():
    message = (
        "side='both' needs projections with orthonormal rows, got projection='gaussian'. Pass "
        "projection='cosine'."
    )
    for arguments in (dict(side="both"), dict(side="both", projection="gaussian")):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            accumulate(**arguments)


@pytest.mark.parametrize("rank", [1, 2])
def test_two_sketches_in_the_place_of_one_need_a_rank_of_3(rank):
    message = re.escape(
        f"side='both' keeps two sketches in the place of one of rank {rank}, too small a rank for "
        "['layers'][0]['kernel']. Pass rank=3 or more, or side='smaller'."
    )
    for own in (rank, lambda path, leaf: rank):
        with pytest.raises(ValueError, match=f"^{message}$"):
            accumulate(own, **BOTH).init(PARAMS)


@pytest.mark.parametrize("make", [momentum, flora])
@pytest.mark.parametrize(
    "arguments", [BOTH, BOTH | dict(projection="gaussian")], ids=["cosine", "gaussian"]
)
def test_a_momentum_is_of_one_side(make, arguments):
    message = (
        "side='both' is for accumulation, got it for flora_momentum. Pass side='smaller': its "
        "residual lost less in training than a pair of sketches of as many bytes."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(**arguments)


@pytest.mark.parametrize(
    "shape, columns, which",
    [
        ((4, 2**20 + 1), 2**20 + 1, "larger"),
        ((2**20 + 1, 4), 2**20 + 1, "larger"),
        ((2**21, 2**20 + 2), 2**20 + 2, "smaller"),
    ],
)
def test_neither_side_may_be_too_long_for_exact_cosines(shape, columns, which):
    message = re.escape(
        f"projection='cosine' is exact up to 1048576 columns, but ['w'] of shape {shape} has "
        f"{columns} on its {which} side. Use side='smaller' and projection='gaussian', or "
        "rank=None for this leaf."
    )
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    with pytest.raises(ValueError, match=f"^{message}"):
        jax.eval_shape(accumulate(**BOTH).init, params)
    fits = {"w": jax.ShapeDtypeStruct((4, 2**20), jnp.float32)}
    jax.eval_shape(accumulate(**BOTH).init, fits)


# --- states and transformations


@pytest.mark.parametrize(
    "state",
    [
        None,
        (),
        momentum().init(PARAMS),
        optax.chain(optax.clip(1.0), momentum()).init(PARAMS),
        optax.MultiSteps(optax.sgd(0.1), 2).init(PARAMS),
    ],
    ids=lambda state: type(state).__name__,
)
@pytest.mark.parametrize(
    "name, call",
    [
        ("has_updated", florax.has_updated),
        ("accumulate", lambda state: florax.accumulate(accumulate(), PARAMS, state)),
        ("finish", lambda state: florax.finish(accumulate(), PARAMS, state)),
        (
            "value_and_update",
            lambda state: florax.value_and_update(jnp.sum, accumulate())(PARAMS, state, KERNEL),
        ),
    ],
)
def test_a_state_without_an_accumulation_in_it_is_refused(name, call, state):
    expected = (
        f"{name} takes the state of flora_accumulate, or one with it inside, got a "
        f"{type(state).__name__}. Pass tx.init(params) of an optimizer with flora_accumulate."
    )
    with pytest.raises(TypeError, match=re.escape(expected)):
        call(state)


OTHERS = {
    "sum": accumulate(use_grad_mean=False),
    "side": accumulate(side="larger"),
    "projection": accumulate(projection="cosine"),
    "both": accumulate(side="both", projection="cosine"),
    "rank": accumulate(rank=2),
}
UPDATES = {
    "update": lambda tx, state: tx.update(PARAMS, state, PARAMS),
    "accumulate": lambda tx, state: florax.accumulate(tx, PARAMS, state),
    "finish": lambda tx, state: florax.finish(tx, PARAMS, state),
}


@pytest.mark.parametrize("tx", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("call", UPDATES.values(), ids=UPDATES.keys())
def test_a_state_is_taken_under_the_settings_that_it_was_made_with_only(call, tx):
    with pytest.raises(ValueError, match=r"was made under other settings than .*: .*, got "):
        call(tx, accumulate().init(PARAMS))


WRAPPERS = {
    "adam": optax.adam(0.1),
    "chain": optax.chain(accumulate(), optax.scale(2.0)),
    "masked": optax.masked(accumulate(), True),
    "multi_steps": optax.MultiSteps(momentum(), 2).gradient_transformation(),
}
STEPS = {
    "finish": UPDATES["finish"],
    "value_and_grad": lambda tx, state: florax.value_and_grad(loss, tx)(PARAMS, opt_state=state),
    "value_and_update": lambda tx, state: florax.value_and_update(loss, tx)(PARAMS, state, KERNEL),
}


@pytest.mark.parametrize("tx", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("call", STEPS.values(), ids=STEPS.keys())
def test_the_state_of_a_part_is_no_state_of_the_whole(call, tx):
    with pytest.raises(ValueError, match="is no state of tx"):
        call(tx, accumulate().init(PARAMS))


@pytest.mark.parametrize("name", ["update", "accumulate", "finish", "value_and_update"])
def test_a_momentum_takes_no_state_of_an_accumulation(name):
    refusal = r"was made under other settings|reaches flora_accumulate through"
    with pytest.raises(ValueError, match=refusal):
        {**UPDATES, **STEPS}[name](momentum(), accumulate().init(PARAMS))


def loss(params, *batch):
    return jnp.sum(params["bias"]) + jnp.sum(params["layers"][0]["kernel"])


@pytest.mark.parametrize("skip", [jnp.zeros(2, bool), jnp.float32(0)], ids=["vector", "float"])
def test_whether_to_skip_is_one_boolean(skip):
    def should_skip(updates, gradient_step, params):
        return skip, ()

    tx = accumulate(should_skip_update_fn=should_skip)
    expected = "should_skip_update_fn must return a boolean scalar first, got dtype"
    with pytest.raises(ValueError, match=expected):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
