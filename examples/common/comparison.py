"""Several optimizers on one task: their memory in a table, their loss in a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into files, needs no display
import matplotlib.pyplot as plt


class Curve(NamedTuple):
    """The loss along a run: pairs of how many examples were seen, and the loss then."""

    train: list[tuple[int, float]]
    heldout: list[tuple[int, float]]


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def human(size: int) -> str:
    """A number of bytes for people: `human(2_300_000) == '2.19 MiB'`."""
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others, which hold figures, to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    aligned = [
        [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        for first, *rest in [header, rule, *rows]
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def plot_curves(curves: Mapping[str, Curve], path: Path, xlabel: str, title: str) -> None:
    """Draw the held-out losses as dots and the training losses, smoothed, as thin lines."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, curve in curves.items():
        (line,) = axes.plot(*np.array(curve.heldout).T, "o-", markersize=4, label=name)
        seen, loss = np.array(curve.train).T
        window = max(1, len(loss) // 50)
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        axes.plot(seen[window - 1 :], smooth, color=line.get_color(), alpha=0.5, linewidth=1)
    # The steep start would leave no room for what tells the methods apart.
    axes.set_ylim(top=1.1 * max(curve.heldout[0][1] for curve in curves.values()))
    axes.set(xlabel=xlabel, ylabel="loss in nats per token: held-out (dots), training", title=title)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
