"""Fine-tune GPT-2, or train a small one, to translate German: by FLORA, LoRA or with full buffers.

    python examples/gpt2.py                 # a small GPT-2 from scratch: minutes on two cores
    python examples/gpt2.py --method all    # no buffers, full-size ones, FLORA: a table
    python examples/gpt2.py --model gpt2 --data iwslt2017    # GPT-2 itself, with a hub connection
    python examples/gpt2.py --help

A sentence pair is a line of text as in FLORA's paper, "translate German to English: [source].
English: [target]", and the loss is that of the target. What comes out: a few held-out translations,
a table of memory, time and quality (SacreBLEU), and in the output folder the best weights as a
Hugging Face checkpoint, the loss curves and all figures.
"""

import dataclasses
from pathlib import Path

import numpy as np

from florax_examples import datasets, metrics, report, settings, training
from florax_examples.datasets import Pair
from florax_examples.loading import load_config, load_model, load_tokenizer
from florax_examples.losses import target_losses
from florax_examples.models.gpt2 import GPT2, PRESETS, GPT2Config
from florax_examples.text import check_ids, check_room, generate, pad_right
from florax_examples.tokenization import Tokenizer

TINY = GPT2Config(vocab_size=2048, n_positions=96, n_embd=160, n_layer=3, n_head=5)
PROMPT = "translate German to English: {source}. English:"

# Each the best of 0.5, 1, 2, 4 and 8 times 1e-3, by the validation loss after 2,000 updates; but
# `lora` has that of `naive`, `paper` and `flora` that of cosine sketches of one side in float32.
LEARNING_RATES = {"none": 1e-3, "naive": 2e-3, "lora": 2e-3, "paper": 2e-3, "flora": 2e-3}
SHOWN = 8  # translations


@dataclasses.dataclass(frozen=True)
class Settings(settings.Training):
    data: str = str(datasets.FOLDER / "tatoeba_deen")  # folder with pairs, or iwslt2017 of the hub
    output: Path = Path("runs/gpt2")  # folder for results.json, loss.png, weights and logs
    length: int = 32  # tokens of a pair; longer ones are left out
    new_tokens: int = 16  # of a translation, at most
    beams: int = 1  # of the search for a translation; 1 is greedy
    scored: int = 1000  # test pairs that are translated, at most

    updates: int = 1100  # of the optimizer; of the default data, 1.6 epochs
    accumulate: int = 4  # micro-batches an update
    rank: int = 80  # of the sketches or adapters; 80 is half of the tiny model's width
    resample_every: int = 100  # updates that share a projection of the momentum

    def __post_init__(self):
        super().__post_init__()
        settings.check_at_least_one(self, "length", "new_tokens", "beams", "scored")


# The data.


def encode(pairs: list[Pair], tokenizer: Tokenizer, length: int) -> dict[str, np.ndarray]:
    """Rows of prompt, target and end; of each where the target begins and where the row ends."""
    rows, begins = [], []
    for pair in pairs:
        prompt = encode_prompt(pair, tokenizer)
        row = [*prompt, *tokenizer.encode(f" {pair.target}"), tokenizer.eos]
        if len(row) <= length:
            rows.append(row)
            begins.append(len(prompt))
    if not rows:
        raise datasets.DataError(f"length={length} leaves none of {len(pairs):,} pairs")
    return {
        "ids": pad_right(rows, length, tokenizer.pad),
        "begin": np.array(begins, np.int32),
        "end": np.array([len(row) for row in rows], np.int32),
    }


def encode_prompt(pair: Pair, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(PROMPT.format(source=pair.source.rstrip(".")))


def train(s: Settings) -> training.Comparison:
    """Train and translate by every method that the settings ask for, and show some of it."""
    config = load_config(s, GPT2, PRESETS | {"tiny": TINY})
    check_room(config, length=s.length, new_tokens=s.new_tokens)
    pairs = {split: datasets.load_pairs(s.data, split) for split in datasets.SPLITS}

    def texts():
        for pair in pairs["train"]:
            yield f"{PROMPT.format(source=pair.source)} {pair.target}"

    tokenizer = load_tokenizer(s, texts, config.vocab_size)
    data = {split: encode(own, tokenizer, s.length) for split, own in pairs.items()}
    check_ids(config, (rows["ids"] for rows in data.values()))
    for split, rows in data.items():
        print(f"{split}: {len(rows['ids']):,} of {len(pairs[split]):,} pairs fit into {s.length}")
    test = [pair for pair in pairs["test"] if len(encode_prompt(pair, tokenizer)) <= s.length]
    test = test[: s.scored]

    def evaluate(model: GPT2) -> tuple[dict[str, float], list[str]]:
        prompts = [encode_prompt(pair, tokenizer) for pair in test]
        written = generate(model, tokenizer, prompts, s.new_tokens, s.beams, s.heldout_batch)
        bleu = metrics.bleu(written, [pair.references for pair in test])
        loss = training.heldout_loss(target_losses, model, data["test"], s.heldout_batch)
        return {"test_loss": loss, "BLEU": bleu}, written

    task = training.Task(
        losses=target_losses,
        train=data["train"],
        validation=data["validation"],
        unit="tokens",
        units=s.length,
        learning_rates=LEARNING_RATES,
        files=tokenizer.files,
    )
    comparison = training.compare(s, task, lambda: load_model(s, GPT2, config), evaluate)
    for i in simple(test, tokenizer)[:SHOWN]:
        translations = {method: own[i] for method, own in comparison.outputs.items()}
        report.print_sample(test[i].source, {"expected": test[i].target} | translations)
    return comparison


def main(s: Settings) -> None:
    runs, curves, _ = train(s)
    report.conclude(s, runs, curves, title="German to English", unit="token", scores=["BLEU"])


def simple(pairs: list[Pair], tokenizer: Tokenizer) -> list[int]:
    """Which sentences to show first: of at least four words, those of the fewest tokens.

    The tokenizer spells words that were rare in training, and minutes do not teach those.
    """
    words = [len(pair.source.split()) for pair in pairs]
    tokens = [len(tokenizer.encode(pair.source)) for pair in pairs]
    return sorted(range(len(pairs)), key=lambda i: (words[i] < 4, tokens[i]))


if __name__ == "__main__":
    settings.run(main, Settings, __doc__)
