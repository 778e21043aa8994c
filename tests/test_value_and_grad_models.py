"""Gradients of flax and equinox models are born compressed, with no change to the models."""

import functools

import jax
import jax.numpy as jnp
import losses
import numpy as np
import optax
import pytest
from losses import INNER, LAYERS, WIDTH, Case

import florax
from florax import FloraDimensionNumbers as Axes

KERNEL_AXES = {
    **dict.fromkeys(("query", "key", "value"), Axes(0, (1, 2))),
    "out": Axes((0, 1), 2),
}


# --- flax.nnx


@pytest.fixture(scope="module")
def nnx():
    return pytest.importorskip("flax.nnx", reason="flax comes with the extra `examples`")


def of_nnx(nnx, model, dense=(), axes=(), **arguments):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        return losses.size(nnx.merge(graph, params, rest, copy=True)(x))

    return Case(loss, params, (losses.tokens(2),), dict(dense), dict(axes), **arguments)


def nnx_linear(nnx, **arguments):
    rngs = nnx.Rngs(0)
    layers = [
        nnx.Linear(WIDTH, INNER, rngs=rngs, **arguments),
        nnx.relu,
        nnx.Linear(INNER, WIDTH, rngs=rngs, **arguments),
    ]
    return of_nnx(nnx, nnx.Sequential(*layers))


def nnx_bfloat16(nnx):
    case = nnx_linear(nnx, dtype=jnp.bfloat16)
    return case._replace(eps=float(jnp.finfo(jnp.bfloat16).eps))


def nnx_linear_general(nnx):
    rngs = nnx.Rngs(0)
    layers = nnx.Sequential(
        nnx.LinearGeneral(WIDTH, (2, 7), rngs=rngs),
        nnx.LinearGeneral((2, 7), WIDTH, axis=(-2, -1), rngs=rngs),
    )
    axes = {"layers'][0]['kernel": Axes(0, (1, 2)), "layers'][1]['kernel": Axes((0, 1), 2)}
    case = of_nnx(nnx, layers)
    return case._replace(axes=axes)


def nnx_attention(nnx):
    model = nnx.MultiHeadAttention(
        num_heads=2, in_features=WIDTH, qkv_features=14, decode=False, rngs=nnx.Rngs(0)
    )
    return of_nnx(nnx, model, axes=KERNEL_AXES)


def nnx_convolution(nnx):
    model = nnx.Conv(WIDTH, INNER, kernel_size=2, rngs=nnx.Rngs(0))
    return of_nnx(nnx, model, axes={"kernel": Axes((0, 1), 2)})


def nnx_tied_head(nnx):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(17, WIDTH, rngs=rngs)
            self.layer = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return self.embed.attend(jnp.tanh(self.layer(x)))

    return of_nnx(nnx, Model(nnx.Rngs(0)))


def nnx_stack(nnx, wrap):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.up = nnx.Linear(WIDTH, INNER, rngs=rngs)
            self.down = nnx.Linear(INNER, WIDTH, rngs=rngs)

        def __call__(self, x):
            return x + self.down(jnp.tanh(self.up(self.norm(x))))

    class Model(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=LAYERS)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def make(rngs):
                return Block(rngs)

            self.blocks = make(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @wrap
            def run(x, block):
                return block(x)

            return run(x, self.blocks)

    vectors = dict.fromkeys(("bias", "scale"), None)
    return of_nnx(nnx, Model(nnx.Rngs(0)), axes=vectors)


def nnx_scan(nnx):
    return nnx_stack(nnx, lambda function: function)


def nnx_scan_of_remat(nnx):
    def wrap(function):
        return nnx.remat(function)

    return nnx_stack(nnx, wrap)


def nnx_jit_and_remat(nnx):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            for block in self.blocks:
                run = nnx.jit(nnx.remat(lambda block, x: jnp.tanh(block(x))))
                x = run(block, x)
            return x

    return of_nnx(nnx, Model(nnx.Rngs(0)))


def nnx_dropout_and_batch_norm(nnx):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(WIDTH, INNER, rngs=rngs),
        nnx.BatchNorm(INNER, use_running_average=False, rngs=rngs),
        nnx.Dropout(0.5, rngs=rngs),
        nnx.Linear(INNER, WIDTH, rngs=rngs),
    )
    return of_nnx(nnx, model)


NNX = [
    nnx_linear,
    nnx_bfloat16,
    nnx_linear_general,
    nnx_attention,
    nnx_convolution,
    nnx_tied_head,
    nnx_scan,
    nnx_scan_of_remat,
    nnx_jit_and_remat,
    nnx_dropout_and_batch_norm,
]


@pytest.mark.slow
@pytest.mark.parametrize("make", NNX)
def test_of_flax_nnx(nnx, make):
    losses.check(make(nnx))


@pytest.mark.slow
def test_an_nnx_optimizer_takes_sketches(nnx):
    """Where one writes `nnx.value_and_grad`, three lines split the model instead."""

    def train(sketched):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(
            nnx.Linear(WIDTH, INNER, rngs=rngs), nnx.relu, nnx.Linear(INNER, WIDTH, rngs=rngs)
        )
        tx = florax.flora_accumulate(optax.adam(0.1), 2, losses.RANK)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            graph, params, rest = nnx.split(model, nnx.Param, ...)

            def loss_fn(params, x):
                return losses.size(nnx.merge(graph, params, rest)(x) - 1)

            if sketched:
                loss, grads = florax.value_and_grad(loss_fn, tx)(
                    params, x, opt_state=nnx.as_pure(optimizer.opt_state)
                )
            else:
                loss, grads = jax.value_and_grad(loss_fn)(params, x)
            optimizer.update(model, grads)
            return loss, grads

        results = [step(model, optimizer, losses.tokens(2)) for _ in range(4)]
        found = sum(losses.is_sketch(g) for g in losses.flat(results[0][1]))
        return [float(loss) for loss, _ in results], found

    sketched, count = train(sketched=True)
    dense, none = train(sketched=False)
    assert (count, none) == (2, 0)
    assert sketched[-1] < sketched[0]
    np.testing.assert_allclose(sketched, dense, rtol=1e-4)


# --- flax.linen


@pytest.fixture(scope="module")
def linen():
    return pytest.importorskip("flax.linen", reason="flax comes with the extra `examples`")


def of_linen(model, axes=(), dense=()):
    x = losses.tokens(2)
    params = jax.jit(model.init)(jax.random.key(0), x)

    def loss(params, x):
        return losses.size(model.apply(params, x))

    return Case(loss, params, (x,), dict(dense), dict(axes))


def linen_dense(linen):
    return of_linen(linen.Sequential([linen.Dense(INNER), linen.relu, linen.Dense(WIDTH)]))


def linen_attention(linen):
    return of_linen(linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=14), KERNEL_AXES)


def linen_tied_head(linen):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            head = linen.Embed(17, WIDTH)
            return head.attend(jnp.tanh(linen.Dense(WIDTH)(x)))

    return of_linen(Model())


def linen_scan(linen, wrap=lambda block: block):
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return x + linen.Dense(WIDTH)(jnp.tanh(linen.Dense(INNER)(x))), None

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            stack = linen.scan(
                wrap(Block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=LAYERS,
            )
            return stack()(x, None)[0]

    return of_linen(Model(), {"bias": None})


def linen_scan_of_remat(linen):
    return linen_scan(linen, functools.partial(linen.remat, prevent_cse=False))


LINEN = [
    pytest.param(linen_attention, marks=pytest.mark.slow),
    pytest.param(linen_tied_head, marks=pytest.mark.slow),
    pytest.param(linen_scan_of_remat, marks=pytest.mark.slow),
    linen_dense,
    pytest.param(linen_scan, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("make", LINEN)
def test_of_flax_linen(linen, make):
    losses.check(make(linen))


# --- equinox


@pytest.fixture(scope="module")
def eqx():
    return pytest.importorskip("equinox", reason="equinox comes with the extra `test`")


def of_equinox(eqx, model, apply):
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x):
        return losses.size(apply(eqx.combine(params, static), x))

    return Case(loss, params, (losses.tokens(2),))


def equinox_perceptron(eqx):
    model = eqx.nn.MLP(WIDTH, WIDTH, INNER, depth=2, key=jax.random.key(0))
    return of_equinox(eqx, model, lambda model, x: jax.vmap(jax.vmap(model))(x))


def equinox_attention(eqx):
    model = eqx.nn.MultiheadAttention(1, WIDTH, qk_size=INNER, vo_size=INNER, key=jax.random.key(0))
    return of_equinox(eqx, model, lambda model, x: jax.vmap(lambda x: model(x, x, x))(x))


def equinox_checkpoint(eqx):
    model = eqx.nn.MLP(WIDTH, WIDTH, INNER, depth=1, key=jax.random.key(0))
    return of_equinox(
        eqx, model, lambda model, x: jax.vmap(jax.vmap(eqx.filter_checkpoint(model)))(x)
    )


def equinox_scan(eqx):
    keys = jax.random.split(jax.random.key(0), LAYERS)
    make = eqx.filter_vmap(lambda key: eqx.nn.MLP(WIDTH, WIDTH, INNER, depth=1, key=key))

    def apply(stack, x):
        layers, static = eqx.partition(stack, eqx.is_array)

        def layer(x, layer):
            return x + jax.vmap(jax.vmap(eqx.combine(layer, static)))(x), None

        return jax.lax.scan(layer, x, layers)[0]

    return of_equinox(eqx, make(keys), apply)


EQUINOX = [equinox_attention, equinox_checkpoint, equinox_scan, equinox_perceptron]


@pytest.mark.slow
@pytest.mark.parametrize("make", EQUINOX)
def test_of_equinox(eqx, make):
    losses.check(make(eqx))
