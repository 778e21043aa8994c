"""A whole accumulating step in one jit does what the loop of gradients and updates does."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import losses
import numpy as np
import optax
import pytest

import florax
from florax import _dependencies

# Sums of at most 60 products of size 1, twice.
CLOSE = dict(rtol=2e-5, atol=5e-6)
MICRO_BATCHES = 4

PARAMS = {
    "blocks": losses.stacks(losses.LAYERS),
    "embed": losses.normal(17, losses.WIDTH),
    "head": losses.normal(losses.WIDTH, 17),
    "scale": losses.normal(losses.WIDTH),
}
BATCHES = (
    losses.tokens(MICRO_BATCHES),
    jnp.arange(MICRO_BATCHES * losses.TOKENS).reshape(MICRO_BATCHES, -1) % 17,
)


def loss_fn(params, x, words):
    """With a scanned stack, an embedding, which stays dense, and a head."""
    x = x + params["embed"][words]
    layer = jax.checkpoint(lambda x, w: (losses.block(x, w), None))
    x, _ = jax.lax.scan(layer, x, params["blocks"])
    return losses.size(x * params["scale"] @ params["head"])


def is_stack(path, leaf):
    return leaf.ndim == 3


def rank(path, leaf):
    return None if "embed" in jax.tree_util.keystr(path) else losses.RANK


def dimension_numbers(path, leaf):
    return losses.STACK if leaf.ndim == 3 else None


def accumulate(opt, every_k_schedule=MICRO_BATCHES, **arguments):
    arguments = {"dimension_numbers": dimension_numbers, **arguments}
    return florax.flora_accumulate(opt, every_k_schedule, rank, **arguments)


@functools.cache
def step(tx):
    return jax.jit(florax.value_and_update(loss_fn, tx))


@functools.cache
def loop(tx):
    """Gradients of full size, one call of `tx.update` for each."""

    def micro_step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def run(params, state, *batches):
        (params, state), results = jax.lax.scan(micro_step, (params, state), batches)
        return jnp.mean(results), params, state

    return run


SGD = accumulate(optax.sgd(0.1))  # of many tests, which compile its step and its loop once
# With a small eps Adam's update is a sign, which the last bit may turn.
ADAM = optax.adam(0.1, eps=0.1)
BASES = {
    "sgd": optax.sgd(0.1),
    "adam": ADAM,
    "adafactor": optax.adafactor(0.1),
    "flora": florax.flora(0.1, rank, dimension_numbers=dimension_numbers),
    "per layer: adam": florax.per_layer(ADAM, is_stack),
    "per layer: adafactor": florax.per_layer(optax.adafactor(0.1), is_stack),
    "per layer: flora": florax.per_layer(
        florax.flora(0.1, lambda path, leaf: losses.RANK if leaf.ndim == 2 else None), is_stack
    ),
    "clipped by all of it": optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0)),
}


@pytest.mark.parametrize(
    "base",
    [
        pytest.param(
            base, id=name, marks=() if name == "clipped by all of it" else pytest.mark.slow
        )
        for name, base in BASES.items()
    ],
)
def test_a_step_is_the_loop_of_full_gradients_and_updates(base):
    tx = accumulate(base)
    by_step, by_loop = step(tx), loop(tx)
    params, state = PARAMS, tx.init(PARAMS)
    for updates in (1, 2):
        got, expected = (run(params, state, *BATCHES) for run in (by_step, by_loop))
        chex.assert_trees_all_close(got, expected, **CLOSE)
        chex.assert_trees_all_equal_dtypes(got, expected)
        _, params, state = got
        assert florax.has_updated(state)
        assert int(state.gradient_step) == updates


# What R is off by is enlarged by n / (l - d): 17 / (4 - 1) of the head.
BOTH_SIDES = dict(side="both", projection="cosine")
NEAR = dict(rtol=1e-4, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
def test_so_it_is_where_both_sides_are_sketched(base):
    tx = accumulate(base, **BOTH_SIDES)
    params, state = PARAMS, tx.init(PARAMS)
    assert isinstance(state.sketch.arrays["blocks"]["up"], tuple)
    for _ in range(2):
        got, expected = (run(params, state, *BATCHES) for run in (step(tx), loop(tx)))
        chex.assert_trees_all_close(got, expected, **NEAR)
        _, params, state = got


@pytest.mark.slow
def test_a_step_may_begin_with_what_was_accumulated_before():
    tx = accumulate(ADAM, MICRO_BATCHES + 2)
    before = jax.tree.map(lambda x: x[0] + jnp.ones_like(x[0]), BATCHES)

    @jax.jit
    def accumulate_twice(state):
        grads = jax.grad(loss_fn)(PARAMS, *before)
        return florax.accumulate(tx, grads, florax.accumulate(tx, grads, state))

    state = accumulate_twice(tx.init(PARAMS))
    got = step(tx)(PARAMS, state, *BATCHES)
    chex.assert_trees_all_close(got, loop(tx)(PARAMS, state, *BATCHES), **CLOSE)
    assert int(got[2].gradient_step) == 1


@pytest.mark.slow
def test_gradients_may_be_summed():
    tx = accumulate(optax.sgd(0.1), use_grad_mean=False)
    state = tx.init(PARAMS)
    got = step(tx)(PARAMS, state, *BATCHES)
    chex.assert_trees_all_close(got, loop(tx)(PARAMS, state, *BATCHES), **CLOSE)


@pytest.mark.slow
def test_skipped_micro_batches_are_as_if_they_had_never_been():
    tx = accumulate(optax.sgd(0.1), should_skip_update_fn=optax.skip_not_finite)
    state = tx.init(PARAMS)
    x, words = BATCHES
    _, params, after = step(tx)(PARAMS, state, x.at[1].set(jnp.nan), words)
    others = (x[jnp.array([0, 2, 3])], words[jnp.array([0, 2, 3])])
    of_three = loop(accumulate(optax.sgd(0.1), 3, should_skip_update_fn=optax.skip_not_finite))
    _, expected, expected_after = of_three(PARAMS, state, *others)
    chex.assert_trees_all_close((params, after), (expected, expected_after), **CLOSE)


@pytest.mark.slow
def test_a_bfloat16_accumulator_is_rounded_at_every_micro_batch():
    """Every rounding, and each of the two ways has four, is to one of two neighbours, 2⁻⁷ apart."""
    tx = accumulate(optax.sgd(0.1), accumulator_dtype=jnp.bfloat16)
    state = tx.init(PARAMS)
    _, got, after = step(tx)(PARAMS, state, *BATCHES)
    assert {x.dtype for x in after.sketch.leaves()} == {jnp.dtype(jnp.bfloat16)}
    _, expected, _ = loop(SGD)(PARAMS, SGD.init(PARAMS), *BATCHES)
    moved = jax.tree.map(lambda new, old: np.asarray(new - old), (got, expected), (PARAMS, PARAMS))
    for update, want in zip(*map(jax.tree.leaves, moved), strict=True):
        error = np.linalg.norm(update - want) / np.linalg.norm(want)
        assert 1e-5 < error < MICRO_BATCHES * 2.0**-7


# Of a weight met in every way that a loop over layers can, and of others.
@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("is_sketch", [False, True], ids=["full size", "sketch"])
@pytest.mark.parametrize("name", losses.CASES)
def test_integers_are_rounded_once_a_micro_batch_as_by_the_loop(name, is_sketch, bits):
    """To the same neighbours, but for what float32 leaves open of the sums that are rounded."""
    case = losses.CASES[name]()
    tx = case.transformation(
        opt=optax.sgd(1.0),
        rank=losses.RANK if is_sketch else lambda path, leaf: None,
        accumulator_dtype=bits,
    )
    batches = jax.tree.map(lambda x: jnp.stack([x, x if x.ndim == 0 else x[::-1]]), case.batch)

    def loop(params, state):
        for batch in (jax.tree.map(lambda x, i=i: x[i], batches) for i in range(2)):
            updates, state = tx.update(jax.grad(case.loss)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    run, state = jax.jit(florax.value_and_update(case.loss, tx)), tx.init(case.params)
    _, got, after = run(case.params, state, *batches)
    wanted, expected_after = jax.jit(loop)(case.params, state)
    chex.assert_trees_all_equal(after.sketch.cycle, expected_after.sketch.cycle)
    gap = 1 / 127 if bits == "int8" else 0.25  # at most, of the largest entry
    for own in zip(*map(jax.tree.leaves, (got, wanted, case.params)), strict=True):
        new, want, old = (np.asarray(x, np.float64) for x in own)
        error, largest = abs(new - want), abs(want - old).max()
        if is_sketch:  # of which an entry of a gradient has a part of every column
            gap = 1.0
        assert error.max() <= (2 * gap + 8 * case.eps) * largest
        if case.eps < 1e-6:
            assert np.mean(error > 1e-4 * largest) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, bits",
    [
        case
        for case in itertools.product(losses.CASES, ["int8", "int4"])
        if losses.CASES[case[0]]().eps < 1e-6
    ],
)
def test_so_they_are_where_both_sides_are_sketched(name, bits):
    """A rounding to the other neighbour, which is rare, would show in all of its matrix."""
    case = losses.CASES[name]()
    tx = case.transformation(
        opt=optax.sgd(1.0), rank=5, accumulator_dtype=bits, side="both", projection="cosine"
    )
    batches = jax.tree.map(lambda x: jnp.stack([x, x if x.ndim == 0 else x[::-1]]), case.batch)

    def loop(params, state):
        for batch in (jax.tree.map(lambda x, i=i: x[i], batches) for i in range(2)):
            updates, state = tx.update(jax.grad(case.loss)(params, *batch), state, params)
        return optax.apply_updates(params, updates)

    run, state = jax.jit(florax.value_and_update(case.loss, tx)), tx.init(case.params)
    _, got, _ = run(case.params, state, *batches)
    wanted = jax.jit(loop)(case.params, state)
    near = []
    for new, want, old in zip(*map(jax.tree.leaves, (got, wanted, case.params)), strict=True):
        error, largest = np.max(abs(new - want), initial=0), np.max(abs(want - old), initial=0)
        near.append(error <= 1e-3 * largest)
    assert np.mean(near) > 0.5


@pytest.mark.parametrize("bits", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_in_few_bits_one_layer_is_there_in_float32(bits):
    """Of a scanned stack neither the gradient nor its sum exists, in the sketch's stead."""
    tx = florax.flora_accumulate(
        optax.sgd(0.1), MICRO_BATCHES, lambda path, leaf: None, accumulator_dtype=bits
    )
    state = tx.init(PARAMS)
    whole = jax.make_jaxpr(florax.value_and_update(loss_fn, tx))(PARAMS, state, *BATCHES)
    scan = next(e for e in losses.equations(whole.jaxpr) if e.primitive.name == "scan")
    assert scan.params["length"] == MICRO_BATCHES
    stacks = {x.size for x in jax.tree.leaves(PARAMS["blocks"])}
    assert not floats_made(scan.params["jaxpr"].jaxpr, stacks)
    assert floats_made(scan.params["jaxpr"].jaxpr, {PARAMS["head"].size})
    dense = jax.make_jaxpr(jax.grad(loss_fn))(PARAMS, *jax.tree.map(lambda x: x[0], BATCHES))
    assert floats_made(dense.jaxpr, stacks) == {"scan"}


def test_which_weights_are_scanned_over_once_is_told_from_each_inner_program_once():
    """Of jits that are called twice by each other there are 2³⁰ calls."""

    def program(w, stack, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0] @ w

    for _ in range(30):
        program = jax.jit(lambda w, stack, x, inner=program: inner(w, stack, inner(w, stack, x)))
    jaxpr = jax.make_jaxpr(program)(jnp.eye(2), jnp.ones((3, 2, 2)), jnp.ones(2)).jaxpr
    assert _dependencies.scanned_once(jaxpr) == [False, False, False]
    once = jax.make_jaxpr(jax.jit(lambda s, x: jax.lax.scan(lambda x, w: (x @ w, None), x, s)))
    assert _dependencies.scanned_once(once(jnp.ones((3, 2, 2)), jnp.ones(2)).jaxpr) == [True, False]


def floats_made(jaxpr, sizes):
    """The operations with floats of such a size among their results."""
    return {
        equation.primitive.name
        for equation in losses.equations(jaxpr)
        for var in equation.outvars
        if jnp.issubdtype(getattr(var.aval, "dtype", int), jnp.inexact) and var.aval.size in sizes
    }


@pytest.mark.slow
def test_a_step_in_few_bits_may_begin_with_what_was_accumulated_before():
    tx = florax.flora_accumulate(
        optax.sgd(1.0), MICRO_BATCHES + 1, lambda path, leaf: None, accumulator_dtype=jnp.int8
    )
    before = jax.tree.map(lambda x: x[0] + jnp.ones_like(x[0]), BATCHES)
    grads = jax.jit(jax.grad(loss_fn))(PARAMS, *before)
    state = jax.jit(functools.partial(florax.accumulate, tx))(grads, tx.init(PARAMS))
    got, expected = (run(PARAMS, state, *BATCHES)[1] for run in (step(tx), loop(tx)))
    for new, want, old in zip(*map(jax.tree.leaves, (got, expected, PARAMS)), strict=True):
        off = abs(new - want) > 1e-4 * abs(want - old).max()
        assert jnp.mean(off) < 0.02


@pytest.mark.slow
def test_aux_comes_stacked():
    def with_aux(params, x, words):
        loss = loss_fn(params, x, words)
        return loss, {"loss": loss, "words": words, "head": params["head"][0]}

    run = jax.jit(florax.value_and_update(with_aux, SGD, has_aux=True))
    (loss, aux), params, state = run(PARAMS, SGD.init(PARAMS), *BATCHES)
    expected, *rest = step(SGD)(PARAMS, SGD.init(PARAMS), *BATCHES)
    chex.assert_trees_all_close((loss, params, state), (expected, *rest), **CLOSE)
    np.testing.assert_allclose(np.mean(aux["loss"]), loss, rtol=1e-6)
    np.testing.assert_array_equal(aux["words"], BATCHES[1])
    assert aux["head"].shape == (MICRO_BATCHES, 17)


def test_a_step_holds_no_gradient_of_full_size():
    """The accumulation; `finish` makes the mean gradients, one at a time."""
    tx = accumulate(optax.sgd(0.1))
    state = tx.init(PARAMS)

    def accumulated(grad):
        def run(params, state, *batches):
            def micro_step(state, batch):
                return florax.accumulate(tx, grad(params, state, batch), state), None

            return jax.lax.scan(micro_step, state, batches)

        return jax.make_jaxpr(run)(PARAMS, state, *BATCHES).jaxpr

    def born(params, state, batch):
        return florax.value_and_grad(loss_fn, tx)(params, *batch, opt_state=state)[1]

    def dense(params, state, batch):
        return jax.grad(loss_fn)(params, *batch)

    leaves = [leaf for leaf in state.sketch.plan if leaf.rank is not None]
    dense_sizes = {leaf.shape for leaf in state.sketch.plan if leaf.rank is None}
    compressed = [leaf for leaf in leaves if leaf.shape[::-1] not in dense_sizes]
    assert {leaf.path for leaf in compressed} == {"['blocks']['up']", "['blocks']['down']"}
    assert losses.gradients_of_full_size(accumulated(dense), compressed)
    assert not losses.gradients_of_full_size(accumulated(born), compressed)
    whole = jax.make_jaxpr(florax.value_and_update(loss_fn, tx))(PARAMS, state, *BATCHES)
    scan = next(e for e in losses.equations(whole.jaxpr) if e.primitive.name == "scan")
    assert scan.params["length"] == MICRO_BATCHES
    assert not losses.gradients_of_full_size(scan.params["jaxpr"].jaxpr, compressed)


def test_a_step_is_compiled_once():
    traces = 0

    def counted(params, *batch):
        nonlocal traces
        traces += 1
        return loss_fn(params, *batch)

    tx = accumulate(optax.sgd(0.1))
    run = jax.jit(florax.value_and_update(counted, tx))
    _, params, state = run(PARAMS, tx.init(PARAMS), *BATCHES)
    before = traces
    run(params, state, *BATCHES)
    assert traces == before


# --- the loss and what comes with it reach the optimizer


@pytest.mark.slow
def test_the_optimizer_is_given_the_mean_loss_and_the_extra_arguments():
    """As Optax's own optimizers are that look at the value of the loss."""

    def update(updates, state, params=None, *, value, factor, **_):
        return jax.tree.map(lambda g: -factor * g, updates), value

    base = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros([]), update)
    tx = accumulate(base)
    loss, params, state = step(tx)(PARAMS, tx.init(PARAMS), *BATCHES, factor=jnp.float32(0.1))
    assert state.inner_opt_state == loss
    expected = step(SGD)(PARAMS, SGD.init(PARAMS), *BATCHES)[1]
    chex.assert_trees_all_close(params, expected, **CLOSE)


@pytest.mark.slow
def test_a_value_that_is_passed_stands_for_the_loss():
    tx = accumulate(optax.GradientTransformationExtraArgs(lambda params: jnp.zeros([]), of_value))
    *_, state = step(tx)(PARAMS, tx.init(PARAMS), *BATCHES, value=jnp.float32(7))
    assert state.inner_opt_state == 7


def of_value(updates, state, params=None, *, value, **_):
    return updates, value


# --- what it is given


@pytest.mark.parametrize("tx", [optax.sgd(0.1), florax.flora_momentum(2)], ids=["sgd", "momentum"])
def test_only_an_accumulation_makes_steps(tx):
    with pytest.raises(TypeError, match="value_and_update takes the state of flora_accumulate, or"):
        florax.value_and_update(loss_fn, tx)(PARAMS, tx.init(PARAMS), *BATCHES)


BESIDE = {
    "clipped before": (
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        "tx has no FLORA transformation that sees the gradients before anything else",
    ),
    "per_layer around": (
        lambda tx: florax.per_layer(tx, {**dict.fromkeys(PARAMS, False), "blocks": True}),
        "value_and_update reaches flora_accumulate through chains, .* such as per_layer, inside",
    ),
}


@pytest.mark.parametrize("wrap, message", BESIDE.values(), ids=BESIDE.keys())
def test_what_an_accumulation_is_not_reached_through_makes_no_step(wrap, message):
    tx = wrap(accumulate(optax.sgd(0.1)))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(florax.value_and_update(loss_fn, tx), PARAMS, tx.init(PARAMS), *BATCHES)


def test_a_step_takes_the_state_of_its_transformation():
    tx = accumulate(optax.sgd(0.1))
    run = florax.value_and_update(loss_fn, tx)
    with pytest.raises(TypeError, match="value_and_update takes the state of flora_accumulate"):
        run(PARAMS, optax.EmptyState(), *BATCHES)
    with pytest.raises(ValueError, match="do not match the parameters"):
        run({"embed": PARAMS["embed"]}, tx.init(PARAMS), *BATCHES)


def test_a_step_needs_micro_batches():
    tx = accumulate(optax.sgd(0.1))
    with pytest.raises(ValueError, match="needs micro-batches to scan over, got none"):
        florax.value_and_update(loss_fn, tx)(PARAMS, tx.init(PARAMS))


# --- optax.microbatch


def accumulator(tx, state):
    """Adds gradients, full-size or born compressed, to a state, one micro-batch at a time."""
    return optax.microbatching.Accumulator(
        init=lambda shapes: state,
        update=lambda state, grads, index: florax.accumulate(tx, grads, state),
        finalize=lambda state: state,
        aggregate=lambda grads: grads,  # only `optax.microbatching.micro_vmap` calls it
    )


@pytest.mark.slow
@pytest.mark.parametrize("sketched", [False, True], ids=["dense", "sketched"])
def test_optax_microbatch_accumulates_as_the_loop_does(sketched):
    tx = SGD
    together = tuple(x.reshape(-1, *x.shape[2:]) for x in BATCHES)

    def grads(params, state, *batch):
        if sketched:
            return florax.value_and_grad(loss_fn, tx)(params, *batch, opt_state=state)[1]
        return jax.grad(loss_fn)(params, *batch)

    @jax.jit
    def run(params, state, *batch):
        of_params = functools.partial(grads, params, state)
        micro = optax.microbatch(of_params, (0, 1), losses.TOKENS, accumulator(tx, state))
        return florax.finish(tx, params, micro(*batch))

    got = run(PARAMS, tx.init(PARAMS), *together)
    chex.assert_trees_all_close(got, loop(tx)(PARAMS, tx.init(PARAMS), *BATCHES)[1:], **CLOSE)
