"""What a run leaves for people and for programs: a table, a plot, a line of JSON."""

import itertools
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into files, needs no display
import matplotlib.pyplot as plt

from florax_examples import devices
from florax_examples.settings import Training


class Curve(NamedTuple):
    """The loss along a run: pairs of how many examples were seen, and the loss then."""

    train: list[tuple[int, float]]
    heldout: list[tuple[int, float]]


def conclude(
    settings: Training,
    runs: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Curve],
    *,
    title: str,
    unit: str,
    scores: Sequence[str],
) -> None:
    """Print a row of figures per method, draw their curves, and end with all of it as JSON.

    Args:
      settings: the run's; `loss.png` and `results.json` go to its `output`.
      runs: per method what `train` found, and the scores on the test data.
      curves: by method.
      title: of the plot.
      unit: what the loss is per, "token" or "image".
      scores: which of the figures are scores, columns of the table.
    """
    kinds = ("optimizer", "accumulator", "temporary")
    sizes_header = ("optimizer state", "accumulator", "temporaries")
    header = ["method", *sizes_header, "seconds", "test loss", *scores]
    table = []
    for run in runs:
        sizes = [human(run[f"{kind}_bytes"]) for kind in kinds]
        quality = [f"{run['test_loss']:.3f}", *(f"{run[score]:.1f}" for score in scores)]
        table.append([run["method"], *sizes, f"{run['seconds']:.0f}", *quality])
    print(f"\n{format_table(header, table)}\n")
    methods = settings.methods()
    best = f"{settings.output}/{methods[0] if len(methods) == 1 else '*'}/best"
    write_results(settings, runs, curves, title=title, unit=unit, more=f"; weights are in {best}")


def write_results(
    settings: Any,
    runs: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Curve],
    *,
    title: str,
    unit: str,
    more: str = "",
) -> None:
    """Write and print what `conclude` says, without its table; `more` is for people."""
    if not devices.is_first():
        return
    settings.output.mkdir(parents=True, exist_ok=True)
    plot(curves, runs, settings.output / "loss.png", unit, title)
    results = {"settings": as_json(settings), "runs": list(runs)}
    write_json(settings.output / "results.json", results)
    print(f"wrote {settings.output}/loss.png and results.json{more}")
    print(json.dumps(results))


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    aside.replace(path)


def print_sample(source: str, written: Mapping[str, str]) -> None:
    """Show what each of several has written about a source."""
    print(f"\n{source}")
    for name, text in written.items():
        print(f"  {name:9} {text}")


def as_json(settings: Any) -> dict[str, Any]:
    """The fields of a settings object, as JSON can hold them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(settings).items()}


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def peak_memory() -> int:
    """The most bytes in use so far: of the accelerator, or of this process where there is none."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def human(size: int) -> str:
    """A number of bytes for people: `human(2_300_000) == '2.19 MiB'`."""
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= bytes_:
            return f"{size / bytes_:.2f} {unit}"
    return f"{size / 2**10:.1f} KiB"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others, which hold figures, to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    aligned = [
        [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        for first, *rest in [header, rule, *rows]
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def plot(
    curves: Mapping[str, Curve],
    runs: Sequence[Mapping[str, Any]],
    path: Path,
    unit: str,
    title: str,
) -> None:
    """Draw the losses against the examples seen; of several runs, also against the bytes held."""
    held = {run["method"]: held_bytes(run) for run in runs if "optimizer_bytes" in run}
    both = len(held) > 1
    figure, panels = plt.subplots(
        1, 1 + both, figsize=(11 if both else 7, 4.5), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    plot_curves(panels[0, 0], curves, unit)
    if both:
        losses = {run["method"]: run["test_loss"] for run in runs}
        plot_bytes(panels[0, 1], held, losses, unit)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def held_bytes(run: Mapping[str, Any]) -> int:
    """What a run keeps between steps, beside parameters."""
    return run["optimizer_bytes"] + run["accumulator_bytes"]


def plot_curves(axes: Any, curves: Mapping[str, Curve], unit: str) -> None:
    """Draw the held-out losses as dots and the training losses, smoothed, as thin lines."""
    ends = {}
    for name, curve in curves.items():
        (line,) = axes.plot(*np.array(curve.heldout).T, "o-", markersize=4)
        seen, loss = np.array(curve.train).T
        window = max(1, len(loss) // 50)
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        axes.plot(seen[window - 1 :], smooth, color=line.get_color(), alpha=0.5, linewidth=1)
        ends[name] = (*curve.heldout[-1], line.get_color())
    # The steep start would leave no room for what tells the methods apart.
    axes.set_ylim(top=1.1 * max(curve.heldout[0][1] for curve in curves.values()))
    axes.set(xlabel="examples seen", ylabel=f"loss in nats per {unit}: held-out (dots), training")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    label(axes, ends)


def plot_bytes(axes: Any, held: Mapping[str, int], losses: Mapping[str, float], unit: str) -> None:
    """Draw the test loss of each run over the bytes that it held."""
    ends = {}
    for name, size in held.items():
        (point,) = axes.plot(size / 2**20, losses[name], "o")
        ends[name] = size / 2**20, losses[name], point.get_color()
    axes.set(xlabel="optimizer state and accumulator, MiB", ylabel=f"test loss in nats per {unit}")
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    label(axes, ends)


def label(axes: Any, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write names to the right of points (x, y, color), apart where these are close together."""
    left, right = axes.get_xlim()
    low, high = axes.get_ylim()
    axes.set_xlim(left, right + 0.12 * (right - left))
    near, apart = 0.15 * (right - left), 0.05 * (high - low)
    names = sorted(ends, key=lambda name: ends[name][1])
    heights = {name: ends[name][1] for name in names}
    for _ in range(100):
        heights[names[0]] = max(heights[names[0]], low + apart)
        for below, above in itertools.combinations(names, 2):
            lacking = apart - (heights[above] - heights[below])
            if lacking > 0 and abs(ends[above][0] - ends[below][0]) < near:
                heights[above] += lacking / 2
                heights[below] -= lacking / 2
    for name, (x, _, color) in ends.items():
        place = {"textcoords": "offset points", "color": color, "va": "center"}
        axes.annotate(name, (x, heights[name]), (6, 0), **place)
