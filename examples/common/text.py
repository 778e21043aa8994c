"""Pairs of sentences on disk, a tokenizer trained on them, and batches."""

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import ByteLevelBPETokenizer


class Pair(NamedTuple):
    source: str
    target: str


def read_pairs(path: Path) -> list[Pair]:
    """Read a `.jsonl.gz` file: in each line an object with `source` and `target`."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [Pair(item["source"], item["target"]) for item in map(json.loads, lines)]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]
) -> ByteLevelBPETokenizer:
    """Train a byte-level BPE, which can spell any text. `special_tokens` get the ids 0, 1, ..."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=list(special_tokens), show_progress=False
    )
    return tokenizer


def pad(rows: list[list[int]], length: int, value: int) -> np.ndarray:
    """Stack token lists, each filled up with `value` on the right: (len(rows), length), int32."""
    return np.array([row + [value] * (length - len(row)) for row in rows], np.int32)


def shuffled(size: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of row numbers below `size`, each epoch in a new order."""
    if batch > size:
        raise ValueError(f"a batch of {batch} needs as many rows, got {size}")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(size)
        for start in range(0, size - batch + 1, batch):
            yield order[start : start + batch]
