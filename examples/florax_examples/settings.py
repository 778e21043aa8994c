"""The settings that the training scripts share: which method, which optimizer, how long."""

import contextlib
import dataclasses
import errno
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from florax_examples import devices
from florax_examples.datasets import DataError
from florax_examples.models.checkpoints import CheckpointError
from florax_examples.tokenization import TokenizerError


@dataclasses.dataclass(frozen=True)
class Training:
    """A script's own `Settings` adds its data and its defaults; comments are the help of a flag."""

    # how to keep what one micro-batch leaves for the next: not at all (none), as an accumulator and
    # momentum of full size (naive), the same of low-rank adapters in the place of attention and
    # feed-forward layers (lora), as random sketches of those layers (flora), or as such sketches as
    # they were published (paper): of one side, Gaussian, in float32, without residual; all trains
    # by none, naive, paper and flora in turn and compares them
    method: Literal["none", "naive", "lora", "paper", "flora", "all"] = "flora"
    data: str = ""  # a folder, or a data set of the Hugging Face hub
    output: Path = Path("runs")  # folder for results.json, loss.png, weights and logs
    # go on from the last checkpoint in the output folder: to the same bits (on a GPU with
    # XLA_FLAGS=--xla_gpu_deterministic_ops=true), and on another mesh but for rounding
    resume: bool = False
    seed: int = 0  # of new weights, the order of the data and the projections

    # The model.

    model: str = "tiny"  # a preset, a folder with config.json, or a name on the hub
    pretrained: bool = True  # load the model's weights, if it has any; or only its shape
    tokenizer: str = ""  # a folder or a name on the hub; "": the model's own, or one trained here
    scan: bool = False  # stack the layers and scan over them: compiles once for all
    checkpoint_activations: bool = False  # keep only what enters a layer, compute the rest again
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights

    # The optimizer.

    # of every method, which adds their momentum and accumulator to it
    optimizer: Literal["adafactor", "adafactor-unfactored", "adamw"] = "adafactor"
    updates: int = 1000  # of the optimizer; none makes as many of every micro-batch
    micro_batch: int = 16  # examples of a micro-batch, whose activations exist at once
    accumulate: int = 1  # micro-batches an update
    momentum: float = 0.9  # its decay; 0: no momentum
    learning_rate: float | None = None  # at its peak; None: the script's own, per method
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # of the rate, after the warm-up
    warmup: float = 0.05  # share of the updates in which the learning rate rises, 0 to 1
    parameter_scale: bool = False  # Adafactor's updates in proportion to each weight's size
    weight_decay: float = 0.0  # of AdamW, times the learning rate

    # FLORA, and of LoRA its rank.

    rank: int = 32  # of the sketches, or of the adapters
    resample_every: int = 1000  # updates that share a projection of the momentum
    projection: Literal["cosine", "gaussian"] = "cosine"  # with orthonormal rows, or the paper's
    residual: bool = True  # pass on without momentum what a sketch misses of a gradient
    # of those layers: a sketch of one side, sketches of both in the same bytes, or their own size
    accumulator: Literal["sketch", "both", "full"] = "both"
    # of the accumulator, embeddings and all: float32, or integers with scales
    accumulator_dtype: Literal["float32", "int8", "int4", "int2"] = "int4"
    momentum_dtype: Literal["float32", "int8", "int4"] = "int8"  # the same of the momentum
    freeze_a: bool = False  # of the adapters train B only: the paper's LoRA(B)
    # whether gradients are born as sketches, or compressed once they exist
    gradients: Literal["sketched", "dense"] = "sketched"
    layerwise: bool = False  # update a layer at a time, in the backward pass; needs --scan

    # The run.

    # devices: micro-batches are divided along both axes of data=2,model=1, weights along model
    mesh: str = ""
    # one of several processes, whose devices the mesh is of: jax.distributed finds the others, or
    # JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say
    distributed: bool = False
    evaluations: int = 10  # times that the validation loss is taken; the best weights are kept
    heldout_batch: int = 64  # validation or test examples at once
    save_every: int = 0  # micro-batches between checkpoints; 0: only when interrupted

    def __post_init__(self):
        check_at_least_one(
            self,
            *("updates", "micro_batch", "accumulate", "rank", "resample_every"),
            *("evaluations", "heldout_batch"),
        )
        for name in ("seed", "save_every", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("warmup", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.learning_rate is not None:
            check_positive(self, "learning_rate")
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(
                f"weight_decay={self.weight_decay} is AdamW's: add --optimizer adamw, or leave it 0"
            )
        if self.parameter_scale and self.optimizer == "adamw":
            raise ValueError("parameter_scale is Adafactor's, got optimizer=adamw")
        if self.freeze_a and self.method != "lora":
            raise ValueError(f"freeze_a is LoRA's, got method={self.method}: add --method lora")
        if self.method in ("flora", "all"):
            self._check_sketches()
        if self.layerwise:
            self._check_layerwise()
        if self.mesh:
            count = math.prod(devices.parse(self.mesh).values())
            if self.micro_batch % count:
                raise ValueError(
                    f"micro_batch={self.micro_batch} cannot be divided among {count} devices, "
                    f"those of mesh={self.mesh}"
                )

    def _check_sketches(self) -> None:
        if self.accumulator == "both" and self.rank < 3 and self.accumulate > 1:
            raise ValueError(
                f"accumulator=both has two sketches, got rank={self.rank}: add --rank 3 or more, "
                "or --accumulator sketch"
            )
        if self.projection != "gaussian":
            return
        if self.residual:
            raise ValueError(
                "residual needs orthonormal rows, got projection=gaussian: add --no-residual, or "
                "--projection cosine"
            )
        if self.accumulator == "both":
            raise ValueError(
                "accumulator=both needs orthonormal rows, got projection=gaussian: add "
                "--accumulator sketch, or --projection cosine"
            )

    def _check_layerwise(self) -> None:
        if not self.scan:
            raise ValueError("layerwise finds the layers in their scan: add --scan")
        if self.method == "lora":
            raise ValueError("layerwise is for full weights, got method=lora")
        if self.method in ("naive", "all") and self.accumulate > 1:
            raise ValueError(
                f"layerwise never has all gradients, which method={self.method} accumulates at "
                "full size: choose --method none or flora, or --accumulate 1"
            )
        if self.gradients == "dense" and self.accumulate > 1:
            raise ValueError("layerwise needs gradients=sketched, got gradients=dense")

    def methods(self) -> tuple[str, ...]:
        return ("none", "naive", "paper", "flora") if self.method == "all" else (self.method,)


def check_at_least_one(settings: Any, *names: str) -> None:
    """Refuse settings below one; None, which means no limit, is none."""
    for name in names:
        if (value := getattr(settings, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_positive(settings: Any, name: str) -> None:
    if not getattr(settings, name) > 0:  # nor NaN
        raise ValueError(f"{name} must be positive, got {getattr(settings, name)}")


def spread(count: int, total: int) -> set[int]:
    """After which of `total` steps to evaluate, `count` times: evenly, and at the end."""
    return {round(total * i / count) for i in range(1, count + 1)}


S = TypeVar("S")


def run(main: Callable[[S], None], settings: type[S], description: str | None) -> None:
    """Run a script: what a user did wrong ends it with one sentence, not with a trace."""
    chosen = parse(settings, description)
    shown = _join() if getattr(chosen, "distributed", False) else contextlib.nullcontext()
    try:
        with shown:
            main(chosen)
    except (CheckpointError, DataError, TokenizerError) as mistake:
        sys.exit(f"error: {mistake}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"error: {error}")  # the disk is full
    except KeyboardInterrupt:
        sys.exit("interrupted")


def _join() -> contextlib.AbstractContextManager[Any]:
    """Join the other processes; within what comes back only the first prints, but for errors."""
    try:
        devices.join()
    except (ValueError, RuntimeError) as mistake:
        reason = str(mistake).partition("\n")[0]
        sys.exit(f"error: distributed=True found no other processes: {reason}")
    return contextlib.nullcontext() if devices.is_first() else contextlib.redirect_stdout(None)


def parse(settings: type[S], description: str | None, args: Sequence[str] | None = None) -> S:
    """The settings from the command line; a mistake ends the script with one sentence."""
    try:
        return tyro.cli(settings, description=description, args=args)
    except ValueError as mistake:  # new versions of tyro report it themselves
        sys.exit(f"error: {mistake}")
