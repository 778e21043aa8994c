"""The two halves of a cycle: what they refuse, when nothing moves, and that effects happen once."""

import collections

import chex
import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import florax

PARAMS = {
    "bias": jnp.ones(8),
    "layers": jnp.ones((3, 12, 8)),
    "matrix": jnp.ones((12, 8)),
}
STACKED = {"bias": False, "layers": True, "matrix": False}
GRADIENTS = draws.normal_like(0, PARAMS)


def accumulate(opt, **arguments):
    return florax.flora_accumulate(opt, 2, rank=3, **arguments)


def loss_fn(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, params["layers"])
    return jnp.mean((x @ params["matrix"] + params["bias"]) ** 2)


X = draws.normal(1, 2, 4, 12)

# --- nothing moves where nothing came


@pytest.mark.parametrize(
    ("layers", "jit"),
    [
        pytest.param(False, jax.jit, id="leaves-jit", marks=pytest.mark.slow),
        pytest.param(True, lambda f: f, id="layers-eager"),
        pytest.param(False, lambda f: f, id="leaves-eager", marks=pytest.mark.slow),
        pytest.param(True, jax.jit, id="layers-jit", marks=pytest.mark.slow),
    ],
)
def test_finishing_what_nothing_was_added_to_moves_nothing(layers, jit):
    base = optax.adamw(0.1, weight_decay=0.1)
    tx = accumulate(florax.per_layer(base, STACKED) if layers else base)
    state = florax.accumulate(tx, GRADIENTS, tx.init(PARAMS))
    params, state = florax.finish(tx, PARAMS, state)
    assert florax.has_updated(state)
    again, after = jit(lambda p, s: florax.finish(tx, p, s))(params, state)
    chex.assert_trees_all_equal(again, params)
    assert not florax.has_updated(after)
    chex.assert_trees_all_equal(after._replace(updated=state.updated), state)


@pytest.mark.slow
def test_what_was_skipped_moves_nothing():
    tx = accumulate(optax.adamw(0.1), should_skip_update_fn=optax.skip_not_finite)
    state = tx.init(PARAMS)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), GRADIENTS)
    for _ in range(2):
        state = florax.accumulate(tx, bad, state, PARAMS)
    params, after = florax.finish(tx, PARAMS, state)
    chex.assert_trees_all_equal((params, after), (PARAMS, state))
    step = jax.jit(florax.value_and_update(loss_fn, tx))
    _, params, after = step(PARAMS, tx.init(PARAMS), X.at[:, 0].set(jnp.nan))
    chex.assert_trees_all_equal(params, PARAMS)
    assert after.gradient_step == after.mini_step == 0


def test_a_skipped_micro_step_has_not_updated():
    tx = accumulate(optax.sgd(0.1), should_skip_update_fn=optax.skip_not_finite)
    state = tx.init(PARAMS)
    bad = jax.tree.map(lambda g: jnp.nan * g, GRADIENTS)
    seen = []
    for grads in (GRADIENTS, GRADIENTS, bad, GRADIENTS, bad, GRADIENTS):
        _, state = tx.update(grads, state, PARAMS)
        seen.append(bool(florax.has_updated(state)))
    assert seen == [False, True, False, False, False, True]


# --- effects

COUNTS = collections.Counter()


def noted(opt, name, ordered=False):
    """The same transformation; every update is counted, with how many gradients it is given."""

    def update(updates, state, params=None, **extra):
        total = sum(jnp.sum(g) for g in jax.tree.leaves(updates))
        jax.debug.callback(lambda x: COUNTS.update([name]), total, ordered=ordered)
        return opt.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(opt.init, update)


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("layers", [False, True], ids=["leaves", "layers"])
def test_effects_of_the_base_optimizer_happen_once_an_update(layers, ordered):
    """As in `tx.update`: once for the whole tree, or once for every layer and once for the rest."""
    base = noted(optax.sgd(0.1), "update", ordered)
    tx = accumulate(florax.per_layer(base, STACKED) if layers else base)
    each = 3 + 1 if layers else 1

    def updates(params, state):
        for _ in range(2):
            updates, state = tx.update(GRADIENTS, state, params)
        return optax.apply_updates(params, updates), state

    def halves(params, state):
        for _ in range(2):
            state = florax.accumulate(tx, GRADIENTS, state)
        return florax.finish(tx, params, state)

    def nothing(params, state):
        return florax.finish(tx, params, state)

    def whole(params, state):
        return florax.value_and_update(loss_fn, tx)(params, state, X)

    for way, count in ((updates, each), (halves, each), (nothing, 0), (whole, each)):
        COUNTS.clear()
        jax.block_until_ready(jax.jit(way)(PARAMS, tx.init(PARAMS)))
        jax.effects_barrier()
        assert COUNTS["update"] == count, way


def test_effects_happen_layer_by_layer():
    tx = florax.per_layer(noted(optax.sgd(0.1), "layer"), STACKED)
    COUNTS.clear()
    silent = optax.GradientTransformation(
        tx.init,
        lambda g, s, p=None: (
            jax.debug.callback(lambda: COUNTS.update(["all"])),
            tx.update(g, s, p),
        )[1],
    )
    layerwise = florax.value_and_update(loss_fn, silent, layerwise=True)
    jax.block_until_ready(jax.jit(layerwise)(PARAMS, silent.init(PARAMS), X[0]))
    jax.effects_barrier()
    assert COUNTS == {"layer": 3 + 1, "all": 1}


# --- what does more than to accumulate


def parts(other):
    return optax.partition(
        {"flora": accumulate(optax.sgd(0.1)), "other": other},
        {"bias": "other", "layers": "flora", "matrix": "flora"},
    )


REFUSED = {
    "another part trains": (parts(optax.adam(0.1)), r"tx changes \['bias'\] at every micro-step"),
    "a mask passes gradients on": (
        optax.masked(accumulate(optax.sgd(0.1)), {**STACKED, "matrix": True, "layers": True}),
        r"tx changes \['bias'\] at every micro-step",
    ),
    "a momentum behind it": (
        optax.chain(accumulate(optax.sgd(0.1)), optax.trace(0.9)),
        "keeps a state around flora_accumulate",
    ),
    "a schedule behind it": (
        optax.chain(accumulate(optax.sgd(0.1)), optax.scale_by_schedule(lambda n: 1 / (1 + n))),
        "keeps a state around flora_accumulate",
    ),
    "layers around it": (
        florax.per_layer(accumulate(optax.sgd(0.1)), STACKED),
        r"reaches flora_accumulate through chains.*flora_accumulate\(florax.per_layer",
    ),
    "in a conditional": (
        optax.apply_if_finite(accumulate(optax.sgd(0.1)), 3),
        "keeps a state around flora_accumulate|reaches flora_accumulate through chains",
    ),
}


@pytest.mark.parametrize("tx, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_does_more_than_to_accumulate_is_refused(tx, message):
    with pytest.raises(ValueError, match=message):
        state = florax.accumulate(tx, GRADIENTS, tx.init(PARAMS), PARAMS)
        florax.finish(tx, PARAMS, state)


def test_a_frozen_part_takes_no_accumulator_and_stays():
    tx = parts(optax.set_to_zero())
    assert {x.shape for x in jax.tree.leaves(tx.init(PARAMS)) if x.ndim} == {
        (3, 12, 8),
        (12, 3),
        (2,),
    }
    _, params, _ = jax.jit(florax.value_and_update(loss_fn, tx))(PARAMS, tx.init(PARAMS), X)
    chex.assert_trees_all_equal(params["bias"], PARAMS["bias"])
    assert jnp.any(params["matrix"] != PARAMS["matrix"])


def test_parameters_are_those_of_the_state():
    tx = accumulate(optax.sgd(0.1))
    state = florax.accumulate(tx, GRADIENTS, tx.init(PARAMS))
    with pytest.raises(
        ValueError, match=r"do not match the parameters.*missing \[\"\['bias'\]\"\]"
    ):
        florax.finish(tx, {name: PARAMS[name] for name in ("layers", "matrix")}, state)


# --- layer by layer


@pytest.mark.parametrize(
    "around",
    [
        lambda opt: optax.chain(optax.clip_by_global_norm(1.0), florax.per_layer(opt, STACKED)),
        lambda opt: optax.chain(florax.per_layer(opt, STACKED), optax.clip_by_global_norm(1.0)),
        lambda opt: accumulate(
            optax.chain(optax.clip_by_global_norm(1.0), florax.per_layer(opt, STACKED))
        ),
    ],
    ids=["before", "behind", "accumulated"],
)
def test_clipping_by_the_global_norm_is_refused_where_every_part_has_one_leaf(around):
    def loss(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, params["layers"])
        return jnp.mean((x @ params["matrix"]) ** 2)

    params = {name: PARAMS[name] for name in ("layers", "matrix")}
    stacked = {name: STACKED[name] for name in params}
    opt = optax.adam(0.1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), florax.per_layer(opt, stacked))
    for own, batch in ((tx, X[0]), (accumulate(tx), X)):
        step = florax.value_and_update(loss, own, layerwise=True)
        with pytest.raises(
            ValueError, match=r"mixes leaves: the update of \['layers'\] depends on"
        ):
            step(params, own.init(params), batch)


def test_what_takes_a_whole_stack_outside_of_per_layer_is_refused_with_its_name():
    tx = optax.chain(
        florax.per_layer(optax.scale_by_adam(), STACKED),
        optax.scale_by_factored_rms(min_dim_size_to_factor=4),
    )
    step = florax.value_and_update(loss_fn, tx, layerwise=True)
    with pytest.raises(ValueError, match=r"not update layers one by one.*reduce_sum at"):
        step(PARAMS, tx.init(PARAMS), X[0])


def test_a_stack_that_the_loss_does_not_scan_is_refused_with_the_use_it_has():
    tx = florax.per_layer(optax.sgd(0.1), {**STACKED, "matrix": True})
    step = florax.value_and_update(loss_fn, tx, layerwise=True)
    message = (
        r"takes \['matrix'\] for a stack of 12 layers along axis 0\. .* but dot_general at "
        r"test_cycle.py:\d+.* takes it whole"
    )
    with pytest.raises(ValueError, match=message):
        step(PARAMS, tx.init(PARAMS), X[0])


def test_layer_by_layer_needs_to_know_the_layers():
    for tx in (optax.adam(0.1), florax.per_layer(optax.adam(0.1), False)):
        with pytest.raises(ValueError, match="layerwise=True needs per_layer in tx"):
            florax.value_and_update(loss_fn, tx, layerwise=True)(PARAMS, tx.init(PARAMS), X[0])


def test_layer_by_layer_gives_aux_and_takes_extra_arguments():
    def with_aux(params, x):
        return loss_fn(params, x), {"largest": jnp.max(x), "name": "of the batch"}

    def update(updates, state, params=None, *, value, factor, **_):
        return jax.tree.map(lambda g: -factor * value * g, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = florax.per_layer(scaled, STACKED)
    step = florax.value_and_update(with_aux, tx, has_aux=True, layerwise=True)
    (loss, aux), params, _ = step(PARAMS, tx.init(PARAMS), X[0], factor=2.0)
    assert aux["name"] == "of the batch"
    assert aux["largest"] == jnp.max(X[0])
    value, grads = jax.value_and_grad(loss_fn)(PARAMS, X[0])
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    expected = jax.tree.map(lambda p, g: p - 2 * value * g, PARAMS, grads)
    chex.assert_trees_all_close(params, expected, rtol=2e-5, atol=2e-6)


# --- the arguments of a step

BATCHES = {
    "scalar": ((X, 3.0), TypeError, r"args\[1\] of the step is 3.0, no array"),
    "text": ((X, {"name": "a"}), TypeError, r"args\[1\]\['name'\] of the step is 'a', no array"),
    "0-D": ((X, jnp.ones([])), ValueError, r"args\[1\] of the step is a scalar for all micro-b"),
    "key": ((X, jax.random.key(0)), ValueError, r"args\[1\] of the step is one key .*split"),
    "unequal": (
        (X, {"y": jnp.ones((3, 4))}),
        ValueError,
        r"got unequal ones: args\[0\] has 2, args\[1\]\['y'\] has 3",
    ),
    "raw key": ((X[:1], jax.random.PRNGKey(0)), ValueError, r"args\[1\] has 2.*raw PRNG key"),
    "empty": ((X[:0],), ValueError, "needs micro-batches to scan over, got none"),
}


@pytest.mark.parametrize("args, error, message", BATCHES.values(), ids=BATCHES.keys())
def test_arguments_of_a_step_have_a_leading_axis_of_micro_batches(args, error, message):
    tx = accumulate(optax.sgd(0.1))
    step = florax.value_and_update(lambda params, x, *more: loss_fn(params, x), tx)
    with pytest.raises(error, match=message):
        step(PARAMS, tx.init(PARAMS), *args)
