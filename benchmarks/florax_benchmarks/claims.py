"""What FLORA's paper and florax claim, and whether it holds in the results: a line each."""

import itertools
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from florax_benchmarks import paper, results
from florax_benchmarks.tables import Row, state_bytes, table

NEAR = {"BLEU": 0.5, "rougeL": 0.3}  # of full size, that half of the width must come


def block(folder: Path) -> str:
    lines = [*_pilot(folder), *_memory(folder)]
    for name, own in paper.TABLES.items():
        for task in own.tasks:
            lines += _quality(folder, name, task)
    lines += _kappas(folder)
    for experiment, sweep in [(e, s) for e in ("2a", "2b", "5", "6") for s in paper.sweeps(e)]:
        lines += _residual(folder, f"Table {experiment}, {sweep.task}", sweep)
    for sweep in paper.sweeps("frontier"):
        lines += _frontier(folder, f"frontier, {sweep.task}", sweep)
    return table(["claim", "where", "holds", "figures"], lines, 4)


def _pilot(folder: Path) -> Iterator[list[str]]:
    rows = [r for r in results.read(folder, "pilot") if r["settings"]["steps"] == 4000]
    if not rows:
        return
    losses = {
        method: [r["methods"][method]["training"][-1] for r in rows]
        for method in rows[0]["methods"]
    }
    means = {method: statistics.mean(own) for method, own in losses.items()}
    spread = max(_spread(losses[m]) for m in ("lora_b", "rp"))
    apart = abs(means["lora_b"] - means["rp"])
    yield [
        "LoRA(B) is a random projection",
        "Figure 1",
        _verdict(apart <= spread),
        f"{means['lora_b']:.3f} and {means['rp']:.3f}, seeds within {spread:.3f}",
    ]
    recovered = (means["rp"] - means["rrp"]) / (means["rp"] - means["full"])
    yield [
        "resampling recovers most of SGD",
        "Figure 1",
        _verdict(recovered > 0.5),
        f"{recovered:.0%} of what the fixed projection loses",
    ]


def _memory(folder: Path) -> Iterator[list[str]]:
    for name, own in paper.TABLES.items():
        below, found = 0, 0
        for model, rows in own.rows.items():
            peaks = peaks_of(folder, own, model)
            floor = peaks.get(("none", None))
            for row in (r for r in rows if r.method == "paper" and r.memory is not None):
                florax = peaks.get(("florax", row.share))
                if floor is not None and florax is not None and row.memory is not None:
                    found += 1
                    below += (florax - floor) / 2**30 < row.memory
        if found:
            yield [
                "ΔM of florax is below the paper's of FLORA",
                f"Table {name}",
                _verdict(below == found),
                f"{below} of {found} rows",
            ]


def peaks_of(folder: Path, own: paper.Table, model: str) -> dict[Any, int]:
    """Peaks of the compiled steps, by method and share of the width."""
    settings = {"model": model, "layerwise": False} | dict(own.models[model])
    found = {}
    for row in own.rows[model]:
        name = row.variant(paper.MODEL_WIDTHS[model], own.momentum, own.unfactored)
        if row.method == "none-updates":  # whose step is that of none
            continue
        measured = results.latest(folder, "footprint", settings | {"variant": name})
        if measured and "error" not in measured:
            found[row.method, row.share] = measured["peak_bytes"]
    return found


def scores_of(folder: Path, own: paper.Table, task: str) -> dict[Any, list[float]]:
    """Scores, or losses, of the seeds, by method and share of the width."""
    found = {}
    for row in _rows(own):
        name = row.variant(paper.WIDTHS[task], own.momentum, own.unfactored)
        settings = {"task": task, "variant": name} | dict(own.tasks[task])
        if measured := results.latest(folder, "quality", settings):
            score = own.scores[task]
            values = measured["losses"] if score == paper.LOSS else measured["scores"][score]
            found[row.method, row.share] = values
    return found


def digits(own: paper.Table, task: str) -> int:
    """After the point, of what is compared."""
    return 3 if own.scores[task] == paper.LOSS else 1


def _quality(folder: Path, name: str, task: str) -> Iterator[list[str]]:
    own = paper.TABLES[name]
    scores, score = scores_of(folder, own, task), own.scores[task]
    means = {key: statistics.mean(values) for key, values in scores.items()}
    spreads = {key: _spread(values) for key, values in scores.items()}
    better = -1 if score == paper.LOSS else 1  # the sign of a difference for the better
    where, places = f"Table {name}, {task}", digits(own, task)
    for method in ("paper", "florax"):
        ranks = sorted((share, key) for key in means if (share := key[1]) and key[0] == method)
        if len(ranks) > 1:
            values = [means[key] for _, key in ranks]
            slack = max(spreads[key] for _, key in ranks) / 2
            grows = all(better * (b - a) > -slack for a, b in itertools.pairwise(values))
            label = "FLORA" if method == "paper" else "florax"
            told = ", ".join(f"{x:.{places}f}" for x in values)
            yield [f"{label}: quality grows with the rank", where, _verdict(grows), told]
            top, naive = ranks[-1][1], ("naive", None)
            if naive in means and top[1] == max(row.share or 0 for row in _rows(own)):
                near = NEAR.get(score, max(spreads[top], spreads[naive]))
                apart = means[top] - means[naive]
                claim = f"{label}: the largest rank is within {near:.2g} of full size"
                holds = better * apart >= -near
                yield [claim, where, _verdict(holds), f"{apart:+.{places}f}"]
    pairs = [
        (means["paper", s], means["lora", s])
        for m, s in means
        if m == "paper" and ("lora", s) in means
    ]
    if pairs:
        told = ", ".join(f"{a - b:+.{places}f}" for a, b in pairs)
        above = all(better * (a - b) > 0 for a, b in pairs)
        yield ["every rank of FLORA is better than LoRA's", where, _verdict(above), told]


def _rows(own: paper.Table) -> list[paper.Row]:
    """Of the model that tasks are compared with."""
    return next(iter(own.rows.values()))


def rows_of(folder: Path, sweep: paper.Sweep) -> dict[str, Row]:
    """The newest row of each variant that was trained for a sweep."""
    found = {}
    for name in sweep.variants:
        settings = {"task": sweep.task, "variant": name} | dict(sweep.changes)
        if row := results.latest(folder, "quality", settings):
            found[name] = row
    return found


def _kappas(folder: Path) -> Iterator[list[str]]:
    plain, *of_kappas = [rows_of(folder, sweep) for sweep in paper.OTHERS["3"]]
    cosine = [r for own in of_kappas for name, r in own.items() if name.endswith("-float32")]
    if "none" in plain and cosine:
        none = plain["none"]["losses"]
        worst = max(statistics.mean(r["losses"]) for r in cosine)
        told = f"at worst {worst:.3f}; none {statistics.mean(none):.3f}"
        claim = "with cosine and residual no κ is worse than no momentum"
        yield [claim, "Table 3", _verdict(worst <= max(none)), told]


def _residual(folder: Path, where: str, sweep: paper.Sweep) -> Iterator[list[str]]:
    rows = rows_of(folder, sweep)
    losses = {name: row["losses"] for name, row in rows.items()}
    own = {name: losses[name] for name in losses if re.fullmatch(r"none\+\d+-int\d", name)}
    if not own or not {"none", "none+float32"} <= losses.keys():
        return
    worst = max(own, key=lambda name: statistics.mean(own[name]))
    best = min(own, key=lambda name: statistics.mean(own[name]))
    none, full, high, low = (
        statistics.mean(losses[name]) for name in ("none", "none+float32", worst, best)
    )
    spread = max(_spread(losses[name]) for name in ("none", worst))
    claim = "with residual no rank is worse than no momentum"
    told = f"{high:.3f} with {_rank(worst)}; none {none:.3f}, seeds within {spread:.3f}"
    yield [claim, where, _verdict(high <= none + spread), told]
    claim = "with residual the best rank is no worse than full size"
    told = f"{low:.3f} with {_rank(best)}; full size {full:.3f}"
    yield [claim, where, _verdict(low <= full), told]
    yield from _edge(where, rows, [*own])


def _frontier(folder: Path, where: str, sweep: paper.Sweep) -> Iterator[list[str]]:
    """Of what accumulates: `none` is where there is no need to."""
    rows = {name: r for name, r in rows_of(folder, sweep).items() if not name.startswith("none")}
    half = paper.WIDTHS[sweep.task] // 2
    full, few = "float32+float32", f"{half}-both-int4+{half}-int4"
    if not {full, few} <= rows.keys():
        return
    low, high = (statistics.mean(rows[name]["losses"]) for name in (full, few))
    spread = max(_spread(rows[name]["losses"]) for name in (full, few))
    part = state_bytes(rows[full]) / state_bytes(rows[few])
    claim = "half of the width in 4 bits, of both buffers, is as good as full size"
    told = f"{high:.3f} and {low:.3f}, seeds within {spread:.3f}; 1/{part:.0f} of the bytes"
    yield [claim, where, _verdict(high <= low + spread), told]
    yield from _edge(where, rows, [name for name in rows if re.fullmatch(r".*int\d\+.*", name)])


def _rank(name: str) -> str:
    if found := re.fullmatch(r"none\+(\d+)-int(\d)", name):
        return f"r = {found[1]} in {found[2]} bits"
    return name


def _edge(where: str, rows: dict[str, Row], names: list[str]) -> Iterator[list[str]]:
    """Whether nothing but these has a lower loss in no more bytes, below an eighth."""
    share = {name: state_bytes(row) / row["parameter_bytes"] for name, row in rows.items()}
    loss = {name: statistics.mean(row["losses"]) for name, row in rows.items()}
    own = [name for name in names if share[name] < 1 / 8]
    others = rows.keys() - names
    beaten = [
        (name, by)
        for name in own
        for by in sorted(others)
        if share[by] <= share[name] and loss[by] < loss[name]
    ]
    told = "; ".join(f"{by} is below {_rank(name)}" for name, by in beaten)
    told = told or ", ".join(f"{share[name]:.3f}: {loss[name]:.3f}" for name in own)
    if own:
        claim = "florax has the least loss for its bytes, below 1/8 of the parameters'"
        yield [claim, where, _verdict(not beaten), told]


def _spread(values: list[float]) -> float:
    """How far the seeds are apart."""
    return max(values) - min(values)


def _verdict(holds: bool) -> str:
    return "yes" if holds else "**no**"
