"""What users pass: modules, numbers, texts and dtypes of all kinds, taken as Optax and JAX do."""

import re

import chex
import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import florax
from florax import _sketches

eqx = pytest.importorskip("equinox", reason="equinox comes with the extra `test`")


def momentum(rank=3, **arguments):
    return florax.flora_momentum(rank, resample_every=2, **arguments)


def accumulate(rank=3, opt=None, **arguments):
    return florax.flora_accumulate(optax.sgd(0.1) if opt is None else opt, 2, rank, **arguments)


class Linear(eqx.Module):
    """Callable, as modules are; its activation is a leaf that is no array."""

    weight: jax.Array
    bias: jax.Array
    activation: object

    def __call__(self, x):
        return self.activation(x @ self.weight + self.bias)


MODEL = Linear(jnp.ones((12, 8)), jnp.ones(8), jnp.tanh)
ARRAYS = eqx.filter(MODEL, eqx.is_inexact_array)
X = draws.normal(0, 4, 12)


@eqx.filter_grad
def model_gradient(model, x):
    return jnp.mean(model(x) ** 2)


@pytest.mark.parametrize("make", [momentum, accumulate])
def test_a_whole_module_may_be_the_parameters_of_an_update(make):
    """As with `optax.ema`; leaves are told by their names, not by their number."""
    tx, grads = make(), model_gradient(MODEL, X)
    state = tx.init(ARRAYS)
    got, expected = (tx.update(grads, state, params) for params in (MODEL, ARRAYS))
    chex.assert_trees_all_equal(got, expected)
    optax.ema(0.9).update(grads, optax.ema(0.9).init(ARRAYS), MODEL)


def test_layers_of_a_module_need_its_arrays_alone_and_say_so():
    tx = florax.per_layer(optax.adam(0.1), False)
    state = tx.init(ARRAYS)
    with pytest.raises(ValueError, match=r"surplus \['.activation'\].*tree like the parameters"):
        tx.update(model_gradient(MODEL, X), state, MODEL)


@pytest.mark.parametrize("make", [momentum, accumulate])
@pytest.mark.parametrize("whole", [lambda tx: tx.init(MODEL), None], ids=["init", "gradient"])
def test_a_function_is_no_parameter_and_the_message_names_the_way_out(make, whole):
    def gradient(tx):
        loss = lambda model, x: jnp.mean(model(x) ** 2)  # noqa: E731
        return florax.value_and_grad(loss, tx)(MODEL, X, opt_state=tx.init(ARRAYS))

    with pytest.raises(TypeError, match=r"\.activation is no array.*eqx\.filter.*nnx\.state"):
        (whole or gradient)(make())


def test_trees_made_of_a_callable_module_are_trees():
    """`jax.tree.map` over it gives a module, which must not be called."""
    dimension_numbers = jax.tree.map(
        lambda x: florax.FloraDimensionNumbers(0, 1) if x.ndim == 2 else None, ARRAYS
    )
    ranks = jax.tree.map(lambda x: 2 if x.ndim == 2 else 1, ARRAYS)
    tx = momentum(ranks, dimension_numbers=dimension_numbers)
    assert tx.init(ARRAYS).sketch.arrays.weight.shape == (12, 2)
    stacked = jax.tree.map(lambda x: x.ndim == 2, ARRAYS)
    state = florax.per_layer(optax.adam(0.1), stacked).init(ARRAYS)
    assert state.stacks.heights == (12,)


# --- numbers


@pytest.mark.parametrize(
    "tx", [momentum(residual=False), accumulate(), florax.per_layer(momentum(), False)]
)
def test_a_python_number_is_a_leaf_like_any_other(tx):
    params = {"kernel": jnp.ones((12, 8)), "scale": 1.0}
    state = tx.init(params)
    assert not florax.state_report(florax.flora(0.1, 3), params).rows[1].rank
    updates, state = tx.update({"kernel": jnp.ones((12, 8)), "scale": 0.5}, state, params)
    assert jnp.shape(updates["scale"]) == ()
    loss = lambda p, x: jnp.mean(x @ p["kernel"]) * p["scale"]  # noqa: E731
    if not isinstance(state, florax.FloraMomentumState | florax.FloraAccumulateState):
        return
    _, grads = florax.value_and_grad(loss, tx)(params, X, opt_state=state)
    assert _sketches.is_sketch(grads["kernel"]) and grads["scale"].shape == ()


def test_a_rank_is_asked_of_matrices_only():
    """A share of the width is 0 for a small bias, which has no rank."""
    params = {"bias": jnp.ones(3), "kernel": jnp.ones((12, 8)), "scale": jnp.ones([])}
    tx = momentum(lambda path, leaf: min(leaf.shape, default=0) // 4)
    assert tx.init(params).sketch.arrays["kernel"].shape == (12, 2)


@pytest.mark.parametrize("skip", [True, np.bool_(True), jnp.array(True)])
def test_a_skip_function_may_return_any_bool(skip):
    tx = accumulate(should_skip_update_fn=lambda updates, step, params: (skip, ()))
    params = jnp.ones((12, 8))
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert state.mini_step == 0


def test_aux_may_hold_what_is_no_array():
    def loss(w, x):
        return jnp.mean((x @ w) ** 2), {"name": "of a batch", "count": 3, "x": x, "f": jnp.sin}

    tx = accumulate()
    w = jnp.ones((12, 8))
    (value, aux), _ = florax.value_and_grad(loss, tx, has_aux=True)(w, X, opt_state=tx.init(w))
    (expected, expected_aux), _ = jax.value_and_grad(loss, has_aux=True)(w, X)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert aux.keys() == expected_aux.keys()
    assert (aux["name"], aux["count"], aux["f"]) == ("of a batch", 3, jnp.sin)
    step = florax.value_and_update(loss, tx, has_aux=True)
    for way in (step, florax.value_and_update(loss, accumulate(should_skip_update_fn=NEVER), True)):
        (_, aux), _, _ = way(w, tx.init(w), jnp.stack([X, X]))
        assert (aux["name"], aux["count"], aux["x"].shape) == ("of a batch", 3, (2, 4, 12))


def NEVER(updates, step, params):
    return False, ()


@pytest.mark.slow
def test_float64_parameters_may_have_a_float32_accumulator():
    with jax.enable_x64(True):
        params = {"bias": jnp.ones(8), "kernel": jnp.ones((12, 8))}
        assert params["kernel"].dtype == jnp.float64
        x = jnp.stack([jnp.asarray(X, jnp.float64)] * 2)
        loss = lambda p, x: jnp.mean((x @ p["kernel"] + p["bias"]) ** 2)  # noqa: E731
        tx = accumulate(accumulator_dtype=jnp.float32)
        state = tx.init(params)
        _, new, after = jax.jit(florax.value_and_update(loss, tx))(params, state, x)
        chex.assert_trees_all_equal_shapes_and_dtypes((new, after), (params, state))
        grads = [jax.grad(loss)(params, own) for own in x]
        for own in grads:
            updates, state = tx.update(own, state, params)
        expected = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(new, expected, rtol=1e-6)


# --- what is said to whom


def test_who_differentiates_by_integers_is_not_told_to_mask_them():
    tx = optax.masked(accumulate(), {"kernel": True, "steps": False})
    params = {"kernel": jnp.ones((12, 8)), "steps": jnp.array(3)}
    loss = lambda p, x: jnp.mean(x @ p["kernel"])  # noqa: E731
    with pytest.raises(TypeError, match=r"\['steps'\] has dtype int32") as caught:
        florax.value_and_grad(loss, tx)(params, X, opt_state=tx.init(params))
    assert "masked" not in str(caught.value)
    assert re.search(r"nnx\.split.*eqx\.partition.*argnums", str(caught.value))


def test_a_base_optimizer_that_needs_the_parameters_says_so_itself():
    tx = accumulate(opt=optax.adafactor(0.1))
    w = jnp.ones((12, 8))
    with pytest.raises(ValueError, match="params"):
        tx.update(w, tx.init(w))


# --- random numbers


def noise_of(tx, params):
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    return updates


def noise_from_a_raw_key(impl):
    """As older transformations keep their keys."""

    def update(updates, key, params=None):
        keys = jax.random.split(
            jax.random.wrap_key_data(key, impl=impl), len(jax.tree.leaves(updates))
        )
        drawn = iter(keys)
        return jax.tree.map(lambda g: jax.random.normal(next(drawn), g.shape), updates), key

    key = jax.random.key_data(jax.random.key(0, impl=impl))
    return optax.GradientTransformation(lambda params: key, update)


NOISES = {
    "number": optax.add_noise(1.0, 0.0, 0),
    "key": optax.add_noise(1.0, 0.0, jax.random.key(0)),
    "raw key": noise_from_a_raw_key("threefry2x32"),
    "raw rbg key": noise_from_a_raw_key("rbg"),
}


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(noise, id=name, marks=() if name == "raw key" else pytest.mark.slow)
        for name, noise in NOISES.items()
    ],
)
def test_every_layer_has_noise_of_its_own(noise):
    """Stacked layers differ as unstacked ones do, and stacks from each other."""
    params = {"a": jnp.zeros((4, 500)), "b": jnp.zeros((3, 500)), "c": jnp.zeros(500)}
    tx = florax.per_layer(noise, {"a": True, "b": True, "c": False})
    rows = np.concatenate([np.atleast_2d(x) for x in noise_of(tx, params).values()])
    correlations = np.corrcoef(rows) - np.eye(8)
    assert np.abs(correlations).max() < 5 / np.sqrt(500)
    np.testing.assert_allclose(rows.std(1), 1, atol=5 / np.sqrt(2 * 500))


def test_every_layer_of_an_accumulation_has_projections_of_its_own():
    tx = florax.per_layer(accumulate(), True)
    same = jnp.broadcast_to(draws.normal(0, 12, 8), (3, 12, 8))
    _, state = tx.update(same, tx.init(same), same)
    (sketch,) = _sketches.find(state, _sketches.Sketches)[:1]
    first, second, third = sketch.arrays
    assert not jnp.allclose(first, second, atol=0.1)
    assert not jnp.allclose(second, third, atol=0.1)
