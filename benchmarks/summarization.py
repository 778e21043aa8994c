"""What do small accumulators and momentum cost in ROUGE, fine-tuning a published model?

`examples/llama.py` on abstracts and their one-sentence summaries, one abstract a micro-batch, in
one variant after the other; the model is converted by `examples/convert_gguf.py`.

    python benchmarks/summarization.py --model smollm2 --variants naive 144-both-int4 --seeds 0 1

`naive` keeps accumulator and momentum at full size in float32. The others have a rank, that of
their momentum too, which is with `residual`, and a dtype of their accumulator: `144-both-int4` has
sketches of both sides in 4 bits.
"""

import dataclasses
import functools
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import frontier
from florax_benchmarks import results, tables

sys.path.append(str(results.REPOSITORY / "examples"))
import llama

TEMPLATE = (
    "<|im_start|>user\nSummarize this abstract in one sentence.\n\n{source}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    model: str  # folder of a model that was tuned to follow instructions, as SmolLM2-135M-Instruct
    variants: tuple[str, ...] = ("naive", "144-both-int4")  # to compare
    seeds: tuple[int, ...] = (0, 1)  # of the order of the data and projections
    momentum_dtype: Literal["float32", "int8", "int4"] = "int4"  # of all but naive
    updates: int = 248  # of the optimizer; two epochs
    accumulate: int = 16  # micro-batches of one abstract an update
    learning_rate: float = 2e-4  # at its peak
    heldout_texts: int = 300  # abstracts of validation, and of test
    results: Path = results.FOLDER  # folder for the JSON; what it has is not measured again

    def __post_init__(self):
        for variant in self.variants:
            parsed = None if variant == "naive" else frontier.parse(variant)
            if variant != "naive" and (parsed is None or parsed.rank is None):
                raise ValueError(
                    f"variants are naive, or a rank and a dtype as 144-both-int4, got {variant}"
                )

    def identity(self) -> dict[str, Any]:
        """What is the same for all variants and seeds, and identifies a row."""
        names = ("updates", "accumulate", "learning_rate", "heldout_texts")
        own = {name: getattr(self, name) for name in names}
        return {"model": Path(self.model).name, **own}


def measure(s: Settings, variant: str, seed: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"method": "naive"}
    if variant != "naive":
        parsed = frontier.parse(variant)
        momentum = {"momentum_dtype": s.momentum_dtype, "rank": parsed.rank}
        arguments = parsed.settings() | momentum
    with tempfile.TemporaryDirectory() as folder:
        comparison = llama.train(
            llama.Settings(
                model=s.model,
                data=str(results.REPOSITORY / "examples/data/scitldr"),
                output=Path(folder),
                seed=seed,
                updates=s.updates,
                micro_batch=1,
                accumulate=s.accumulate,
                learning_rate=s.learning_rate,
                heldout_texts=s.heldout_texts,
                length=384,
                new_tokens=56,
                evaluations=4,
                template=TEMPLATE,
                scan=True,
                checkpoint_activations=True,
                **arguments,
            )
        )
    (run,) = comparison.runs
    bytes_of = ("accumulator_bytes", "optimizer_bytes", "parameter_bytes")
    scores = ("test_loss", "rouge1", "rouge2", "rougeL", "rougeL_before")
    return {name: run[name] for name in (*bytes_of, *scores)}


def main(s: Settings) -> None:
    rows = []
    for variant, seed in itertools.product(s.variants, s.seeds):
        isolated = functools.partial(results.isolated, measure, s, variant, seed)
        momentum = "float32" if variant == "naive" else s.momentum_dtype
        settings = s.identity() | {"variant": f"{variant}, momentum {momentum}", "seed": seed}
        rows.append(results.get(s.results, "summarization", settings, isolated))
    print(f"{Path(s.model).name} on SciTLDR, ×{s.accumulate}:\n{tables.summarization(rows)}")


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))
