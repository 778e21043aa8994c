"""What is compared for quality: a base optimizer, and how accumulator and momentum are kept.

A variant is named `[base/]accumulator[+momentum]`. The accumulator is one of

    none            none: an update for every micro-batch, as many examples as the others have
    none-updates    none: an update for the first of the micro-batches, as many updates
    float32         of full size; also bfloat16, int8, int4 and int2
    64-paper        FLORA as published: Gaussian sketches of rank 64, of one side, in float32
    64-int8         cosine sketches of one side, in this dtype
    64-both-int8    cosine sketches of both sides, in the bytes of those

and the momentum one of `float32`, `64-paper` and `64-int8`, which has its residual. The base is
Adafactor; or

    unfactored      Adafactor with second moments of full size
    lora-8          Adafactor; adapters of rank 8 in the place of the matrices; also
                    unfactored-lora-8
    adamw           AdamW; it and those below have a momentum of their own
    galore-64       `optax.contrib.galore` with Adam
    apollo-64       APOLLO, and with `apollo-mini` APOLLO-Mini
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import florax
from florax_benchmarks import baselines, steps

DECAY = 0.9  # of all momenta
BUFFER = re.compile(r"(?:(\d+)-(?:(both)-)?)?(float32|bfloat16|int8|int4|int2)|(\d+)-(paper)")
BASE = re.compile(r"(unfactored|adamw|apollo-mini)|(galore|apollo|lora|unfactored-lora)-(\d+)")


class Buffer(NamedTuple):
    """How an accumulator or a momentum is kept."""

    rank: int | None  # None for full size
    kind: str  # "full", "paper", "smaller" or "both"
    dtype: str

    def arguments(self) -> dict[str, Any]:
        """Those of `flora_accumulate` and `flora_momentum` alike."""
        if self.kind == "paper":
            return {"projection": "gaussian", "accumulator_dtype": None}
        return {"projection": "cosine", "accumulator_dtype": jnp.dtype(self.dtype)}


class Variant(NamedTuple):
    base: str
    base_rank: int | None
    accumulator: Buffer | None  # None for none
    momentum: Buffer | None
    few_examples: bool  # without accumulator: as many updates as with one, not as many examples


def parse(name: str) -> Variant:
    """The variant of this name.

    Raises:
      ValueError: it is none; it says what is.
    """
    base, _, buffers = name.rpartition("/")
    accumulator, _, momentum = buffers.partition("+")
    found = BASE.fullmatch(base)
    if base and not found:
        raise ValueError(
            "a base is unfactored, adamw, galore-64, apollo-64, apollo-mini or lora-8, "
            f"got {base!r} in {name!r}"
        )
    plain, ranked, rank = found.groups() if found else ("adafactor", None, None)
    variant = Variant(
        plain or ranked,
        int(rank) if rank else None,
        None if accumulator in ("none", "none-updates") else _buffer(accumulator, name),
        _buffer(momentum, name) if momentum else None,
        accumulator == "none-updates",
    )
    if variant.momentum and variant.momentum.kind == "both":
        raise ValueError(f"a momentum has sketches of one side, got {name!r}")
    if variant.momentum and variant.momentum.rank is None and momentum != "float32":
        raise ValueError(f"a momentum of full size is in float32, got {name!r}")
    if variant.momentum and not has_momentum(variant.base):
        raise ValueError(f"{variant.base} has a momentum of its own, got {name!r}")
    return variant


def has_momentum(base: str) -> bool:
    """Whether a momentum follows this base."""
    return base in ("adafactor", "unfactored", "lora", "unfactored-lora")


def has_adapters(base: str) -> bool:
    """Whether low-rank adapters are trained in the place of matrices."""
    return base.endswith("lora")


def _buffer(text: str, name: str) -> Buffer:
    found = BUFFER.fullmatch(text)
    if not found:
        raise ValueError(
            "an accumulator or a momentum is float32, bfloat16, int8, int4, int2, 64-paper, or a "
            f"rank and a dtype as in 64-int8 or 64-both-int8, got {text!r} in {name!r}"
        )
    rank, both, dtype, paper_rank, paper = found.groups()
    if paper:
        return Buffer(int(paper_rank), "paper", "float32")
    return Buffer(int(rank), both or "smaller", dtype) if rank else Buffer(None, "full", dtype)


def optimizer(
    v: Variant,
    learning_rate: Callable[[Any], Any],
    matrices: Callable[[Any, Any], bool],
    is_stacked: Callable[[Any, Any], bool],
    resample_every: int,
    key: Any,
) -> optax.GradientTransformation:
    """What turns finished gradients into updates: all but the accumulator.

    Args:
      v: the variant.
      learning_rate: a schedule.
      matrices: which leaves are compressed, by path and leaf.
      is_stacked: which are stacks of layers.
      resample_every: updates that share a projection.
      key: of the projections.
    """
    stacks = functools.partial(florax.per_layer, stacked=is_stacked)
    if v.base == "adamw":
        return stacks(optax.adamw(learning_rate))
    if v.base == "galore":
        return stacks(baselines.galore(learning_rate, v.base_rank, matrices))
    if v.base.startswith("apollo"):
        return baselines.apollo(learning_rate, v.base_rank, matrices, key)
    base = optax.adafactor(
        learning_rate,
        factored=not v.base.startswith("unfactored"),
        min_dim_size_to_factor=64,
        multiply_by_parameter_scale=False,
    )
    if v.momentum is None:
        return stacks(base)
    if v.momentum.rank is None:
        return stacks(optax.chain(base, optax.ema(DECAY, debias=False)))
    momentum = florax.flora_momentum(
        _ranks(v.momentum, matrices),
        DECAY,
        resample_every,
        residual=v.momentum.kind != "paper",
        key=key,
        **v.momentum.arguments(),
    )
    return stacks(optax.chain(base, momentum))


def accumulating(
    v: Variant,
    loss: steps.Loss,
    opt: optax.GradientTransformation,
    accumulate: int,
    matrices: Callable[[Any, Any], bool],
    key: Any,
    dense: bool = False,
) -> tuple[optax.GradientTransformation, steps.Step]:
    """The optimizer with the variant's accumulator, and a step of some micro-batches.

    Args:
      v: the variant.
      loss: of what is trained, and a micro-batch.
      opt: for the finished gradients.
      accumulate: micro-batches of a step; without an accumulator a step takes one.
      matrices: which leaves are compressed.
      key: of the projections.
      dense: sketches are made of full-size gradients, as in the paper, and not born as such.
    """
    if v.accumulator is None:
        return opt, steps.one_by_one(loss, opt)
    if v.accumulator.kind == "full" and v.accumulator.dtype == "float32":
        return opt, steps.full_size(loss, opt)
    tx = florax.flora_accumulate(
        opt,
        accumulate,
        _ranks(v.accumulator, matrices),
        side="both" if v.accumulator.kind == "both" else "smaller",
        key=key,
        **v.accumulator.arguments(),
    )
    return tx, steps.dense(loss, tx) if dense else florax.value_and_update(loss, tx)


def _ranks(buffer: Buffer, matrices: Callable[[Any, Any], bool]) -> Callable[..., int | None]:
    return lambda path, leaf: buffer.rank if matrices(path, leaf) else None
