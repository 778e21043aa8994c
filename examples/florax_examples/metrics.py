"""How good summaries, translations and labels are, in percent."""

import itertools
from collections.abc import Sequence

import numpy as np
import sacrebleu

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, with stemming.

    Args:
      predictions: summaries.
      references: of each of them the right ones, at least one. Of several the one with the highest
        ROUGE-1 counts, for all three scores: so SciTLDR is evaluated.
    """
    # Not above: it brings NLTK and SciPy, three tenths of the time that a script takes to start.
    from rouge_score import rouge_scorer

    _check(predictions, references)
    scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)

    def best(prediction: str, right: Sequence[str]) -> list[float]:
        scores = [scorer.score(reference, prediction) for reference in right]
        return max([score[name].fmeasure for name in ROUGE] for score in scores)

    means = np.mean([best(*pair) for pair in zip(predictions, references, strict=True)], axis=0)
    return {name: 100 * float(mean) for name, mean in zip(ROUGE, means, strict=True)}


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The BLEU of all translations together, as sacrebleu has it; `references` as with `rouge`."""
    _check(predictions, references)
    # A list for the first references, one for the second, and None where there is no second.
    streams = list(map(list, itertools.zip_longest(*references)))
    return sacrebleu.corpus_bleu(list(predictions), streams).score


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """How many predicted labels are right; both of shape (N,)."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or not labels.size:
        raise ValueError(f"got predictions {predictions.shape} for labels {labels.shape}")
    return 100 * float((predictions == labels).mean())


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"got {len(predictions)} predictions for {len(references)} references")
    for right in references:
        if isinstance(right, str) or not right:
            raise ValueError(f"references must be lists of at least one text, got {right!r}")
