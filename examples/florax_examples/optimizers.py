"""From settings to an optimizer and its step, for every method: what the scripts compare.

The base optimizer is the same for all. Momentum follows it, as in `optax.adafactor(momentum=)`;
accumulation wraps both, so that they run once an update.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array

import florax
from florax_examples.models import layers
from florax_examples.settings import Training

FLORA = ("flora", "paper")  # the methods that sketch
# FLORA as it was published.
PAPER = {
    "projection": "gaussian",
    "residual": False,
    "accumulator": "sketch",
    "accumulator_dtype": "float32",
    "momentum_dtype": "float32",
}

Loss: TypeAlias = Callable[[Any, Any], Array]  # of parameters and a batch
Step: TypeAlias = Callable[[Any, Any, Any], tuple[Array, Any, Any]]


def make(settings: Training, method: str, peak: float) -> optax.GradientTransformation:
    """The transformation for `method`; its learning rate rises to `peak` and falls again."""
    s = dataclasses.replace(settings, **PAPER) if method == "paper" else settings
    base = _base(s, method, peak)
    if method == "none":
        return _per_layer(s, base)

    if method in FLORA:
        kind = {"projection": s.projection, "key": s.seed}
        if s.momentum:
            momentum = florax.flora_momentum(
                rank_of(s),
                s.momentum,
                s.resample_every,
                residual=s.residual,
                accumulator_dtype=_dtype(s.momentum_dtype),
                **kind,
            )
            base = optax.chain(base, momentum)
        base = _per_layer(s, base)
        if s.accumulate == 1:
            return base
        return florax.flora_accumulate(
            base,
            s.accumulate,
            rank=rank_of(s) if s.accumulator != "full" else lambda path, leaf: None,
            side="both" if s.accumulator == "both" else "smaller",
            accumulator_dtype=_dtype(s.accumulator_dtype),
            **kind,
        )

    if s.momentum and s.optimizer != "adamw":  # which has its own
        base = optax.chain(base, optax.ema(s.momentum, debias=False))
    base = _per_layer(s, base)
    if s.accumulate == 1:
        return base
    return optax.MultiSteps(base, s.accumulate).gradient_transformation()


def is_whole_update(settings: Training, method: str) -> bool:
    """Whether a step is a whole update: gradients that are born as sketches are summed as such."""
    return method in FLORA and settings.accumulate > 1 and settings.gradients == "sketched"


def step(s: Training, method: str, tx: optax.GradientTransformation, loss: Loss) -> Step:
    """The step `(params, state, batch) -> (loss, params, state)`.

    If `is_whole_update`, the batch has a leading axis of micro-batches.
    """
    if s.layerwise or is_whole_update(s, method):
        return florax.value_and_update(loss, tx, layerwise=s.layerwise)

    def ordinary(params: Any, state: Any, batch: Any) -> tuple[Array, Any, Any]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    return ordinary


def compresses_anything(settings: Training, params: Any) -> bool:
    """Whether FLORA, at this rank, has anything to do."""
    rows = florax.state_report(make(settings, "flora", 1.0), params).rows
    is_sketched = any(row.rank is not None for row in rows)
    return not rows or is_sketched or settings.accumulator == "full"


def accumulator(state: Any) -> tuple[Any, Any]:
    """The accumulated gradients of an optimizer's state, and the rest of it."""
    if isinstance(state, optax.MultiStepsState):
        return state.acc_grads, state.inner_opt_state
    if isinstance(state, florax.FloraAccumulateState):
        return state.sketch, state.inner_opt_state
    return (), state


def rank_of(settings: Training) -> Any:
    """As in the paper: embeddings, heads, norms and biases stay as they are."""

    def rank(path: jax.tree_util.KeyPath, leaf: Any) -> int | None:
        chosen = florax.attention_and_feed_forward(path, leaf)
        return settings.rank if chosen else None

    return rank


def _dtype(name: str) -> Any:
    """Of an accumulator; None: what it has by itself, float32 or the weights' own."""
    return None if name == "float32" else jnp.dtype(name)


def _base(s: Training, method: str, peak: float) -> optax.GradientTransformation:
    # Without accumulation every micro-batch makes an update.
    updates = s.updates * (s.accumulate if method == "none" else 1)
    learning_rate = _schedule(s, updates, peak)
    if s.optimizer != "adamw":
        return optax.adafactor(
            learning_rate,
            factored=s.optimizer == "adafactor",
            multiply_by_parameter_scale=s.parameter_scale,
        )
    if method in ("naive", "lora"):
        return optax.adamw(learning_rate, b1=s.momentum, weight_decay=s.weight_decay)
    # AdamW without its first moment, which would be another buffer of full size.
    return optax.chain(
        optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(s.weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _schedule(s: Training, count: int, peak: float) -> optax.Schedule:
    warmup = round(s.warmup * count)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, count - warmup),
        "cosine": optax.cosine_decay_schedule(peak, count - warmup),
    }[s.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def _per_layer(s: Training, opt: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let layers that are stacked be what they are apart: blocks of their own to the optimizer."""
    if not s.scan:
        return opt
    return florax.per_layer(opt, lambda path, leaf: layers.is_in_stack(path))
