"""The transformations that are held to Optax's contract, and what they are run on.

A test that takes `tx` is run for each of them. Projections are drawn anew, and cycles end, every
second call, so that a few calls meet every branch.
"""

import functools
from typing import Any, NamedTuple

import draws
import jax
import optax
import pytest

import florax


def stacked(path, leaf):
    """A leaf of three axes is a stack of matrices; one of two is a matrix as it is."""
    return florax.FloraDimensionNumbers(rows=1, columns=2, batch=0) if leaf.ndim == 3 else None


def is_stack(path, leaf):
    return leaf.ndim == 3


def has_matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def labels(params):
    return jax.tree.map(lambda leaf: "flora" if leaf.ndim > 1 else "adam", params)


# With a small eps Adam's update is a sign, which rounding in 16 bits may turn.
ADAM = optax.adam(0.1, b2=0.9, eps=0.1)
RANK = dict(rank=3, dimension_numbers=stacked)
MOMENTUM = dict(**RANK, resample_every=2)
ACCUMULATE = dict(**RANK, every_k_schedule=2)

TRANSFORMATIONS = {
    "momentum": florax.flora_momentum(**MOMENTUM),
    "momentum_gaussian_nesterov": florax.flora_momentum(
        **MOMENTUM, projection="gaussian", nesterov=True
    ),
    "accumulate_adafactor": florax.flora_accumulate(optax.adafactor(0.1), **ACCUMULATE),
    "accumulate_adam_cosine": florax.flora_accumulate(ADAM, **ACCUMULATE, projection="cosine"),
    "accumulate_both_sides": florax.flora_accumulate(
        optax.sgd(0.1), **ACCUMULATE, projection="cosine", side="both"
    ),
    "accumulate_sgd_sum": florax.flora_accumulate(
        optax.sgd(0.1), **ACCUMULATE, use_grad_mean=False, side="larger"
    ),
    "accumulate_adafactor_momentum": florax.flora_accumulate(
        optax.chain(optax.adafactor(0.1), florax.flora_momentum(**MOMENTUM)), **ACCUMULATE
    ),
    "flora": florax.flora(0.1, **MOMENTUM),
    "per_layer_adam": florax.per_layer(ADAM, is_stack),
    "per_layer_flora": florax.per_layer(florax.flora(0.1, 3, resample_every=2), is_stack),
    "accumulate_per_layer": florax.flora_accumulate(florax.per_layer(ADAM, is_stack), 2, rank=3),
    "per_layer_accumulate": florax.per_layer(
        florax.flora_accumulate(optax.sgd(0.1), 2, rank=3), is_stack
    ),
    "masked": optax.masked(florax.flora_momentum(**MOMENTUM), has_matrices),
    "partition": optax.partition(
        {"adam": ADAM, "flora": florax.flora_accumulate(optax.sgd(0.1), **ACCUMULATE)}, labels
    ),
}


# These stand for the others by day: each algorithm, and layers that are updated by themselves.
BY_DAY = ("momentum", "accumulate_per_layer")


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        params = [
            pytest.param(name, marks=() if name in BY_DAY else pytest.mark.slow)
            for name in TRANSFORMATIONS
        ]
        metafunc.parametrize("name", params, scope="module")


@pytest.fixture(scope="module")
def tx(name):
    return TRANSFORMATIONS[name]


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def gradients(params):
    """Of five calls: two cycles and a half."""
    gradients = make_gradients()
    return [{name: grads[name] for name in params} for grads in gradients]


@pytest.fixture(scope="module")
def run(name):
    return make_run(name)


@functools.cache
def make_params():
    """A dense leaf, a matrix and a stack of matrices whose projections are of one size."""
    shapes = {"bias": (8,), "kernel": (12, 8), "layers": (2, 8, 12)}
    return {name: draws.normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


@functools.cache
def make_gradients():
    return [draws.normal_like(seed, make_params()) for seed in range(1, 6)]


class Run(NamedTuple):
    """What a transformation does when it is called in a loop: every other way must do the same."""

    updates: list[Any]  # of each call
    states: list[Any]  # after each call
    traces: int


@functools.cache
def make_run(name):
    tx, params = TRANSFORMATIONS[name], make_params()
    traces = 0

    @jax.jit
    def update(grads, state, params):
        nonlocal traces
        traces += 1
        return tx.update(grads, state, params)

    updates, states = [], [tx.init(params)]
    for grads in make_gradients():
        new, state = update(grads, states[-1], params)
        updates.append(new)
        states.append(state)
    return Run(updates, states[1:], traces)
