"""What FLORA's paper proves, in numbers: LoRA projects gradients, and projections keep norms.

The paper writes y = (W + B A) x, the layers here y = x (W + A B): its A is `lora_a.T`.
"""

import functools
import math

import draws
import extras
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

extras.need("examples")

from flax import nnx

from florax import _projection
from florax_examples.models import lora

INPUTS, OUTPUTS, RANK, STEPS = 12, 10, 4, 30
EPSILON = 2.0**-24  # of float32's rounding


def is_matrix(path, leaf):
    return True


def train_adapters(learning_rate, freeze_a=False):
    """SGD on one layer: A before and after, B after, and the weight's gradients on the way, in the
    paper's orientation and in float64."""
    x = draws.normal(0, 16, INPUTS)
    target = draws.normal(1, 16, OUTPUTS)
    model = nnx.Sequential(nnx.Linear(INPUTS, OUTPUTS, use_bias=False, rngs=nnx.Rngs(0)))
    lora.add(model, RANK, rngs=nnx.Rngs(1), where=is_matrix)
    graphdef, params, frozen = nnx.split(model, lora.trained(freeze_a=freeze_a), ...)
    tx = optax.sgd(learning_rate)

    def loss_of_weight(w):
        return ((jnp.tanh(x @ w) - target) ** 2).mean()

    def loss(params):
        return ((jnp.tanh(nnx.merge(graphdef, params, frozen)(x)) - target) ** 2).mean()

    @jax.jit
    def step(params, state):
        (layer,) = lora.merge(nnx.merge(graphdef, params, frozen)).layers
        updates, state = tx.update(jax.grad(loss)(params), state)
        return (
            jax.grad(loss_of_weight)(layer.kernel[...]),
            optax.apply_updates(params, updates),
            state,
        )

    def matrices():
        (layer,) = nnx.merge(graphdef, params, frozen).layers
        return paper(layer.lora_a[...]), paper(layer.lora_b[...])

    def paper(x):
        return np.asarray(x, np.float64).T

    before, _ = matrices()
    state, gradients = tx.init(params), []
    for _ in range(STEPS):
        gradient, params, state = step(params, state)
        gradients.append(paper(gradient))
    return before, *matrices(), gradients


def dynamics(gradients, learning_rate):
    """f_A and f_B of Theorem 2.1 after every step, the first before any."""
    f_a, f_b = np.zeros((INPUTS, INPUTS)), np.zeros((OUTPUTS, INPUTS))
    yield f_a, f_b
    for g in gradients:
        f_a, f_b = (
            f_a - learning_rate * f_b.T @ g,
            f_b - g @ (learning_rate * f_a.T + np.eye(INPUTS)),
        )
        yield f_a, f_b


def spectral(x):
    return np.linalg.norm(x, 2)


def test_lora_moves_as_theorem_2_1_says():
    rate = 2.0
    before, a, b, gradients = train_adapters(rate)
    f_a, f_b = [*dynamics(gradients, rate)][-1]
    # A step rounds A, B and their gradients, sums of 16 and of 12 products, a few times each.
    rounding = 4 * (16 + 12) * EPSILON * STEPS
    np.testing.assert_allclose(
        a, before + rate * before @ f_a, atol=rounding * abs(a).max(), rtol=0
    )
    np.testing.assert_allclose(b, rate * f_b @ before.T, atol=rounding * abs(b).max(), rtol=0)
    assert spectral(a - before) > 0.1 * spectral(before)  # something did move


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1])
def test_what_moves_a_is_bounded_as_theorem_2_1_says(rate):
    *_, gradients = train_adapters(rate)
    partial = np.cumsum(gradients, axis=0)
    bound_of_sums = max(map(spectral, partial))
    ratio = (rate * bound_of_sums) ** 2
    assert ratio < 1  # else the bound says nothing
    for t, (f_a, _) in enumerate(dynamics(gradients, rate)):
        bound = rate * bound_of_sums**2 * (1 - ratio**t) / (1 - ratio)
        assert spectral(f_a) <= bound * (1 + 1e-12)


def test_a_hardly_moves_at_a_small_rate():
    """Observation 2.2: η f_A is of second order in η, what B adds to the weight of first order."""
    moved = []
    for rate in (0.002, 0.001):
        before, a, b, _ = train_adapters(rate)
        moved.append((spectral(a - before), spectral(b)))
    (a_full, b_full), (a_half, b_half) = moved
    # Gradients differ between the two runs by some η, so the ratios by some per cent.
    assert 3.8 < a_full / a_half < 4.2
    assert 1.9 < b_full / b_half < 2.1


def test_lora_with_a_frozen_is_a_random_projection_of_the_gradient():
    rate = 0.5
    before, a, b, gradients = train_adapters(rate, freeze_a=True)
    np.testing.assert_array_equal(a, before)
    projection = jnp.asarray(before)
    total = sum(_projection.compress(jnp.asarray(g, jnp.float32), projection) for g in gradients)
    moved = -rate * np.asarray(_projection.decompress(total, projection))
    rounding = 4 * (16 + 12) * EPSILON * STEPS
    np.testing.assert_allclose(b @ a, moved, atol=rounding * abs(moved).max(), rtol=0)


# Projections.


def draw_many(projection, count, rank, size):
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), count)
    draw = functools.partial(_projection.draw, projection, rank=rank, columns=(size,))
    a = jax.jit(jax.vmap(draw))(jax.random.key_data(keys))
    return a if projection == "gaussian" else math.sqrt(size / rank) * a


@pytest.mark.parametrize("projection", _projection.PROJECTIONS)
@pytest.mark.parametrize(
    "epsilon, delta", [(0.5, 0.1), pytest.param(0.25, 0.05, marks=pytest.mark.slow)]
)
def test_norms_are_kept_as_lemma_2_3_says(projection, epsilon, delta):
    """With c = 2, that of a Gaussian vector's norm: P(|‖A x‖/‖x‖ − 1| > ε) < 2 exp(−ε² r / 2)."""
    rank, size, count = math.ceil(2 / epsilon**2 * math.log(2 / delta)), 512, 500
    x = draws.normal(1, size)
    norms = jnp.linalg.norm(draw_many(projection, count, rank, size) @ x, axis=-1)
    outside = float((abs(norms / jnp.linalg.norm(x) - 1) > epsilon).mean())
    assert outside <= delta + 5 * math.sqrt(delta / count)  # five standard errors


@pytest.mark.parametrize("projection", _projection.PROJECTIONS)
def test_entries_of_the_reconstruction_err_as_theorem_2_4_says(projection):
    """Below ε with probability 1 − δ for r = c log(2m/δ)/ε²; its proof has c = 128, 8 is enough."""
    size, delta, count = 128, 0.1, 100
    for epsilon in (1.0, 0.75):
        rank = math.ceil(8 * math.log(2 * size / delta) / epsilon**2)
        outside = float((_errors(projection, count, rank, size) > epsilon).mean())
        assert rank < size and outside <= delta + 5 * math.sqrt(delta / count)


def test_errors_of_entries_fall_as_the_square_root_of_the_rank():
    size, ranks = 128, (16, 64, 256)
    scaled = [math.sqrt(r) * float(_errors("gaussian", 50, r, size).mean()) for r in ranks]
    # The largest of m² products is of heavier tails at small r: a tenth and more at r = 16.
    assert scaled == pytest.approx([scaled[-1]] * 3, rel=0.25)
    assert scaled[0] > scaled[1] > scaled[2]


def _errors(projection, count, rank, size):
    """The largest entry of Aᵀ A − I of each draw."""
    a = draw_many(projection, count, rank, size)
    return abs(jnp.einsum("cri,crj->cij", a, a) - jnp.eye(size)).max((1, 2))
