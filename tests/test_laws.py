"""One update, whichever way it is made: the same parameters and the same state.

Ordinary steps, `accumulate` and `finish`, `value_and_update`, and layer by layer; with stacked and
unstacked layers; with and without micro-batches that are skipped.
"""

import chex
import draws
import jax
import jax.numpy as jnp
import losses
import numpy as np
import optax
import pytest

import florax

pytestmark = pytest.mark.slow

HEIGHT, WIDTH, INNER = 3, 8, 12
# Two updates of sums of some 60 products of size 1, divided by roots.
CLOSE = dict(rtol=2e-5, atol=5e-6)


def normal(seed, *shape):
    return draws.normal(seed, *shape, scale=0.3)


PARAMS = {
    "decoder": {"up": normal(0, HEIGHT, WIDTH, INNER), "down": normal(1, HEIGHT, INNER, WIDTH)},
    "embed": normal(2, 5, WIDTH),
    "encoder": {"bias": normal(3, HEIGHT, WIDTH), "up": normal(4, HEIGHT, WIDTH, WIDTH)},
    "frozen": normal(5, WIDTH, WIDTH),
}
STACKED = {"decoder": True, "embed": False, "encoder": True, "frozen": False}


def loss_fn(params, x):
    """Two scans of equal height."""

    def encode(x, w):
        return jnp.tanh(x @ w["up"] + w["bias"]), None

    def decode(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    x, _ = jax.lax.scan(encode, x @ params["embed"], params["encoder"])
    x, _ = jax.lax.scan(jax.checkpoint(decode), x @ params["frozen"], params["decoder"])
    return jnp.mean((x - 1) ** 2)


def rank(path, leaf):
    return 3 if leaf.ndim == 2 and min(leaf.shape) > 4 else None


def momentum(**arguments):
    return florax.flora_momentum(rank, 0.8, 2, **arguments)


# With a small eps Adam's update is a sign, which the last bit may turn.
LEAF_WISE = {
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1, eps=0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=4),
    "lion": optax.chain(optax.scale_by_lion(), optax.scale(-0.01)),
    "schedule": optax.sgd(optax.linear_schedule(0.1, 0.0, 5)),
    "decay": optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1), optax.scale(-0.1)),
    "flora": optax.chain(optax.adafactor(0.1), momentum()),
    "gaussian": optax.chain(optax.sgd(0.1), momentum(projection="gaussian")),
    "16 bits": optax.chain(optax.sgd(0.1), momentum(accumulator_dtype=jnp.bfloat16)),
    "plateau": optax.chain(
        optax.adam(0.1, eps=0.1), optax.contrib.reduce_on_plateau(patience=0, factor=0.5)
    ),
}
AROUND = {
    "alone": lambda opt: florax.per_layer(opt, STACKED),
    "entry-wise neighbours": lambda opt: optax.chain(
        optax.clip(0.5), optax.trace(0.5), florax.per_layer(opt, STACKED), optax.scale(0.5)
    ),
    "named": lambda opt: optax.named_chain(
        ("layers", florax.per_layer(opt, STACKED)), ("scale", optax.scale(0.5))
    ),
    "injected": lambda opt: optax.inject_hyperparams(
        lambda scale: optax.chain(florax.per_layer(opt, STACKED), optax.scale(scale))
    )(scale=0.5),
    "frozen leaves": lambda opt: optax.partition(
        {"trained": florax.per_layer(opt, STACKED), "frozen": optax.set_to_zero()},
        {name: "frozen" if name == "frozen" else "trained" for name in PARAMS},
    ),
    "two parts": lambda opt: optax.partition(
        {"one": florax.per_layer(opt, STACKED), "other": florax.per_layer(opt, STACKED)},
        {name: "other" if name in ("encoder", "frozen") else "one" for name in PARAMS},
    ),
}
CYCLES, MICRO_BATCHES = 2, 3


def batches(seed):
    return normal(seed, CYCLES, MICRO_BATCHES, 4, 5)


def assert_same(got, expected, **close):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    coarse = [x.dtype == jnp.bfloat16 for x in jax.tree.leaves(expected)]
    for new, old, is_coarse in zip(*map(jax.tree.leaves, (got, expected)), coarse, strict=True):
        # In 16 bits a difference in the last bit of 32 may turn a rounding: a unit, 2⁻⁷.
        near = dict(rtol=2.0**-6, atol=1e-3) if is_coarse else {**CLOSE, **close}
        np.testing.assert_allclose(np.float64(new), np.float64(old), **near)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("opt", LEAF_WISE)
def test_layer_by_layer_is_the_ordinary_step(opt, around):
    tx = optax.with_extra_args_support(AROUND[around](LEAF_WISE[opt]))

    def ordinary(params, state, x):
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, value=loss)
        return loss, optax.apply_updates(params, updates), state

    by_layer = florax.value_and_update(loss_fn, tx, layerwise=True)

    def run(step):
        def body(carry, x):
            loss, *carry = step(*carry, x)
            return tuple(carry), loss

        return jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), batches(0)[0])

    assert_same(jax.jit(lambda: run(by_layer))(), jax.jit(lambda: run(ordinary))())


SKIPS = {
    "none": None,
    "not finite": optax.skip_not_finite,
    "python": lambda updates, step, params: (False, ()),
    "all": lambda updates, step, params: (True, {}),
}
ACCUMULATED = {
    **{name: around for name, around in AROUND.items() if name != "frozen leaves"},
    "not by layer": lambda opt: opt,
}
OUTSIDE = {
    "alone": lambda tx: tx,
    "clipped before": lambda tx: optax.chain(optax.clip(0.5), tx),
    "scaled after": lambda tx: optax.chain(tx, optax.scale(0.5)),
    "named": lambda tx: optax.named_chain(("accumulation", tx), ("nothing", optax.identity())),
    "frozen leaves": lambda tx: optax.partition(
        {"trained": tx, "frozen": optax.set_to_zero()},
        {name: "frozen" if name == "frozen" else "trained" for name in PARAMS},
    ),
    "masked": lambda tx: optax.chain(
        optax.masked(tx, {name: name != "frozen" for name in PARAMS}),
        optax.masked(optax.set_to_zero(), {name: name == "frozen" for name in PARAMS}),
    ),
}


@pytest.mark.parametrize("skip", ["none", "not finite", "all"])
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("inside", ACCUMULATED)
def test_all_ways_to_accumulate_are_one_in_all_wrappers(inside, outside, skip):
    check_accumulation("adam", inside, outside, skip, True, 0)


@pytest.mark.parametrize("opt", LEAF_WISE)
def test_all_ways_to_accumulate_are_one_for_all_optimizers(opt):
    check_accumulation(opt, "alone", "frozen leaves", "python", False, 1)


@pytest.mark.parametrize("inside", ACCUMULATED)
def test_all_ways_to_accumulate_are_one_where_both_sides_are_sketched(inside):
    check_accumulation(
        "adam", inside, "frozen leaves", "none", True, 0, side="both", projection="cosine"
    )


def check_accumulation(opt, inside, outside, skip, use_grad_mean, seed, **arguments):
    # What comes every micro-step is given no loss; `value` is for the update alone.
    tx = OUTSIDE[outside](
        florax.flora_accumulate(
            ACCUMULATED[inside](LEAF_WISE["adam" if opt == "plateau" else opt]),
            MICRO_BATCHES if skip != "not finite" else MICRO_BATCHES - 1,
            rank if inside != "not by layer" else lambda path, leaf: 3 if leaf.ndim > 1 else None,
            use_grad_mean=use_grad_mean,
            should_skip_update_fn=SKIPS[skip],
            key=seed,
            **arguments,
        )
    )
    data = batches(seed)
    if skip == "not finite":
        data = data.at[:, 1].set(jnp.nan)
    grad = jax.value_and_grad(loss_fn)

    def updates(params, state, batch):
        def micro_step(carry, x):
            params, state = carry
            loss, grads = grad(params, x)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        (params, state), losses = jax.lax.scan(micro_step, (params, state), batch)
        return losses.mean(), params, state

    def halves(params, state, batch):
        def micro_step(state, x):
            loss, grads = grad(params, x)
            return florax.accumulate(tx, grads, state, params), loss

        state, losses = jax.lax.scan(micro_step, state, batch)
        return losses.mean(), *florax.finish(tx, params, state)

    ways = [updates, halves]
    if outside != "clipped before":  # it needs gradients of full size
        ways.append(florax.value_and_update(loss_fn, tx))
        if inside != "not by layer":
            ways.append(florax.value_and_update(loss_fn, tx, layerwise=True))

    def run(step):
        def body(carry, x):
            loss, *carry = step(*carry, x)
            return tuple(carry), loss

        return jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), data)

    (params, state), losses = jax.jit(lambda: run(updates))()
    moved = jax.tree.map(lambda new, old: bool(jnp.any(new != old)), params, PARAMS)
    assert moved["embed"] == (skip != "all") and bool(florax.has_updated(state)) == (skip != "all")
    for way in ways[1:]:
        (got, got_state), got_losses = jax.jit(lambda way=way: run(way))()
        assert_same((got, got_state), (params, state))
        np.testing.assert_allclose(got_losses, losses, rtol=1e-5)


# --- gradients that are born compressed, of weights that are used in every way


USES = [
    name for name, case in losses.CASES.items() if case().eps < 1e-6 and name != "numpy_parameters"
]


@pytest.mark.parametrize("opt", ["sgd", "adam", "adafactor"])
@pytest.mark.parametrize("name", USES)
def test_born_compressed_or_not_the_step_is_the_same(name, opt):
    case = losses.CASES[name]()
    check_step(case, case.transformation(opt=LEAF_WISE[opt]))


@pytest.mark.parametrize("name", USES)
def test_so_it_is_where_both_sides_are_sketched(name):
    case = losses.CASES[name]()
    both = dict(side="both", projection="cosine")
    # What R is off by is enlarged by up to 17 / (4 - 2).
    check_step(case, case.transformation(opt=optax.sgd(0.1), rank=5, **both), atol=5e-5)


def check_step(case, tx, **close):
    micro_batches = jax.tree.map(
        lambda x: jnp.stack([x, x if x.ndim == 0 else x[::-1]]), case.batch
    )

    def by_hand(gradient):
        def step(params, state, *args):
            def micro_step(state, batch):
                grads = gradient(state, params, *batch)
                return florax.accumulate(tx, grads, state), None

            state, _ = jax.lax.scan(micro_step, state, args)
            return florax.finish(tx, params, state)

        return jax.jit(step)

    def dense(state, params, *batch):
        return jax.grad(case.loss)(params, *batch)

    def born(state, params, *batch):
        return florax.value_and_grad(case.loss, tx)(params, *batch, opt_state=state)[1]

    whole = jax.jit(florax.value_and_update(case.loss, tx))
    state = tx.init(case.params)
    expected = by_hand(dense)(case.params, state, *micro_batches)
    assert_same(by_hand(born)(case.params, state, *micro_batches), expected, **close)
    _, *got = whole(case.params, state, *micro_batches)
    assert_same(tuple(got), expected, **close)
