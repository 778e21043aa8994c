"""Steps on many devices, on paper: tables of `links.py`, of the bytes in the rows of `wire`.

What full size costs is that of its cheaper way, gradients summed in every micro-batch or once an
update, and likewise of sketches.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from florax_benchmarks import links, models, results, tables
from florax_benchmarks.links import Links, Step, Traffic
from florax_benchmarks.tables import Row

DEVICES = (8, 64, 512, 4096)
EACH = 4  # micro-batches an update
GAIN = 1.05  # what sketches must save to pay: full size takes 1.05 of their time
WAYS = {"full": ("full", "full-once"), "sketched": ("sketched", "sketched-once")}


def rows_of(folder: Path, model: str) -> dict[str, dict[str, Row]]:
    """Of what is trained on paper: by division and method."""
    found: dict[str, dict[str, Row]] = {}
    for row in results.read(folder, "wire"):
        own = row["settings"]
        if own["model"] == model and own["on_paper"]:
            found.setdefault(own["division"], {})[own["method"]] = row
    return found


def traffic_of(row: Row) -> list[Traffic]:
    return [Traffic(**own) for own in row["traffic"]]


def update(row: Row, devices: int, given: Links, tokens: float = 1.0) -> Step:
    """An update on paper; `tokens` scales those of a micro-batch."""
    own = row["settings"]
    shape, count = models.SHAPES[own["model"]], own["batch"] * own["length"]
    compute = tokens * links.compute_seconds(shape, count, own["length"], given)
    return links.step(traffic_of(row), own["division"], devices, EACH, compute, given)


def best(
    rows: dict[str, Row], way: str, devices: int, given: Links, time: Callable[[Step], float]
) -> Step:
    """Of the two ways to sum, the cheaper one by that time."""
    steps = [update(rows[name], devices, given) for name in WAYS[way] if name in rows]
    return min(steps, key=time)


def apart(own: Step) -> float:
    return own.apart


def overlapped(own: Step) -> float:
    return own.overlapped


def gain(rows: dict[str, Row], devices: int, given: Links, time: Callable[[Step], float]) -> float:
    """How many times as long full size takes as sketches do."""
    dense, sketched = (time(best(rows, way, devices, given, time)) for way in WAYS)
    return dense / sketched


def steps(folder: Path, model: str, given: Links | None = None) -> str:
    """What one device sends in an update, and how long that takes, of full size and of sketches."""
    given = given or Links()
    cells = []
    for division, rows in rows_of(folder, model).items():
        for devices in DEVICES:
            own = [best(rows, way, devices, given, apart) for way in WAYS]
            hidden = [best(rows, way, devices, given, overlapped) for way in WAYS]
            within, across = ([x.bytes_within for x in own], [x.bytes_across for x in own])
            sizes = [f"{x / 1e9:,.1f}" for x in (*within, *across)]
            seconds = _times([x.apart for x in own]) + _times([x.overlapped for x in hidden])
            cells.append([division, f"{devices:,}", *sizes, *seconds])
    header = ["", "devices", "GB within: full size", "sketches", "across: full size", "sketches"]
    header += ["s: full size", "sketches", "ratio", "overlapped: full size", "sketches", "ratio"]
    return tables.table(header, cells) if cells else "Not yet run."


def _times(both: list[float]) -> list[str]:
    dense, sketched = both
    return [f"{dense:.2f}", f"{sketched:.2f}", f"{dense / sketched:.2f}"]


def ends(folder: Path, model: str, given: Links | None = None) -> str:
    """Tokens of a device and update, and bandwidths, from which on sketches save less than 5%."""
    given = given or Links()
    cells = []
    for division, rows in rows_of(folder, model).items():
        for devices in DEVICES[1:]:
            cells.append(
                [
                    division,
                    f"{devices:,}",
                    _tokens(rows, devices, given, hidden=False),
                    _tokens(rows, devices, given, hidden=True),
                    _bandwidth(rows, devices, given, apart),
                    _bandwidth(rows, devices, given, overlapped),
                ]
            )
    header = ["", "devices", "tokens of an update", "overlapped", "Gb/s across", "overlapped"]
    return tables.table(header, cells) if cells else "Not yet run."


def _tokens(rows: dict[str, Row], devices: int, given: Links, hidden: bool) -> str:
    """Of one device, in its `EACH` micro-batches, from which on sketches save less than `GAIN`."""
    time = overlapped if hidden else apart
    own = next(iter(rows.values()))["settings"]
    tokens = own["batch"] * own["length"]

    def pays(scale: float) -> bool:
        dense, sketched = (
            min(time(update(rows[n], devices, given, scale)) for n in ways if n in rows)
            for ways in WAYS.values()
        )
        return dense >= GAIN * sketched

    scale = _last(pays, 2.0**-10, 2.0**20)
    return _rounded(None if scale is None else scale * tokens * EACH)


def _bandwidth(
    rows: dict[str, Row], devices: int, given: Links, time: Callable[[Step], float]
) -> str:
    """Across hosts, in Gb/s a device, from which on sketches save less than `GAIN`."""

    def pays(across: float) -> bool:
        other = Links(**{**vars(given), "across": across})
        return gain(rows, devices, other, time) >= GAIN

    across = _last(pays, 1e6, 1e13)
    return _rounded(None if across is None else across * 8 / 1e9)


def _last(pays: Callable[[float], bool], low: float, high: float) -> float | None:
    """Where, going up, something stops to pay; inf if it does not, None if it never does."""
    if pays(high):
        return math.inf
    points = [low * (high / low) ** (i / 60) for i in range(61)]
    paying = [x for x in points if pays(x)]
    if not paying:
        return None
    low, high = paying[-1], paying[-1] * (high / low) ** (1 / 60)
    for _ in range(20):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low


def _rounded(x: float | None) -> str:
    if x is None:
        return "never pays"
    if math.isinf(x):
        return "always pays"
    digits = 1 - math.floor(math.log10(x))  # two that count
    return f"{round(x, digits):,.0f}" if x >= 10 else f"{x:.1f}"


def beside(folder: Path, given: Links | None = None) -> str:
    """What was measured on one host, beside what would have been predicted.

    The time of computing is that measured on one device: the prediction is of the links alone.
    """
    given = given or Links()
    wires = {_key(row["settings"]): row for row in results.read(folder, "wire")}
    cells: dict[tuple[str, str], list[str]] = {}
    for row in measured_rows(folder):
        own = row["settings"]
        title = f"{own['model']}, {own['dtype']}, {own['division']} ×{own['devices']}"
        for method in own["methods"]:
            label, alone = tables.on(method, own["devices"]), tables.alone(method)
            # What full size takes stands beside all methods that are compared with it, shown once.
            if label not in row["milliseconds"] or (title, method) in cells:
                continue
            measured = row["milliseconds"][label]
            sent = row["programs"][label]["sent_bytes"]
            figures = ["-" if sent is None else f"{sent / 1e9:.1f}", "-", f"{measured:.1f}"]
            wire = wires.get(_key(own | {"method": method}))
            predicted = ["-", "-"]
            if wire:
                compute = row["milliseconds"].get(alone, math.nan) / 1e3
                step = links.step(
                    traffic_of(wire), own["division"], own["devices"], own["accumulate"],
                    compute, given,
                )  # fmt: skip
                figures[1] = f"{(step.bytes_within + step.bytes_across) / 1e9:.1f}"
                if alone in row["milliseconds"]:
                    each = 1e3 / own["accumulate"]
                    predicted = [f"{step.overlapped * each:.1f}", f"{step.apart * each:.1f}"]
            ratios = (
                tables.ratio(row, label, tables.on("full", own["devices"])),
                tables.efficiency(row, method),
            )
            cells[title, method] = [*figures, *predicted, *map(tables.shown, ratios)]
    header = ["", "method", "GB sent", "predicted", "ms", "predicted: overlapped", "apart"]
    header += ["÷ full", "efficiency"]
    rows = [[*key, *figures] for key, figures in cells.items()]
    return tables.table(header, rows, 2) if rows else "Not yet run."


def measured_rows(folder: Path) -> list[Row]:
    """The newest of each case and number of devices, but those of which nothing could be."""
    newest = {str(row["settings"]): row for row in results.read(folder, "scaling")}
    rows = [row for row in newest.values() if "error" not in row]
    return sorted(rows, key=lambda r: [r["settings"][k] for k in ("model", "division", "devices")])


def _key(settings: dict[str, Any]) -> tuple[Any, ...]:
    names = ("model", "dtype", "batch", "length", "rank", "division", "method")
    return tuple(settings[name] for name in names)


def assumptions(given: Links | None = None) -> str:
    return f"Assumed: {(given or Links()).describe()}."


def block(folder: Path, table: Callable[[Path, str], str]) -> str:
    """A table for each model on paper."""
    own = {model: table(folder, model) for model in MODELS}
    return "\n\n".join(f"{name}:\n\n{text}" for name, text in own.items())


MODELS = ("llama-7b", "llama-70b")
