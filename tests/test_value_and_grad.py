"""Gradients born compressed are the compressed gradients."""

import re

import chex
import jax
import jax.numpy as jnp
import losses
import meshes
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import florax


def some(names, slow):
    """Parameters of a test; the slow ones, whose like is among the others, run nightly."""
    marks = {True: pytest.mark.slow, False: ()}
    return [pytest.param(name, marks=marks[name in slow], id=name) for name in names]


BY_DAY = {
    "concatenated_and_padded",
    "convolutions_of_every_kind",
    "lookups_of_every_kind",
    "opaque_uses",
    "what_the_loss_does_not_depend_on",
}
SLOW_CASES = losses.CASES.keys() - BY_DAY


@pytest.mark.parametrize("name", some(losses.CASES, SLOW_CASES))
def test_sketches_are_the_compressed_gradients(name):
    losses.check(losses.CASES[name]())


VARIED = [
    "a_fused_weight_cut_in_columns_and_in_rows",
    "a_scan_over_layers_of_experts",
    "attention_kernels_of_three_axes",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "side, projection", [("larger", "gaussian"), ("smaller", "cosine"), ("larger", "cosine")]
)
@pytest.mark.parametrize("name", ["a_tied_weight", *VARIED])
def test_so_they_are_with_both_projections_on_both_sides(name, projection, side):
    case = losses.CASES[name]()
    losses.check(case, case.transformation(projection=projection, side=side))


@pytest.mark.slow
@pytest.mark.parametrize("name", losses.CASES)
def test_so_they_are_where_both_sides_are_sketched(name):
    """Of ranks with which no sketch or projection has as many entries as a weight or a layer."""
    case, rank = losses.CASES[name](), 6 if name == "layers_along_another_axis" else 3
    losses.check(case, case.transformation(rank=rank, projection="cosine", side="both"))


def test_a_dense_program_does_hold_gradients_of_full_size():
    """What `check` asserts of every sketched program is no empty claim."""
    for name, found in {
        "a_plain_function": {"dot_general"},
        "a_scan_over_layers": {"dot_general"},
        "a_tied_weight": {"dot_general", "add_any"},
        "layers_taken_by_number": {"dot_general", "pad", "add_any"},
    }.items():
        case = losses.CASES[name]()
        plan = case.transformation().init(case.params).sketch.plan
        jaxpr = jax.make_jaxpr(jax.grad(case.loss))(case.params, *case.batch).jaxpr
        full = losses.gradients_of_full_size(
            jaxpr, [leaf for leaf in plan if leaf.rank is not None]
        )
        assert found <= set(full)


def test_where_a_use_is_dense_only_that_one_is():
    def loss(params, x):
        product = jax.lax.scan(lambda h, _: (jnp.tanh(h @ params["w"]), None), x, length=2)[0]
        return losses.size(product) + jnp.sum(jnp.exp(params["w"]))

    case = losses.Case(loss, {"w": losses.normal(11, 11)}, (losses.tokens(),), {"['w']": "exp"})
    losses.check(case)
    tx = case.transformation()
    state = tx.init(case.params)
    jaxpr = jax.make_jaxpr(
        lambda params, x: florax.value_and_grad(loss, tx)(params, x, opt_state=state)
    )(case.params, *case.batch)
    full = set(losses.gradients_of_full_size(jaxpr.jaxpr, state.sketch.plan))
    assert full and not full & {"dot_general", "add_any"}


# --- arguments


def two_products(params, x, head=None, *, scale=1.0, activation="tanh"):
    w, other = params["up"], params["down"]
    y = getattr(jnp, activation)(x @ w) @ (other if head is None else head)
    return losses.size(scale * y)


PARAMS = losses.matrices()
X = losses.tokens()


def accumulate(rank=losses.RANK, **arguments):
    return florax.flora_accumulate(optax.sgd(0.1), 2, rank, **arguments)


def momentum(**arguments):
    return florax.flora_momentum(losses.RANK, **arguments)


def born(loss, tx, params, *batch, **arguments):
    """The loss and its gradients at the start of training."""
    value_and_grad = florax.value_and_grad(loss, tx, **arguments)
    return value_and_grad(params, *batch, opt_state=tx.init(params))


def shapes(gradients):
    """Per leaf the shape of its sketch, in a tuple of one, or of its gradient."""
    return jax.tree.map(
        lambda g: (g.array.shape,) if losses.is_sketch(g) else g.shape,
        gradients,
        is_leaf=losses.is_sketch,
    )


SKETCHES = {"up": ((13, 4),), "down": ((13, 4),)}


def test_argnums_may_be_a_tuple_and_count_from_the_end():
    def loss(x, up, down):
        return two_products({"up": up, "down": down}, x)

    up, down = PARAMS["up"], PARAMS["down"]
    tx = accumulate()
    state = tx.init((up, down))
    born = jax.jit(
        lambda argnums: florax.value_and_grad(loss, tx, argnums)(X, up, down, opt_state=state),
        static_argnums=0,
    )
    value, (of_up, of_down) = born((1, 2))
    assert (shapes(of_up), shapes(of_down)) == (SKETCHES["up"], SKETCHES["down"])
    chex.assert_trees_all_equal((value, (of_up, of_down)), born((-2, -1)), born((1, -1)))

    alone = tx.init(down)
    _, of_one = florax.value_and_grad(loss, tx, argnums=-1)(X, up, down, opt_state=alone)
    assert shapes(of_one) == SKETCHES["down"]
    in_a_tuple = tx.init((down,))
    _, (of_one,) = florax.value_and_grad(loss, tx, argnums=(-1,))(X, up, down, opt_state=in_a_tuple)
    assert shapes(of_one) == SKETCHES["down"]


@pytest.mark.parametrize("argnums", [1, -2, (0, 1), 0.0, "0", True])
def test_argnums_number_positional_arguments(argnums):
    with pytest.raises(ValueError, match=f"argnums must number .* got {re.escape(repr(argnums))}"):
        born(lambda w: jnp.sum(w), accumulate(), X, argnums=argnums)


def test_the_loss_may_take_keywords_and_what_is_no_array():
    tx = accumulate()
    state = tx.init(PARAMS)

    @jax.jit
    def step(scale):
        return florax.value_and_grad(two_products, tx)(
            PARAMS, X, None, scale=scale, activation="sin", opt_state=state
        )

    value, grads = step(2.0)
    assert shapes(grads) == SKETCHES
    np.testing.assert_allclose(value, two_products(PARAMS, X, scale=2.0, activation="sin"), 1e-6)


def test_aux_may_be_anything_and_hold_weights():
    def loss(params, x):
        y = x @ params["up"] @ params["down"]
        aux = {"y": y, "up": params["up"], "cut": params["up"].T[:2], "none": None, "n": 3}
        return losses.size(y), aux

    tx = accumulate()
    with_aux = florax.value_and_grad(loss, tx, has_aux=True)
    (value, aux), grads = jax.jit(lambda p, s, x: with_aux(p, x, opt_state=s))(
        PARAMS, tx.init(PARAMS), X
    )
    expected, expected_aux = jax.jit(loss)(PARAMS, X)
    assert shapes(grads) == SKETCHES
    assert value == expected
    chex.assert_trees_all_equal(aux, expected_aux)
    report = florax.gradient_report(loss, tx, PARAMS, X, has_aux=True)
    assert all(row.sketch for row in report.rows)


def test_parameters_may_be_one_array_a_list_or_a_tree_with_holes():
    _, grad = born(lambda w: losses.size(X @ w), accumulate(), PARAMS["up"])
    assert shapes(grad) == SKETCHES["up"]
    params = [PARAMS["up"], None, (PARAMS["down"],), {}]
    _, grads = born(lambda p: losses.size(X @ p[0] @ p[2][0]), accumulate(), params)
    assert shapes(grads) == [SKETCHES["up"], None, (SKETCHES["down"],), {}]


@pytest.mark.parametrize(
    "loss, message",
    [
        (lambda w: X @ w, "must be a real scalar, got .*(5, 13)"),
        (lambda w: jnp.sum(w).astype(jnp.int32), "must be a real scalar, got .*int32"),
        (lambda w: jnp.sum(w) * 1j, "must be a real scalar, got .*complex64"),
        (lambda w: (jnp.sum(w), 1), "must be a real scalar, got"),
        (lambda w: None, "must be a real scalar, got None"),
    ],
)
def test_the_loss_is_a_real_scalar(loss, message):
    with pytest.raises(TypeError, match=message):
        born(loss, accumulate(), PARAMS["up"])


def test_with_aux_the_loss_returns_a_pair():
    with pytest.raises(TypeError, match="has_aux=True the loss must return a pair"):
        born(jnp.sum, accumulate(), PARAMS["up"], has_aux=True)


# --- states


WRAPPED = {
    "accumulate": accumulate,
    "momentum": lambda: momentum(residual=False),
    "chain that begins with momentum": lambda: optax.chain(
        momentum(projection="gaussian"), optax.sgd(0.1)
    ),
    "chain in a chain": lambda: optax.chain(optax.chain(accumulate())),
    "named_chain": lambda: optax.named_chain(("flora", accumulate()), ("more", optax.scale(2.0))),
    "masked": lambda: optax.masked(accumulate(), {"up": True, "down": True}),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda decay: momentum(decay=decay, residual=False)
    )(decay=0.9),
    "partition": lambda: optax.partition(
        {"a": accumulate(), "b": momentum(residual=False)}, {"up": "a", "down": "b"}
    ),
    "with_extra_args_support": lambda: optax.with_extra_args_support(accumulate()),
}


SLOW_WRAPPERS = {
    *("accumulate", "momentum"),  # both are in the partition
    "inject_hyperparams",
    "chain in a chain",
    "with_extra_args_support",
    "chain that begins with momentum",
    "named_chain",
    "masked",
}


@pytest.mark.parametrize("name", some(WRAPPED, SLOW_WRAPPERS))
def test_states_that_see_gradients_first_take_sketches_in_place_of_gradients(name):
    tx = WRAPPED[name]()
    state = tx.init(PARAMS)

    @jax.jit
    def steps(params, state, x):
        def both(states, x):
            born_state, dense_state = states
            _, born = florax.value_and_grad(two_products, tx)(params, x, opt_state=born_state)
            assert shapes(born) == SKETCHES
            dense = jax.grad(two_products)(params, x)
            born, born_state = tx.update(born, born_state, params)
            dense, dense_state = tx.update(dense, dense_state, params)
            return (born_state, dense_state), (born, dense)

        return jax.lax.scan(both, (state, state), x)

    (born_state, dense_state), (born, dense) = steps(PARAMS, state, jnp.stack([X, X + 1, 2 * X]))
    assert any(np.any(update) for update in jax.tree.leaves(dense))
    chex.assert_trees_all_close(born, dense, **CLOSE)
    chex.assert_trees_all_close(born_state, dense_state, **CLOSE)


# Sums of at most 20 products of size 1.
CLOSE = dict(rtol=1e-5, atol=3e-6)


def test_only_what_a_mask_selects_is_sketched():
    tx = optax.masked(accumulate(), {"up": True, "down": False})
    _, grads = born(two_products, tx, PARAMS, X)
    assert shapes(grads) == {**SKETCHES, "down": (13, 11)}
    reasons = {
        row.path: row.reason for row in florax.gradient_report(two_products, tx, PARAMS, X).rows
    }
    assert reasons == {"['up']": "", "['down']": "not of the FLORA transformation"}


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.1),
        optax.chain(optax.clip_by_global_norm(1.0), accumulate()),
        optax.chain(optax.adafactor(0.1), florax.flora_momentum(losses.RANK)),
        optax.apply_if_finite(accumulate(), 3),
        optax.MultiSteps(florax.flora_momentum(losses.RANK), 2).gradient_transformation(),
        optax.identity(),
    ],
    ids=["adam", "clipped", "after adafactor", "where finite", "MultiSteps", "identity"],
)
def test_a_state_that_does_not_see_gradients_first_is_refused(tx):
    for call in (
        lambda: born(two_products, tx, PARAMS, X),
        lambda: florax.gradient_report(two_products, tx, PARAMS, X),
    ):
        with pytest.raises(
            ValueError, match="no FLORA transformation that sees the gradients before"
        ):
            call()


@pytest.mark.parametrize(
    "other",
    [
        {"up": PARAMS["up"], "down": PARAMS["up"]},
        {"up": PARAMS["up"], "head": PARAMS["down"]},
        PARAMS["up"],
    ],
    ids=["shape", "name", "tree"],
)
def test_the_state_of_other_parameters_is_refused(other):
    tx = accumulate()
    state = tx.init(other)
    with pytest.raises(ValueError, match=r"opt_state was made for parameters with .* of shape"):
        florax.value_and_grad(two_products, tx)(PARAMS, X, opt_state=state)


def test_integers_cannot_be_differentiated_by():
    tx = accumulate()
    with pytest.raises(TypeError, match="dtype int32; only real floating-point"):
        florax.value_and_grad(lambda w, n: jnp.sum(w), tx, (0, 1))(
            PARAMS["up"], 3, opt_state=tx.init((PARAMS["up"],))
        )


def sketches(tx=None):
    tx = accumulate() if tx is None else tx
    return born(two_products, tx, PARAMS, X)[1]


def test_sketches_add_and_scale_as_gradients_do():
    """The sum of the sketches is the sketch of the sum."""
    gradients = jax.jit(lambda x: born(two_products, accumulate(), PARAMS, x)[1])
    mean = jax.tree.map(lambda a, b: (a + b) / 2, gradients(X), gradients(X + 1))

    def both(params, x):
        return (two_products(params, X) + two_products(params, X + 1)) / 2

    of_mean = jax.jit(lambda: born(both, accumulate(), PARAMS, X)[1])()
    chex.assert_trees_all_close(mean, of_mean, **CLOSE)


MISUSES = {
    "sum": jnp.sum,
    "product": lambda g: jnp.ones((13, 11)) @ g,
    "asarray": jnp.asarray,
    "numpy": np.asarray,
    "square": jnp.square,
}


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES.keys())
def test_a_sketch_is_no_array_and_says_so(misuse):
    with pytest.raises(TypeError, match=r"gradient of \['up'\] is a florax.Sketch, not an array"):
        misuse(sketches()["up"])


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.sgd(0.1), optax.adafactor(0.1)])
def test_no_other_optimizer_takes_a_sketch(tx):
    def step():
        updates, _ = tx.update(sketches(), tx.init(PARAMS), PARAMS)
        return optax.apply_updates(PARAMS, updates)

    with pytest.raises((TypeError, ValueError), match="Sketch"):
        step()


@pytest.mark.parametrize("other", [dict(rank=3), dict(side="larger"), dict(projection="cosine")])
@pytest.mark.parametrize("call", ["update", "accumulate"])
def test_the_sketch_of_another_transformation_is_refused(call, other):
    tx = accumulate()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"sketch of \['down'\] was made for another state"):
        if call == "update":
            tx.update(sketches(accumulate(**other)), state, PARAMS)
        else:
            florax.accumulate(tx, sketches(accumulate(**other)), state)


def test_residual_momentum_needs_full_gradients():
    tx = momentum()
    with pytest.raises(ValueError, match=r"residual needs the full gradient of \['down'\].*False"):
        tx.update(sketches(momentum(residual=False)), tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"no FLORA transformation .*residual=False"):
        born(two_products, tx, PARAMS, X)


def test_beside_a_residual_momentum_only_the_others_gradients_are_born_compressed():
    """Of one transformation that gives each leaf to another."""
    tx = optax.partition({"a": accumulate(), "b": momentum()}, {"up": "a", "down": "b"})
    _, grads = born(two_products, tx, PARAMS, X)
    assert shapes(grads) == {**SKETCHES, "down": (13, 11)}


# --- around


def sketch_of(dense, state):
    """Of a tree of gradients: the trees of the sketches."""
    drawn = losses.projections(state)
    return [want.sketch for want in losses.compressed(dense, state, drawn)]


def arrays(gradients):
    return [gradient.array for gradient in losses.flat(gradients)]


def test_it_may_be_mapped_over_batches():
    tx, x = accumulate(), losses.tokens(3)
    state = tx.init(PARAMS)
    sketched = jax.jit(jax.vmap(lambda x: born(two_products, tx, PARAMS, x)[1]))
    dense = jax.jit(jax.vmap(jax.grad(two_products), (None, 0)))(PARAMS, x)
    for i in range(3):
        wanted = sketch_of(jax.tree.map(lambda g, i=i: g[i], dense), state)
        got = [array[i] for array in arrays(sketched(x))]
        chex.assert_trees_all_close(got, wanted, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a_scan_over_layers", "experts_mapped_each_over_its_tokens"])
def test_it_may_be_mapped_over_models(name):
    case = losses.CASES[name]()
    tx = case.transformation()
    several = jax.tree.map(lambda w: jnp.stack([w, w + 0.1]), case.params)
    states = jax.vmap(tx.init)(several)

    @jax.jit
    def both(several, states):
        def one(params, state):
            _, born = florax.value_and_grad(case.loss, tx)(params, *case.batch, opt_state=state)
            return arrays(born), jax.grad(case.loss)(params, *case.batch)

        return jax.vmap(one)(several, states)

    born, dense = both(several, states)
    for i in range(2):
        of_one = jax.tree.map(lambda x, i=i: x[i], (born, dense, states))
        chex.assert_trees_all_close(of_one[0], sketch_of(of_one[1], of_one[2]), **CLOSE)


@pytest.fixture
def mesh():
    return meshes.make((8,), ("data",))


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["a_plain_function", "a_tied_weight", "a_scan_of_a_checkpoint"])
def test_devices_may_each_have_their_share_of_the_batch(name, check_vma, mesh):
    """As with `jax.grad`: with `check_vma` gradients of what is replicated are summed."""
    case = losses.CASES[name]()
    tx = case.transformation()
    state = tx.init(case.params)
    x = losses.tokens(8, *case.batch[0].shape[:-2])

    def local(grad):
        def share(params, state, x):
            grads = grad(params, state, x[0])
            return grads if check_vma else jax.lax.psum(grads, "data")

        specs = (P(), P(), P("data"))
        return jax.jit(
            jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
        )

    def born(params, state, x):
        return florax.value_and_grad(case.loss, tx)(params, x, opt_state=state)[1]

    def dense(params, state, x):
        return jax.grad(case.loss)(params, x)

    got = local(born)(case.params, state, x)
    wanted = local(dense)(case.params, state, x)
    for gradient, want in zip(
        losses.flat(got), losses.compressed(wanted, state, losses.projections(state)), strict=True
    ):
        if want.sketch is None:
            np.testing.assert_allclose(gradient, want.gradient, **CLOSE)
        else:
            losses.assert_is_gradient(gradient, want, case.eps)


def test_a_loss_on_several_devices_keeps_its_dense_gradients(mesh):
    @jax.shard_map(mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    def loss(params, x):
        return jax.lax.pmean(losses.size(losses.block(x[0], params)), "data")

    dense = dict.fromkeys(("['up']", "['down']"), "shard_map")
    losses.check(losses.Case(loss, PARAMS, (losses.tokens(8),), dense))


# --- meshes with explicit axes


def looked_up_across_devices(params, x, ids):
    rows = params["embed"].at[ids].get(out_sharding=P("data"))
    return losses.size(jnp.tanh(rows) @ params["up"])


def in_an_automatic_region(params, x, ids):
    product = jax.sharding.auto_axes(lambda x, w: jnp.tanh(x @ w), out_sharding=P("data"))
    return losses.size(product(x, params["up"]) @ params["up"].T @ params["embed"].T)


def in_a_jit_that_divides_its_result(params, x, ids):
    product = jax.jit(jnp.matmul, out_shardings=P("data"))
    return losses.size(jnp.tanh(product(x, params["up"])) @ params["up"].T * 0.5)


def in_other_ways(params, x, ids):
    up = params["up"]
    fused = x @ jnp.concatenate([up * 0.5, up * up[0], up], axis=1)
    return losses.size(fused) + jnp.sum(up**2) + jnp.sum(jnp.sin(params["embed"])) / 9


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(looked_up_across_devices, marks=pytest.mark.slow),
        in_an_automatic_region,
        pytest.param(in_a_jit_that_divides_its_result, marks=pytest.mark.slow),
        pytest.param(in_other_ways, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("side", ["smaller", pytest.param("larger", marks=pytest.mark.slow)])
def test_meshes_may_have_explicit_axes(loss, devices, side):
    mesh = meshes.make((devices,), ("data",), jax.sharding.AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = {"embed": losses.normal(32, 11), "up": losses.normal(11, 13)}
        params = jax.device_put(params, P())
        ids = jax.device_put(jnp.arange(16).reshape(8, 2) * 5 % 32, P("data"))
        x = jax.device_put(losses.normal(8, 2, 11), P("data"))
        tx = accumulate(side=side)
        state = tx.init(params)

        @jax.jit
        def both(params, state, x, ids):
            _, born = florax.value_and_grad(loss, tx)(params, x, ids, opt_state=state)
            dense = jax.grad(loss)(params, x, ids)
            return born, state.sketch.compress(jax.tree.leaves(dense))

        born, wanted = both(params, state, x, ids)
        report = florax.gradient_report(loss, tx, params, x, ids)
        assert all(map(losses.is_sketch, losses.flat(born)))
        assert all(row.sketch for row in report.rows)
        chex.assert_trees_all_close(arrays(born), wanted, **CLOSE)

        # In a whole step, too.
        step = jax.jit(florax.value_and_update(loss, tx))
        got, _, _ = step(params, state, x[None], ids[None])
        np.testing.assert_allclose(got, jax.jit(loss)(params, x, ids), rtol=1e-6)


def test_an_inner_jit_keeps_the_division_of_its_result(mesh):
    def loss(params, x):
        divided = jax.sharding.NamedSharding(mesh, P("data"))
        return losses.size(jax.jit(jnp.matmul, out_shardings=divided)(x, params["up"]))

    tx, x = accumulate(), losses.normal(8, 11)
    traced = jax.jit(
        lambda params, x: florax.value_and_grad(loss, tx)(params, x, opt_state=tx.init(params))
    ).trace(PARAMS, x)
    constraints = [e for e in losses.equations(traced.jaxpr.jaxpr) if "sharding_con" in str(e)]
    assert any(
        e.params["sharding"].spec == P("data") for e in constraints if e.params.get("sharding")
    )


# --- programs in programs


@pytest.mark.parametrize("depth", [4, 8])
def test_what_is_called_again_is_not_traced_again(depth, monkeypatch):
    """Jits called twice a level are evaluated once a level, and not once a call."""

    def layer(x, w):
        return jnp.tanh(x @ w)

    for _ in range(depth):
        layer = jax.jit(lambda x, w, inner=layer: inner(inner(x, w), w))
    evaluated = []
    run = florax._evaluator.Evaluator.run
    monkeypatch.setattr(
        florax._evaluator.Evaluator, "run", lambda *args: evaluated.append(1) or run(*args)
    )
    w = losses.normal(11, 11)
    tx = accumulate()
    jax.eval_shape(lambda w: born(lambda w: losses.size(layer(w, w.T)), tx, w)[0], w)
    assert len(evaluated) <= 3 * depth


def test_what_has_no_entries_has_a_gradient_without_any():
    def loss(params, x):
        nothing = params["nothing"].reshape(3, 0).T
        return (
            losses.size(x @ params["up"]) + jnp.sum(nothing) + jnp.sum(nothing @ jnp.ones((3, 2)))
        )

    params = {"up": PARAMS["up"], "nothing": jnp.zeros((0, 3))}
    tx = accumulate()
    _, grads = born(loss, tx, params, X)
    assert shapes(grads) == {"up": (13, 4), "nothing": (0, 3)} | {"up": ((13, 4),)}
    step = florax.value_and_update(loss, tx)
    value, _, _ = step(params, tx.init(params), X[None])
    np.testing.assert_allclose(value, loss(params, X), rtol=1e-6)


@pytest.mark.parametrize("side", ["smaller", "both"])
def test_a_loop_keeps_nothing_of_its_keys_for_the_way_back(side):
    """A layer's are read there from those of all: copies would be kernels in every layer."""
    case = losses.CASES["a_scan_of_a_checkpoint"]()
    tx = case.transformation(side=side, projection="cosine")
    step = florax.value_and_grad(case.loss, tx)
    jaxpr = jax.make_jaxpr(lambda p, s: step(p, *case.batch, opt_state=s))(
        case.params, tx.init(case.params)
    )
    scans = [e for e in losses.equations(jaxpr.jaxpr) if e.primitive.name == "scan"]
    made = [var.aval for scan in scans for var in scan.outvars]
    assert len(scans) == 2
    assert not [own for own in made if jnp.issubdtype(own.dtype, jnp.integer)]
