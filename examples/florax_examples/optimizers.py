"""From settings to an Optax transformation, for every method: what the scripts compare.

The base optimizer is the same for all. Momentum follows it, as in `optax.adafactor(momentum=)`;
accumulation wraps both, so that they run once an update.
"""

from typing import Any

import jax
import optax

import florax
from florax_examples.settings import Training


def make(settings: Training, method: str, peak: float) -> optax.GradientTransformation:
    """The transformation for `method`; its learning rate rises to `peak` and falls again."""
    s = settings
    base = _base(s, method, peak)
    if method == "none":
        return _per_layer(s, base)

    if method == "flora":
        kind = {"projection": s.projection, "key": s.seed}
        if s.momentum:
            momentum = florax.flora_momentum(
                rank_of(s), s.momentum, s.resample_every, residual=s.residual, **kind
            )
            base = optax.chain(base, momentum)
        base = _per_layer(s, base)
        if s.accumulate == 1:
            return base
        return florax.flora_accumulate(base, s.accumulate, rank_of(s), **kind)

    if s.momentum and s.optimizer != "adamw":  # which has its own
        base = optax.chain(base, optax.ema(s.momentum, debias=False))
    base = _per_layer(s, base)
    if s.accumulate == 1:
        return base
    return optax.MultiSteps(base, s.accumulate).gradient_transformation()


def rank_of(settings: Training) -> Any:
    """As in the paper: embeddings, heads, norms and biases stay as they are."""

    def rank(path: jax.tree_util.KeyPath, leaf: Any) -> int | None:
        chosen = florax.attention_and_feed_forward(path, leaf)
        return settings.rank if chosen else None

    return rank


def updates(settings: Training, method: str) -> int:
    """How many there are: `none` makes one of every micro-batch."""
    return settings.updates * (settings.accumulate if method == "none" else 1)


def _base(s: Training, method: str, peak: float) -> optax.GradientTransformation:
    learning_rate = _schedule(s, updates(s, method), peak)
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
    if not s.scan or s.layerwise:  # which does so by itself
        return opt
    return florax.per_layer(opt, lambda path, leaf: _is_stacked(path))


# What the models call their stacks of layers.
_STACKS = {"h", "layers", "block"}


def _is_stacked(path: jax.tree_util.KeyPath) -> bool:
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return not _STACKS.isdisjoint(names)
