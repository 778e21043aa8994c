r"""Train a small LLaMA, or fine-tune a published one: by FLORA, LoRA or with full buffers.

    python examples/llama.py                 # a small LLaMA from scratch: minutes on two cores
    python examples/llama.py --method all    # no buffers, full-size ones, FLORA: a table
    python examples/llama.py --model examples/data/stories260k    # on from published weights
    python examples/llama.py --model HuggingFaceTB/SmolLM2-135M --data examples/data/scitldr \
        --learning-rate 2e-4 --length 384
    python examples/llama.py --help

Texts are laid end to end and cut into rows of tokens, each of which is to be predicted from those
before it. Of pairs the model reads the source in a prompt, and the loss is that of the target.
What comes out: how held-out texts go on, a table of memory, time and quality (perplexity; of
pairs ROUGE-1/2/L, too), and in the output folder the best weights as a Hugging Face checkpoint,
the loss curves and all figures. Published weights are scored before training as well.
"""

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from florax_examples import datasets, devices, metrics, report, settings, training
from florax_examples.datasets import Pair
from florax_examples.loading import has_weights, load_config, load_model, load_tokenizer
from florax_examples.losses import target_losses
from florax_examples.models.llama import PRESETS, Llama, LlamaConfig
from florax_examples.text import check_ids, check_room, generate, pad_right
from florax_examples.tokenization import Tokenizer

# Adafactor factors what is at least 128 wide. Token ids are those of a tokenizer trained here.
TINY = LlamaConfig(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)

# From scratch, by the validation loss after 250 updates. `flora`, then of one side in float32: the
# best of 1, 2, 4 and 10 times 1e-3; `paper` has the same. The others: the best tried and the
# largest, of 1, 2 and 4 (`naive`), of 0.5, 1 and 2 (`none`), of 1 and 2 (`lora`). Large published
# weights want less: 2e-4 served SmolLM2.
LEARNING_RATES = {"none": 2e-3, "naive": 4e-3, "lora": 2e-3, "paper": 2e-3, "flora": 2e-3}
SHOWN = 3  # prompts
PROMPT = 12  # words of a held-out text that are one


@dataclasses.dataclass(frozen=True)
class Settings(settings.Training):
    data: str = str(datasets.FOLDER / "tinystories")  # folder with texts or pairs, or c4 of the hub
    output: Path = Path("runs/llama")  # folder for results.json, loss.png, weights and logs
    texts: int | None = None  # to train on, or pairs, the first of the data; None: all
    heldout_texts: int | None = 500  # the same of validation, and of test
    length: int = 128  # tokens of a row
    new_tokens: int = 48  # to write after a prompt, at most; of a pair's row, the target's tokens
    template: str = "{source}\n\nTL;DR:"  # of a pair's prompt, with {source} in it

    updates: int = 800  # of the optimizer; of the default data, 1.9 epochs
    micro_batch: int = 4  # rows of a micro-batch, whose activations exist at once
    accumulate: int = 4  # micro-batches an update
    rank: int = 64  # of the sketches or adapters; 64 is half of the tiny model's width
    resample_every: int = 100  # updates that share a projection of the momentum

    def __post_init__(self):
        super().__post_init__()
        settings.check_at_least_one(self, "texts", "heldout_texts", "length", "new_tokens")
        if self.template.count("{source}") != 1:
            raise ValueError(f"template must have {{source}} once, got {self.template!r}")

    def texts_of(self, split: str) -> int | None:
        return self.texts if split == "train" else self.heldout_texts


# The data.


class Prompt(NamedTuple):
    """What the model is to go on from, of the test split."""

    text: str
    ids: list[int]
    expected: tuple[str, ...]  # what is right; of a text how it goes on


class Data(NamedTuple):
    tokenizer: Tokenizer
    rows: dict[str, dict[str, np.ndarray]]  # by split; `ids`, and where in them targets `begin`
    #   and `end`
    prompts: list[Prompt]


def read_texts(s: Settings, vocab_size: int) -> Data:
    texts = {
        split: datasets.load_texts(s.data, split, s.texts_of(split)) for split in datasets.SPLITS
    }
    tokenizer = load_tokenizer(s, lambda: texts["train"], vocab_size)
    rows = {}
    for split, own in texts.items():
        rows[split] = pack(own, tokenizer, s.length)
        count = len(rows[split]["ids"])
        print(f"{split}: {len(own):,} texts, {count:,} rows of {s.length} tokens")

    prompts = []
    for text in texts["test"][:SHOWN]:
        words = text[:1000].split()
        start, rest = " ".join(words[:PROMPT]), " ".join(words[PROMPT:])
        prompts.append(Prompt(start, first(tokenizer) + tokenizer.encode(start), (rest,)))
    return Data(tokenizer, rows, prompts)


def pack(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> dict[str, np.ndarray]:
    """Rows of all texts laid end to end; a row's last token is the first one of the next.

    So all tokens but the very first are predicted once, as `length` inputs have as many targets.
    What does not fill a row at the end is left out.
    """

    def encode(text: str) -> np.ndarray:
        return np.array([*first(tokenizer), *tokenizer.encode(text), tokenizer.eos], np.int32)

    bar = tqdm(texts, "tokenizing", leave=False, disable=not devices.is_first())
    stream = np.concatenate([encode(text) for text in bar])
    if len(stream) <= length:
        raise datasets.DataError(f"length={length} is too long for {len(stream):,} tokens")
    ids = np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length]
    begin, end = (np.full(len(ids), place, np.int32) for place in (1, length + 1))
    return {"ids": ids, "begin": begin, "end": end}


def first(tokenizer: Tokenizer) -> list[int]:
    """What a text begins with: nothing where that is the token that ends the one before."""
    return [] if tokenizer.bos in (None, tokenizer.eos) else [tokenizer.bos]


def read_pairs(s: Settings, vocab_size: int) -> Data:
    pairs = {
        split: datasets.load_pairs(s.data, split, s.texts_of(split)) for split in datasets.SPLITS
    }

    def texts() -> Iterator[str]:
        for pair in pairs["train"]:
            yield from (s.template.replace("{source}", pair.source), target_text(pair, s))

    tokenizer = load_tokenizer(s, texts, vocab_size)
    prompts, rows = {}, {}
    for split, own in pairs.items():
        prompts[split] = [
            Prompt(pair.source, encode_prompt(pair, tokenizer, s), pair.references) for pair in own
        ]
        targets = [[*tokenizer.encode(target_text(pair, s)), tokenizer.eos] for pair in own]
        rows[split] = join(prompts[split], targets, tokenizer.pad, s.length)
        cut = sum(len(prompt.ids) == s.length - s.new_tokens for prompt in prompts[split])
        print(f"{split}: {len(own):,} pairs, {cut:,} of the sources cut to fit into {s.length}")
    return Data(tokenizer, rows, prompts["test"])


def target_text(pair: Pair, s: Settings) -> str:
    return pair.target if s.template[-1].isspace() else f" {pair.target}"


def encode_prompt(pair: Pair, tokenizer: Tokenizer, s: Settings) -> list[int]:
    """The template with the source in it, of which as much is cut off as `new_tokens` need."""
    before, after = map(tokenizer.encode, s.template.split("{source}"))
    if before[:1] != first(tokenizer):  # as those of a chat may
        before = first(tokenizer) + before
    room = s.length - s.new_tokens - len(before) - len(after)
    if room < 1:
        raise datasets.DataError(
            f"length={s.length} leaves no room for a source beside new_tokens={s.new_tokens} and "
            f"the template's {len(before) + len(after)}"
        )
    return [*before, *tokenizer.encode(pair.source)[:room], *after]


def join(
    prompts: list[Prompt], targets: list[list[int]], pad: int, length: int
) -> dict[str, np.ndarray]:
    """Rows of a prompt and its target, which is cut off where a row ends."""
    joined = [(a.ids + b)[: length + 1] for a, b in zip(prompts, targets, strict=True)]
    return {
        "ids": pad_right(joined, length + 1, pad),
        "begin": np.array([len(prompt.ids) for prompt in prompts], np.int32),
        "end": np.array([len(row) for row in joined], np.int32),
    }


def train(s: Settings) -> training.Comparison:
    """Train by every method that the settings ask for, and show some of what comes out."""
    config = load_config(s, Llama, PRESETS | {"tiny": TINY})
    check_room(config, length=s.length)
    has_pairs = datasets.has_pairs(s.data)
    tokenizer, data, prompts = (read_pairs if has_pairs else read_texts)(s, config.vocab_size)
    check_ids(config, (rows["ids"] for rows in data.values()))
    ids = [prompt.ids for prompt in prompts]
    check_room(config, prompt=max(map(len, ids)), new_tokens=s.new_tokens)

    def evaluate(model: Llama) -> tuple[dict[str, float], list[str]]:
        written = generate(model, tokenizer, ids, s.new_tokens, batch=s.heldout_batch)
        loss = training.heldout_loss(target_losses, model, data["test"], s.heldout_batch)
        scores = {"test_loss": loss, "perplexity": float(np.exp(loss))}
        if has_pairs:
            scores |= metrics.rouge(written, [prompt.expected for prompt in prompts])
        return scores, written

    task = training.Task(
        losses=target_losses,
        train=data["train"],
        validation=data["validation"],
        unit="tokens",
        units=s.length,
        learning_rates=LEARNING_RATES,
        files=tokenizer.files,
    )
    before, written = {}, {}
    if has_weights(s):
        before, written["before"] = evaluate(load_model(s, Llama, config))
    compared = training.compare(s, task, lambda: load_model(s, Llama, config), evaluate)
    runs = [run | {f"{k}_before": v for k, v in before.items()} for run in compared.runs]
    written |= compared.outputs

    for i, prompt in enumerate(prompts[:SHOWN]):
        texts = {"expected": prompt.expected[0]} | {name: own[i] for name, own in written.items()}
        report.print_sample(shorten(prompt.text), {k: shorten(text) for k, text in texts.items()})
    if before:
        print("\nbefore training:", ", ".join(f"{k} {v:.3f}" for k, v in before.items()))
    return compared._replace(runs=runs)


def main(s: Settings) -> None:
    runs, curves, _ = train(s)
    names = ["perplexity", *(metrics.ROUGE if datasets.has_pairs(s.data) else ())]
    report.conclude(s, runs, curves, title="Language modelling", unit="token", scores=names)


def shorten(text: str) -> str:
    return textwrap.shorten(text, 300, placeholder=" ...")


if __name__ == "__main__":
    settings.run(main, Settings, __doc__)
