"""Fine-tune T5, or train a small one, to summarize: by FLORA, LoRA or with full buffers.

    python examples/t5.py                        # a small T5 from scratch: minutes on two cores
    python examples/t5.py --method all           # no buffers, full-size ones, FLORA: a table
    python examples/t5.py --model t5-small --data xsum    # T5 itself, with a hub connection
    python examples/t5.py --help

The encoder reads "summarize: [source]", the decoder writes the summary. What comes out: a few
held-out summaries, a table of memory, time and quality (ROUGE-1/2/L), and in the output folder the
best weights as a Hugging Face checkpoint, the loss curves and all figures.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array

from florax_examples import datasets, metrics, report, settings, training
from florax_examples.datasets import Pair
from florax_examples.loading import load_config, load_model, load_tokenizer
from florax_examples.losses import LOGITS, chunked_cross_entropy
from florax_examples.models import generation
from florax_examples.models.t5 import PRESETS, T5, T5Config, shift_right
from florax_examples.text import check_ids, generate, pad_right
from florax_examples.tokenization import Tokenizer

TINY = T5Config(
    vocab_size=4096,
    d_model=128,
    d_kv=32,
    d_ff=512,
    num_layers=2,
    num_heads=4,
    relative_attention_max_distance=64,
)
PREFIX = "summarize: "

# For `flora` that of the best ROUGE among 2, 4 and 8 times 1e-3, in the default run; the others
# have the same. That was of sketches of one side, in float32.
LEARNING_RATES = {"none": 2e-3, "naive": 2e-3, "lora": 2e-3, "paper": 2e-3, "flora": 2e-3}
SHOWN = 3  # summaries


@dataclasses.dataclass(frozen=True)
class Settings(settings.Training):
    data: str = str(datasets.FOLDER / "scitldr")  # folder with pairs, or xsum of the hub
    output: Path = Path("runs/t5")  # folder for results.json, loss.png, weights and logs
    source_length: int = 128  # tokens of a source; what is longer is cut off
    target_length: int = 40  # tokens of a summary, at most
    beams: int = 1  # of the search for a summary; 1 is greedy
    length_penalty: float = 1.0  # of that search; above 1 it favours longer summaries
    scored: int = 500  # test texts that are summarized, at most

    updates: int = 800  # of the optimizer; of the default data, 6.4 epochs
    micro_batch: int = 8  # examples of a micro-batch, whose activations exist at once
    accumulate: int = 2  # micro-batches an update
    rank: int = 64  # of the sketches or adapters; 64 is half of the tiny model's width
    resample_every: int = 100  # updates that share a projection of the momentum

    def __post_init__(self):
        super().__post_init__()
        settings.check_at_least_one(self, "source_length", "target_length", "beams", "scored")


# The data.


def encode(pairs: list[Pair], tokenizer: Tokenizer, s: Settings) -> dict[str, np.ndarray]:
    """Sources and targets with an end each, and how long they are."""
    sources = [encode_source(pair, tokenizer, s) for pair in pairs]
    targets = [
        [*tokenizer.encode(pair.target)[: s.target_length - 1], tokenizer.eos] for pair in pairs
    ]
    return {
        "source": pad_right(sources, s.source_length, tokenizer.pad),
        "source_length": np.array([len(row) for row in sources], np.int32),
        "target": pad_right(targets, s.target_length, tokenizer.pad),
        "target_length": np.array([len(row) for row in targets], np.int32),
    }


def encode_source(pair: Pair, tokenizer: Tokenizer, s: Settings) -> list[int]:
    return [*tokenizer.encode(PREFIX + pair.source)[: s.source_length - 1], tokenizer.eos]


# The loss.


def losses(model: T5, batch: dict[str, Array]) -> tuple[Array, Array]:
    """The loss of each target token, zero for padding, and which are none; (B, target_length)."""
    source, target = batch["source"], batch["target"]
    mask = jnp.arange(source.shape[1]) < batch["source_length"][:, None]
    counts = jnp.arange(target.shape[1]) < batch["target_length"][:, None]
    inputs = shift_right(target, model.config.decoder_start_token_id, model.config.pad_token_id)
    features, _ = model.decode_features(inputs, model.encode(source, mask), mask)
    token_losses = chunked_cross_entropy(model.logits, features, target, LOGITS)
    return jnp.where(counts, token_losses, 0.0), counts


# The summaries.


def write(
    model: T5,
    ids: Array,
    mask: Array,
    new_tokens: int,
    beams: int,
    eos: int,
    pad: int,
    length_penalty: float,
) -> Array:
    """A summary of each row of `ids`; (B, new_tokens)."""
    start = jnp.full((len(ids), 1), model.config.decoder_start_token_id, jnp.int32)
    cache = model.init_cache(len(ids), 1 + new_tokens, encoded=model.encode(ids, mask))
    decode = functools.partial(model.decode, encoded=None, encoder_mask=mask)
    search = dict(beams=beams, length_penalty=length_penalty, batch_axis=model.cache_batch_axis)
    everywhere = jnp.ones_like(start, bool)
    return generation.write(decode, cache, start, everywhere, new_tokens, eos, pad, **search)


def main(s: Settings) -> None:
    config = load_config(s, T5, PRESETS | {"tiny": TINY})
    pairs = {split: datasets.load_pairs(s.data, split) for split in datasets.SPLITS}

    def texts() -> Iterator[str]:
        for pair in pairs["train"]:
            yield from (PREFIX + pair.source, pair.target)

    tokenizer = load_tokenizer(s, texts, config.vocab_size)
    data = {split: encode(own, tokenizer, s) for split, own in pairs.items()}
    check_ids(config, (rows[part] for rows in data.values() for part in ("source", "target")))
    for split, rows in data.items():
        cut = np.mean(rows["source_length"] == s.source_length)
        print(f"{split}: {len(rows['source']):,} pairs, {cut:.0%} of the sources cut off")
    test = pairs["test"][: s.scored]
    prompts = [encode_source(pair, tokenizer, s) for pair in test]
    penalized = functools.partial(write, length_penalty=s.length_penalty)

    def evaluate(model: T5) -> tuple[dict[str, float], list[str]]:
        size = s.heldout_batch
        summaries = generate(
            model, tokenizer, prompts, s.target_length, s.beams, size, write=penalized
        )
        scores = metrics.rouge(summaries, [pair.references for pair in test])
        loss = training.heldout_loss(losses, model, data["test"], size)
        return {"test_loss": loss} | scores, summaries

    task = training.Task(
        losses=losses,
        train=data["train"],
        validation=data["validation"],
        unit="tokens",
        units=s.source_length + s.target_length,
        learning_rates=LEARNING_RATES,
        files=tokenizer.files,
    )
    runs, curves, written = training.compare(s, task, lambda: load_model(s, T5, config), evaluate)

    for i, pair in enumerate(test[:SHOWN]):
        summaries = {method: own[i] for method, own in written.items()}
        report.print_sample(f"{pair.source[:200]}...", {"expected": pair.target} | summaries)
    report.conclude(s, runs, curves, title="Summaries", unit="token", scores=metrics.ROUGE)


if __name__ == "__main__":
    settings.run(main, Settings, __doc__)
