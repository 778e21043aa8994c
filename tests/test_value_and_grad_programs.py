"""Of random programs, too, gradients born compressed are the compressed gradients."""

import functools

import jax
import jax.numpy as jnp
import losses
import meshes
import pytest
from losses import LAYERS, WIDTH, Case

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis comes with the extra `test`")
st = hypothesis.strategies

pytestmark = pytest.mark.slow


# A program is a tuple of steps; a step takes activations, shape (tokens, width), to others. Its
# weights, all square, have names; `layer` is the one of the scan that the step stands in.

PARAMS = {
    "first": losses.normal(WIDTH, WIDTH, seed=1),
    "second": losses.normal(WIDTH, WIDTH, seed=2),
    "heads": losses.normal(WIDTH, 1, WIDTH, seed=3),
    "half": losses.normal(WIDTH, WIDTH, seed=4, dtype=jnp.bfloat16),
    "stack": losses.normal(LAYERS, WIDTH, WIDTH, seed=5),
}
AXES = {"heads": losses.Axes(0, (1, 2))}


def product(x, w):
    return x @ w


def product_with_transposed(x, w):
    return x @ w.T


def product_of_parts(x, w):
    left, right = jnp.split(x, (4,), axis=1)
    return left @ w[:4] + right @ w[4:]


def product_of_halves(x, w):
    first, second = jnp.split(w, (5,), axis=1)
    return jnp.concatenate([x @ first, x @ second], axis=1)


def product_one_by_one(x, w):
    return jax.vmap(lambda row: w.T @ row)(x)


def product_in_bfloat16(x, w):
    return x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)


def product_of_concatenated(x, w):
    return (x @ jnp.concatenate([w[:, 3:], w, w.T], axis=1))[:, 2 : WIDTH + 2]


def product_of_stacked(x, w):
    return jnp.einsum("td,kde->te", x, jnp.stack([w, w.T]))


def product_of_moved(x, w):
    w = jnp.flip(jnp.moveaxis(jnp.pad(w, ((0, 1), (2, 0)))[:-1, 2:], 1, 0), 0)
    return x[:, ::-1] @ w


def scaled(x, w):
    return x @ (1.5 * w / 2)


def scaled_along_an_axis(x, w):
    return x @ (w * jnp.mean(x, 0)) + x @ (w / (1 + x[0, :, None] ** 2))


def penalty(x, w):
    return x + jnp.mean(jnp.square(w)) + jnp.sum(w * w, 0) + jnp.mean(w, 1)


def looked_up(x, w):
    return x + w[jnp.argmax(x, 1)] + w[:, jnp.arange(x.shape[0]) % 3].T


def function(x, w):
    return x @ jnp.sin(w)


def sum_with_half(x, w):
    return x @ (w + 0.5 * jnp.sin(w))


PRODUCTS = (
    product,
    product_with_transposed,
    product_of_parts,
    product_of_halves,
    product_one_by_one,
    product_in_bfloat16,
    product_of_concatenated,
    product_of_stacked,
    product_of_moved,
    scaled,
    scaled_along_an_axis,
    penalty,
    looked_up,
)
OPAQUE = (function, sum_with_half)


def run(program, weights, x):
    for kind, *details in program:
        x = jnp.tanh(STEPS[kind](weights, x, *details).astype(jnp.float32))
    return x


def use(weights, x, name, how):
    w = weights[name]
    if name == "stack":
        w = w[LAYERS - 1]
    return how(x, w.reshape(WIDTH, WIDTH).astype(jnp.float32))


def jitted(weights, x, inner):
    return jax.jit(functools.partial(run, inner))(weights, x)


def checkpointed(weights, x, inner):
    return jax.checkpoint(functools.partial(run, inner))(weights, x)


def scanned(weights, x, inner, reverse):
    def body(x, layer):
        return run(inner, {**weights, "layer": layer}, x), None

    return jax.lax.scan(body, x, weights["stack"], reverse=reverse)[0]


def carried(weights, x, inner):
    def body(carry, _):
        x, weights = carry
        return (run(inner, weights, x), weights), None

    (x, _), _ = jax.lax.scan(body, (x, weights), length=2)
    return x


def mapped(weights, x, inner):
    return jax.vmap(functools.partial(run, inner, weights))(jnp.stack([x, -x, 2 * x]))[1]


def branched(weights, x, inner, other):
    branches = [functools.partial(run, program, weights) for program in (inner, other)]
    return jax.lax.cond(x[0, 0] > 0, *branches, x)


def indexed(weights, x, inner):
    def body(i, x):
        layer = jax.lax.dynamic_index_in_dim(weights["stack"], i, keepdims=False)
        return run(inner, {**weights, "layer": layer}, x)

    return jax.lax.fori_loop(0, LAYERS, body, x)


STEPS = {
    function.__name__: function
    for function in (use, jitted, checkpointed, scanned, carried, mapped, branched, indexed)
}


def programs(depth, names=tuple(PARAMS), hows=PRODUCTS, mapped=False):
    """Up to three steps; what stands in a loop may use its layer."""
    steps = st.tuples(st.just("use"), st.sampled_from(names), st.sampled_from(hows))
    if depth:
        inner = programs(depth - 1, names, hows, mapped)
        of_layers = programs(depth - 1, (*dict.fromkeys((*names, "layer")),), hows, mapped)
        steps |= st.tuples(st.sampled_from(("jitted", "checkpointed", "carried")), inner)
        steps |= st.tuples(st.just("scanned"), of_layers, st.booleans())
        steps |= st.tuples(st.just("indexed"), of_layers)
        steps |= st.tuples(st.just("mapped"), programs(depth - 1, names, hows, mapped=True))
        if (
            not mapped
        ):  # JAX repeats all operands of a conditional that is mapped over its condition
            steps |= st.tuples(st.just("branched"), inner, inner)
    return st.lists(steps, min_size=1, max_size=3).map(tuple)


def used(program, hows):
    """The weights that a program uses in one of these ways."""
    found = set()
    for kind, *details in program:
        if kind == "use":
            name, how = details
            if how in hows:
                found.add("stack" if name == "layer" else name)
        else:
            found |= {
                name for inner in details if type(inner) is tuple for name in used(inner, hows)
            }
    return found


def check(program, place=lambda tree: tree):
    def loss(params, x):
        return losses.size(run(program, params, x))

    dense = {f"['{name}']": "" for name in used(program, OPAQUE)}
    narrow = "half" in used(program, PRODUCTS + OPAQUE) or used(program, (product_in_bfloat16,))
    eps = float(jnp.finfo(jnp.bfloat16 if narrow else jnp.float32).eps)
    case = Case(loss, place(PARAMS), place((losses.tokens(),)), dense, AXES, eps)
    losses.check(case, exact=False)


def settings(examples):
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@settings(200)
@hypothesis.given(programs(3, hows=PRODUCTS + OPAQUE))
def test_of_random_programs(program):
    check(program)


@settings(40)
@hypothesis.given(programs(2, hows=PRODUCTS + OPAQUE))
def test_of_random_programs_on_a_mesh_with_explicit_axes(program):
    with jax.set_mesh(meshes.make((8,), ("data",), jax.sharding.AxisType.Explicit)):
        check(program, lambda tree: jax.device_put(tree, jax.P()))
