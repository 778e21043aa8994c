"""What the READMEs show of the results: a named block of Markdown each, between two comments.

<!-- results: NAME -->
...
<!-- end -->
"""

import re
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from florax_benchmarks import claims, paper, predicted, results, summary, tables
from florax_benchmarks.summary import LLAMA, XL32, Figures, beyond, peak
from florax_benchmarks.tables import Row, table

BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n)(?:.*?\n)??(<!-- end -->)", re.DOTALL)
PAGES = ("README.md", "benchmarks/README.md")


def fill(text: str, folder: Path) -> str:
    """The text with its blocks as the results in `folder` have them."""
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]](folder)}\n{found[3]}", text)


def gib(mib: float | None) -> str:
    return "-" if mib is None else f"{mib / 2**10:.1f} GiB"


def whole(x: float | None) -> str:
    return "" if x is None else f"{x:,.0f}"


def mean(rows: Iterable[Row], name: str) -> float | None:
    values = [r[name] for r in rows if "error" not in r]
    return statistics.mean(values) if values else None


def newest(folder: Path, benchmark: str, settings: dict[str, Any]) -> list[Row]:
    """The newest row of every seed."""
    rows = [r for r in results.read(folder, benchmark) if settings.items() <= r["settings"].items()]
    return [*{r["settings"]["seed"]: r for r in rows if "error" not in r}.values()]


# The first page.


def first(folder: Path) -> str:
    """Where florax pays, in one table."""
    figures = Figures(folder)

    def of(settings: dict[str, Any], method: str, take: Callable[[Row], float]) -> str:
        return gib(figures.one("memory", settings | {"method": method}, take))

    ms = figures.times("speed", XL32, "milliseconds")

    def job(variant: str) -> list[Row]:
        settings = {"variant": variant, "updates": 1500, "micro_batch": 16}
        rows = newest(folder, "translation", settings)
        return [r for r in rows if "H100" in r["conditions"]["device"]]

    def bytes_of(row: Row) -> float:
        return tables.state_bytes(row) / 2**20

    (sweep,) = (own for own in paper.sweeps("frontier") if own.task == "summarization")
    tuned = claims.rows_of(folder, sweep)
    tuned_rows = [tuned[v] for v in ("float32+float32", "144-both-int4+144-int4")]
    job_rows = [job(v) for v in ("naive", "80-both-int4")]
    before = f"{newest(folder, 'summarization', {'model': 'smollm2'})[0]['rougeL_before']:.1f}"
    without = of(LLAMA, "none", peak)
    rows = [
        [
            "LLaMA-7B's shape in bfloat16, 16 micro-batches an update: peak on one H100",
            of(LLAMA, "full", peak),
            of(LLAMA, "sketched", peak),
        ],
        [
            "the same without accumulation: layer by layer, with momentum",
            f"{without}, without momentum",
            of(LLAMA, "layerwise", peak),
        ],
        [
            "GPT-2-XL's shape in float32, 16 micro-batches: beyond parameters and Adafactor",
            of(XL32, "full", beyond),
            of(XL32, "both-int8", beyond),
        ],
        ["its micro-step", *(f"{whole(ms(name))} ms" for name in ("full", "both-int8"))],
        [
            "SmolLM2-135M fine-tuned on SciTLDR, 16 micro-batches of one: ROUGE-L "
            f"({before} before)",
            *(f"{statistics.mean(row['scores']['rougeL']):.1f}" for row in tuned_rows),
        ],
        [
            "its optimizer state and accumulator",
            *(f"{whole(bytes_of(row))} MiB" for row in tuned_rows),
        ],
        [
            "the small job below with 1,500 updates, SacreBLEU",
            *(f"{mean(own, 'BLEU'):.1f}" for own in job_rows),
        ],
        ["its accumulator and momentum", *(f"{bytes_of(own[0]):.1f} MiB" for own in job_rows)],
    ]
    return table(["", "full-size buffers", "florax"], rows)


BITS = (  # bytes, what it is, its variant, what a note says of its BLEU
    ("1", "full size, float32", "float32", ""),
    ("", "the same, and the momentum too", "naive", ""),
    ("1/4", "**full size in 8 bits**", "int8", ""),
    ("", "sketches of one side, r = 1/4 of the width, float32", "64-float32", " (1)"),
    ("1/8", "**full size in 4 bits**", "int4", ""),
    ("", "**sketches of both sides, r = 1/2, in 8 bits**", "128-both-int8", " (2)"),
    ("", "of one side, r = 1/2, in 8 bits", "128-int8", " (1)"),
    ("1/16", "**sketches of both sides, r = 1/2, in 4 bits**", "128-both-int4", " (2)"),
    ("", "of both sides, r = 1/4, in 8 bits", "64-both-int8", ""),
    ("", "full size in 2 bits", "int2", ""),
    ("", "sketches of one side, r = 1/2, in 4 bits", "128-int4", ""),
    ("1/32", "**sketches of both sides, r = 1/4, in 4 bits**", "64-both-int4", ""),
    ("", "of both sides, r = 1/8, in 8 bits", "32-both-int8", ""),
    ("", "of one side, r = 1/4, in 4 bits", "64-int4", " (1)"),
    ("1/64", "**sketches of both sides, r = 1/8, in 4 bits**", "32-both-int4", ""),
    ("", "of both sides, r = 1/16, in 8 bits", "16-both-int8", ""),
    ("0", "none, as many updates, each of a micro-batch", "none-updates", ""),
    ("", "none, an update for every micro-batch", "none", ""),
)


def bits(folder: Path) -> str:
    """What to accumulate in, by its bytes. Ranks are of a width of 256, in BLEU's column of 160."""

    def loss(variant: str, accumulate: int) -> str:
        settings = {"task": "bytes", "variant": variant, "accumulate": accumulate}
        row = results.latest(folder, "quality", settings)
        return f"{statistics.mean(row['losses']):.2f}" if row else ""

    def bleu(variant: str) -> str:
        own = re.sub(r"^\d+", lambda rank: str(int(rank[0]) * 160 // 256), variant)
        settings = {"variant": own, "updates": 1500, "micro_batch": 16}
        rows = [r for r in results.read(folder, "translation") if _has(r, settings)]
        # Full size was measured on one device, sketches of both sides on another.
        devices = [r for r in rows if "H200" in r["conditions"]["device"]] or [
            r for r in rows if "H100" in r["conditions"]["device"]
        ]
        seeds = {r["settings"]["seed"]: r for r in devices}
        found = mean(seeds.values(), "BLEU")
        return "" if found is None else f"{found:.1f}"

    rows = [
        [share, text, loss(variant, 16), loss(variant, 4), bleu(variant) + note]
        for share, text, variant, note in BITS
    ]
    for row in rows:
        row[-1] = row[-1] if row[-1][:1].isdigit() else ""
    return table(["bytes", "accumulator", "loss, ×16", "loss, ×4", "SacreBLEU, ×4"], rows, 2)


def _has(row: Row, settings: dict[str, Any]) -> bool:
    return "error" not in row and settings.items() <= row["settings"].items()


# The paper.


def figure_1(folder: Path) -> str:
    rows = [r for r in results.read(folder, "pilot") if r["settings"]["steps"] == 4000]
    return tables.pilot([*{r["settings"]["seed"]: r for r in rows}.values()])


def paper_table(name: str, folder: Path) -> str:
    """A table of the paper beside what was measured here, a table for each of its models."""
    own = paper.TABLES[name]
    parts = []
    for number, (model, rows) in enumerate(own.rows.items()):
        tasks = own.tasks if number == 0 else {}
        scores = {task: claims.scores_of(folder, own, task) for task in tasks}
        peaks = claims.peaks_of(folder, own, model)
        header = ["method", "r ÷ width", f"paper, {model}", "ΔM, GiB"]
        header += [f"{task}: {own.scores[task]}" for task in tasks] + ["ΔM here, GiB"]
        cells = [
            [
                LABELS[row.method],
                str(row.share or ""),
                "" if row.score is None else f"{row.score:g}",
                "" if row.memory is None else f"{row.memory:.2f}",
                *(
                    _spread(scores[task].get((row.method, row.share)), claims.digits(own, task))
                    for task in tasks
                ),
                _delta(peaks.get((row.method, row.share)), peaks.get(("none", None))),
            ]
            for row in rows
        ]
        cells = [row for row in cells if any(row[2:])]
        told = [any(column) for column in zip(*cells, strict=True)]
        header, *cells = (
            [cell for cell, shown in zip(row, told, strict=True) if shown]
            for row in (header, *cells)
        )
        parts.append(table(header, cells))
    return "\n\n".join(parts)


def _spread(values: list[float] | None, digits: int) -> str:
    if values is None:
        return ""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


def _delta(peak: int | None, floor: int | None) -> str:
    if peak is None or floor is None:
        return ""
    return f"{(peak - floor) / 2**30:.2f}".replace("-0.00", "0.00")


LABELS = {
    "none": "none, as many examples",
    "none-updates": "none, as many updates",
    "naive": "full size",
    "lora": "LoRA",
    "paper": "FLORA as published",
    "florax": "florax, 8 bits",
}


def quality_table(experiment: str, folder: Path) -> str:
    """What was trained for an experiment, a table a task."""
    found: dict[str, list[Row]] = {}
    for own in paper.sweeps(experiment):
        found.setdefault(own.task, []).extend(claims.rows_of(folder, own).values())
    return "\n\n".join(tables.quality(rows) for rows in found.values() if rows) or "Not yet run."


def memory_table(experiment: str, folder: Path) -> str:
    """What was compiled for an experiment, in MiB."""
    cells = []
    for own in paper.footprints(experiment):
        for name in own.variants:
            settings = {"model": own.model, "layerwise": False, "variant": name}
            row = results.latest(folder, "footprint", settings | dict(own.arguments))
            if row is None or "error" in row:
                continue
            kept = row["settings"]
            how = "layer by layer" if kept["layerwise"] else "plain"
            if kept["checkpoint"] and not kept["layerwise"]:
                how = "checkpointed"
            names = ("parameter", "optimizer", "temporary", "peak")
            sizes = [tables.mebibytes(row[f"{kind}_bytes"]) for kind in names]
            cells.append([own.model, how, name, *sizes])
    header = ["model", "step", "variant", "parameters", "state", "temporaries", "peak"]
    return table(header, cells, 3) if cells else "Not yet run."


def scaling_measured(folder: Path) -> str:
    """The picture of efficiencies, once there is one, and the table."""
    picture = "![efficiency](plots/efficiency.png)\n\n" if predicted.measured_rows(folder) else ""
    return picture + predicted.beside(folder)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "first": first,
    "bits": bits,
    "summary": summary.table,
    "figure-1": figure_1,
    "claims": claims.block,
    "scaling-assumptions": lambda folder: predicted.assumptions(),
    "scaling-steps": partial(predicted.block, table=predicted.steps),
    "scaling-ends": partial(predicted.block, table=predicted.ends),
    "scaling-measured": scaling_measured,
    **{f"table-{name}": partial(paper_table, name) for name in paper.TABLES},
    **{f"quality-{name}": partial(quality_table, name) for name in paper.OTHERS},
    **{f"memory-{name}": partial(memory_table, name) for name in paper.FOOTPRINTS},
}
