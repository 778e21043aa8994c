"""The pictures of the READMEs, of the rows in the results folder."""

import math
import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no display
import matplotlib.pyplot as plt
import numpy as np

from florax_benchmarks import claims, links, paper, predicted, results, tables, variants
from florax_benchmarks.tables import Row, state_bytes

FAMILIES = {  # of variants, by what their names have: how each is drawn
    "florax, both sides": ("tab:blue", "o"),
    "florax, one side": ("tab:cyan", "s"),
    "florax, accumulator of full size": ("tab:purple", "p"),
    "FLORA as published": ("tab:orange", "^"),
    "full size": ("black", "D"),
    "LoRA": ("tab:red", "v"),
    "GaLore": ("tab:green", "P"),
    "APOLLO": ("tab:olive", "X"),
    "AdamW": ("tab:brown", "*"),
    "none": ("tab:gray", "h"),
}


def family(name: str) -> str:
    """Which of `FAMILIES` a variant belongs to."""
    v = variants.parse(name)
    for base, label in (("galore", "GaLore"), ("apollo", "APOLLO"), ("adamw", "AdamW")):
        if v.base.startswith(base):
            return label
    if variants.has_adapters(v.base):
        return "LoRA"
    kinds = [buffer.kind for buffer in (v.accumulator, v.momentum) if buffer]
    if kinds == ["full", "smaller"]:
        return "florax, accumulator of full size"
    for kind, label in (
        ("paper", "FLORA as published"),
        ("both", "florax, both sides"),
        ("smaller", "florax, one side"),
    ):
        if kind in kinds:
            return label
    return "full size" if kinds else "none"


def frontier(rows: list[Row], path: Path, unit: str) -> None:
    """Held-out loss against bytes, a line a family and dtype."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    groups: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for r in rows:
        name = r["settings"]["variant"]
        dtype = re.search(r"(int\d+|bfloat16)", name)
        label = family(name), f" in {dtype[0]}" if dtype and family(name) != "full size" else ""
        losses = r["losses"]
        share = state_bytes(r) / r["parameter_bytes"]
        spread = (max(losses) - min(losses)) / 2
        groups.setdefault(label, []).append((share, statistics.mean(losses), spread))
    shares = [share for own in groups.values() for share, *_ in own]
    # A logarithm has no zero: what has no bytes stands left of all others.
    floor = min(share for share in shares if share) / (1 if all(shares) else 2)
    for (name, dtype), own in sorted(groups.items()):
        color, marker = FAMILIES[name]
        share, loss, spread = np.array(sorted(own)).T
        style = {"": "-", " in int8": "-", " in int4": "--"}.get(dtype, ":")
        axes.errorbar(
            np.maximum(share, floor),
            loss,
            spread,
            color=color,
            marker=marker,
            linestyle=style if len(own) > 1 else "",
            label=name + dtype,
            markersize=5,
            linewidth=1,
            capsize=2,
        )
    axes.set_xscale("log", base=2)
    halvings = range(math.floor(-math.log2(floor)) + all(shares))
    ticks = {2.0**-i: f"1/{2**i}" if i else "1" for i in halvings}
    ticks |= {} if all(shares) else {floor: "0"}
    axes.set_xticks([*ticks], [*ticks.values()])
    axes.set(
        xlabel="bytes of accumulator and optimizer state, of those of the parameters",
        ylabel=f"held-out loss, nats {unit}",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def pilot(rows: list[Row], path: Path) -> None:
    """Figure 1: training losses, the means of the seeds."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    labels = {"full": "SGD", "lora": "LoRA", "lora_b": "LoRA(B)", "rp": "RP", "rrp": "RRP"}
    for method, label in labels.items():
        losses = np.array([r["methods"][method]["training"] for r in rows])
        steps = np.array(rows[0]["examples"]) / 1000
        (line,) = axes.plot(steps, losses.mean(0), "o-", markersize=3, linewidth=1, label=label)
        low, high = losses.min(0), losses.max(0)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="thousand images seen", ylabel="training loss, nats an image", ylim=(0.4, 0.9))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)


def kappas(rows: list[Row], path: Path) -> None:
    """Table 3: losses against how often projections are resampled, and where they must diverge."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, ending in (("FLORA as published", "paper"), ("cosine, with residual", "float32")):
        own = [r for r in rows if r["settings"]["variant"].endswith(f"-{ending}")]
        points = sorted(
            (r["settings"]["resample_every"], statistics.mean(r["losses"])) for r in own
        )
        (line,) = axes.plot(*np.array(points).T, "o-", label=label)
        for kappa in (kappa for kappa, loss in points if not math.isfinite(loss)):
            axes.annotate(
                "↑ diverges",
                (kappa, 0.97),
                xycoords=axes.get_xaxis_transform(),
                color=line.get_color(),
                ha="left",
                va="top",
            )
    for name, label in (("none", "no momentum"), ("none+float32", "full size")):
        for r in (r for r in rows if r["settings"]["variant"] == name):
            color = "gray" if name == "none" else "black"
            axes.axhline(statistics.mean(r["losses"]), linestyle="--", color=color, label=label)
    width, rank = paper.WIDTHS["pretraining"], paper.KAPPA_RANK
    bound = math.log(1 + (width + 1) / rank) / (2 * math.log(1 / variants.DECAY))
    axes.axvline(bound, color="tab:red", linestyle=":", label=f"bound: κ > {bound:.1f}")
    axes.set(xscale="log", xlabel="κ, updates that share a projection", ylabel="held-out loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)


def stacked(rows: list[Row], path: Path) -> None:
    """Figure 2: what the step of each variant holds at its peak."""
    kinds = {
        "parameters": ("parameter_bytes", "adapter_bytes"),
        "optimizer state": ("optimizer_bytes", "accumulator_bytes"),
        "gradients and activations": ("temporary_bytes",),
    }
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    bottom, places = np.zeros(len(rows)), np.arange(len(rows))
    for kind, names in kinds.items():
        sizes = np.array([sum(r[name] for name in names) for r in rows]) / 2**20
        axes.barh(places, sizes, left=bottom, label=kind)
        bottom += sizes
    axes.set_yticks(places, [_step(r["settings"]) for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="MiB")
    axes.legend(frameon=False)
    save(figure, path)


def _step(settings: dict[str, Any]) -> str:
    how = "checkpointed" if settings["checkpoint"] else "plain"
    how = "layer by layer" if settings["layerwise"] else how
    v = variants.parse(settings["variant"])
    rank = v.base_rank or (v.momentum and v.momentum.rank)
    dtype = f" in {v.momentum.dtype}" if v.momentum and v.momentum.kind == "smaller" else ""
    of_rank = f", r = {rank}" if rank else ""
    name = family(settings["variant"]).replace("full size", "full-size momentum")
    return f"{name}{dtype}{of_rank}; {how}"


def scaling(folder: Path, path: Path) -> None:
    """How many times as long an update of full size takes as one of sketches, on paper."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    devices, given = [2**i for i in range(3, 13)], links.Links()
    colors = {"data": "tab:blue", "fsdp": "tab:orange", "hybrid": "tab:green"}
    for model, marker in zip(predicted.MODELS, "os", strict=True):
        for division, rows in predicted.rows_of(folder, model).items():
            for time, style in ((predicted.apart, "-"), (predicted.overlapped, ":")):
                gains = [predicted.gain(rows, n, given, time) for n in devices]
                label = f"{model}, {division}" if style == "-" else None
                line = f"{marker}{style}"
                axes.plot(devices, gains, line, color=colors[division], markersize=4, label=label)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(devices, [f"{n:,}" for n in devices])
    axes.set(xlabel="devices", ylabel="time of full size ÷ time of sketches")
    axes.plot([], [], "k:", label="what can overlap does")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.18))
    save(figure, path)


def efficiencies(rows: list[Row], path: Path) -> None:
    """Measured on one host: time on one device ÷ time on all, a panel for each division."""
    panels: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for row in rows:
        own = row["settings"]
        lines = panels.setdefault((own["model"], own["division"]), {})
        for method in own["methods"]:
            if (efficiency := tables.efficiency(row, method)) is not None:
                lines.setdefault(method, {})[own["devices"]] = efficiency
    columns = len(panels)
    figure, axes = plt.subplots(
        1, columns, figsize=(3.5 * columns, 3.5), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, ((model, division), lines) in zip(axes[0], panels.items(), strict=True):
        for method, points in lines.items():
            panel.plot(*zip(*sorted({1: 1.0, **points}.items()), strict=True), "o-", label=method)
        counts = sorted({1, *(n for points in lines.values() for n in points)})
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, map(str, counts))
        panel.set(title=f"{model}, {division}", xlabel="devices")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    axes[0][0].set(ylabel="efficiency")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def draw(folder: Path, into: Path) -> None:
    """All pictures that there are results for."""
    if measured := predicted.measured_rows(folder):
        efficiencies(measured, into / "efficiency.png")
    if results.read(folder, "wire"):
        scaling(folder, into / "scaling.png")
    rows = [r for r in results.read(folder, "pilot") if r["settings"]["steps"] == 4000]
    if rows:
        pilot([*{r["settings"]["seed"]: r for r in rows}.values()], into / "pilot.png")
    quality = results.read(folder, "quality")
    newest = {str(r["settings"] | {"learning_rates": 0, "seeds": 0}): r for r in quality}
    own = [r for r in newest.values() if r["settings"]["task"] == "bytes"]
    own = [r for r in own if r["settings"]["accumulate"] == 16]
    if own:
        frontier(own, into / "bytes.png", "a byte")
    sweeps = {f"table-{name}-{s.task}": s for name in paper.TABLES for s in paper.sweeps(name)}
    sweeps |= {f"frontier-{s.task}": s for s in paper.OTHERS["frontier"]}
    sweeps |= {f"table-{name}-{s.task}": s for name in "56" for s in paper.OTHERS[name]}
    for name, sweep in sweeps.items():
        rows = claims.rows_of(folder, sweep)
        # One with as few examples as updates would be far above all others.
        own = [row for variant, row in rows.items() if not variant.endswith("none-updates")]
        if 2 * len(rows) > len(sweep.variants):
            frontier(own, into / f"{name}.png", "an image" if sweep.task == "vision" else "a token")
    own = [r for sweep in paper.OTHERS["3"] for r in claims.rows_of(folder, sweep).values()]
    if any(r["settings"]["variant"].endswith("-paper") for r in own):
        kappas(own, into / "kappa.png")
    own = [
        row
        for footprint in paper.FOOTPRINTS["figure-2"]
        for name in footprint.variants
        if (
            row := results.latest(
                folder,
                "footprint",
                {"model": footprint.model, "variant": name, "layerwise": False}
                | dict(footprint.arguments),
            )
        )
        and "error" not in row
    ]
    if own:
        stacked(own, into / "footprint.png")
