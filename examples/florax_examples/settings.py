"""The settings that the training scripts share: which method, which optimizer, how long."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import tyro

from florax_examples.datasets import DataError
from florax_examples.models.checkpoints import CheckpointError
from florax_examples.tokenization import TokenizerError

AT_LEAST_ONE = (
    "updates",
    "micro_batch",
    "accumulate",
    "rank",
    "resample_every",
    "evaluations",
    "heldout_batch",
)


@dataclasses.dataclass(frozen=True)
class Training:
    """A script's own `Settings` adds its data and its defaults.

    An update learns from `accumulate` micro-batches of `micro_batch` examples. What happens between
    them, and to the momentum, is the method's business:

      none   an update per micro-batch and no momentum: the floor of memory
      naive  accumulator and momentum of full size
      lora   as naive, but low-rank adapters are trained in the place of attention and feed-forward
             layers; all other layers are trained as ever
      flora  accumulator and momentum of attention and feed-forward layers are random sketches
      all    none, naive and flora, one after the other on the same data, and a table of the three
    """

    method: Literal["none", "naive", "lora", "flora", "all"] = "flora"
    data: str = ""  # a folder, or a data set of the Hugging Face hub
    output: Path = Path("runs")  # a folder a method: checkpoints, logs, curves, results.json
    resume: bool = False  # go on from the last checkpoint in `output`, to the same bits
    seed: int = 0  # of new weights, the order of the data and the projections

    # The model.
    model: str = "tiny"  # a preset, a folder with config.json, or a name on the hub
    pretrained: bool = True  # with its weights, if it has any; or only of its shape
    tokenizer: str = ""  # a folder; "": the model's own, or else one trained on the data
    scan: bool = False  # over stacked layers: compiles once for all of them
    checkpoint_activations: bool = False  # keep only what enters a layer, compute the rest again
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights

    # The optimizer.
    optimizer: Literal["adafactor", "adafactor-unfactored", "adamw"] = "adafactor"
    updates: int = 1000  # of all methods but `none`, which makes `accumulate` times as many
    micro_batch: int = 16  # examples whose activations exist at once
    accumulate: int = 1  # micro-batches an update
    momentum: float = 0.9  # its decay; 0 is no momentum
    learning_rate: float | None = None  # at its peak; None: the script's own, per method
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # after the warm-up
    warmup: float = 0.05  # share of the updates
    parameter_scale: bool = False  # Adafactor's updates in proportion to each weight's size
    weight_decay: float = 0.0  # of AdamW, times the learning rate

    # FLORA, and of LoRA its rank.
    rank: int = 32
    resample_every: int = 1000  # updates that share a projection of the momentum
    projection: Literal["cosine", "gaussian"] = "cosine"  # orthonormal rows, or the paper's
    residual: bool = True  # what a sketch misses of a gradient is passed on without momentum
    freeze_a: bool = False  # LoRA(B): of the adapters only B is trained
    gradients: Literal["sketched", "dense"] = "sketched"  # born compressed, or once they exist
    layerwise: bool = False  # a layer at a time, in the backward pass; needs `scan`

    # The run.
    evaluations: int = 10  # of the validation loss; the best weights are kept
    heldout_batch: int = 64  # held-out examples at once
    save_every: int = 0  # micro-batches between checkpoints; 0: only when interrupted

    def __post_init__(self):
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "save_every", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("warmup", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(
                f"weight_decay={self.weight_decay} is AdamW's: add --optimizer adamw, or leave it 0"
            )
        if self.parameter_scale and self.optimizer == "adamw":
            raise ValueError("parameter_scale is Adafactor's, got optimizer=adamw")
        if self.freeze_a and self.method != "lora":
            raise ValueError(f"freeze_a is LoRA's, got method={self.method}: add --method lora")
        if self.residual and self.projection == "gaussian" and self.method in ("flora", "all"):
            raise ValueError(
                "residual needs orthonormal rows, got projection=gaussian: add --no-residual, or "
                "--projection cosine"
            )
        if self.layerwise:
            self._check_layerwise()

    def _check_layerwise(self) -> None:
        if not self.scan:
            raise ValueError("layerwise finds the layers in their scan: add --scan")
        if self.method == "lora":
            raise ValueError("layerwise is for full weights, got method=lora")
        accumulates = self.method in ("naive", "all") and self.accumulate > 1
        if accumulates:
            raise ValueError(
                f"layerwise never has all gradients, which method={self.method} accumulates at "
                "full size: choose --method none or flora, or --accumulate 1"
            )
        if self.gradients == "dense" and self.accumulate > 1:
            raise ValueError("layerwise needs gradients=sketched, got gradients=dense")

    def methods(self) -> tuple[str, ...]:
        return ("none", "naive", "flora") if self.method == "all" else (self.method,)


S = TypeVar("S")


def run(main: Callable[[S], None], settings: type[S], description: str | None) -> None:
    """Run a script: what a user did wrong ends it with one sentence, not with a trace."""
    chosen = parse(settings, description)
    try:
        main(chosen)
    except (CheckpointError, DataError, TokenizerError) as mistake:
        sys.exit(f"error: {mistake}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def parse(settings: type[S], description: str | None, args: Sequence[str] | None = None) -> S:
    """The settings from the command line; a mistake ends the script with one sentence."""
    try:
        return tyro.cli(settings, description=description, args=args)
    except ValueError as mistake:  # new versions of tyro report it themselves
        sys.exit(f"error: {mistake}")
