"""The tables of what was measured, in Markdown, a function a benchmark."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]  # of the results


def memory(rows: list[Row]) -> str:
    """In MiB; compile time also against that of `full`."""
    rows, failures = _split(rows)
    full = [r["compile_seconds"] for r in rows if r["settings"]["method"] == "full"]
    cells = []
    for r in rows:
        sizes = [r["state_bytes"], r["temporary_bytes"], beyond(r), r["peak_bytes"]]
        seconds = r["compile_seconds"]
        times = [f"{seconds:.1f}", f"{seconds / full[0]:.2f}" if full else "-"]
        sizes = map(mebibytes, [*sizes, r.get("device_peak_bytes")])
        cells.append([r["settings"]["method"], *sizes, *times])
    header = ["method", "state", "temporaries", "beyond", "peak", "device peak"]
    return failures + table([*header, "compile s", "÷ full"], cells)


def beyond(row: Row) -> int:
    """What the peak adds to the parameters and to Adafactor's state."""
    return row["peak_bytes"] - row["params_bytes"] - row["adafactor_bytes"]


def times(rows: list[Row]) -> str:
    """Of `timing.take_turns`."""
    cells = [
        [name, f"{ms:.2f}", f"{row['ratio'][name]:.3f}"]
        for row in rows
        for name, ms in row["milliseconds"].items()
    ]
    return table(["method", "ms", f"÷ {rows[0]['against']}"], cells)


def allreduce(rows: list[Row]) -> str:
    cells = []
    for r in rows:
        dense, sketched = r["dense_bytes"], r["sketched_bytes"]
        sizes = [f"{x / 2**20:,.2f}" for x in (dense, sketched)]
        ratios = [f"{sketched / dense:.4f}", f"{r['rank_over_side']:.4f}"]
        cells.append([r["settings"]["model"], str(r["settings"]["rank"]), *sizes, *ratios])
    header = ["gradients of", "rank", "dense MiB", "sketched MiB", "ratio", "r / min(n, m)"]
    return table(header, cells)


def scaling(rows: list[Row]) -> str:
    """Of every method on all devices: bytes of an update, milliseconds of a micro-step.

    The efficiency is the time of the same method (of full size for `full-once`) on one device
    divided by that on all.
    """
    rows, failures = _split(rows)
    cells = []
    for r in rows:
        devices, settings = r["settings"]["devices"], r["settings"]
        title = f"{settings['model']} {settings['division']} ×{devices}"
        failures += "".join(f"{title}, {name}: {text}\n" for name, text in r["errors"].items())
        for method in settings["methods"]:
            label = on(method, devices)
            if (own := r["programs"].get(label)) is None:
                continue
            sizes = [mebibytes(own[f"{name}_bytes"]) for name in ("payload", "sent", "peak")]
            times = [
                f"{r['milliseconds'][label]:.2f}",
                shown(ratio(r, label, on("full", devices))),
                shown(efficiency(r, method)),
            ]
            cells.append([title, method, *sizes, *times])
    header = ["", "method", "entering MiB", "sent MiB", "peak MiB", "ms", "÷ full", "efficiency"]
    return failures + table(header, cells, 2)


def compiled(rows: list[Row]) -> str:
    """What is known of programs for several devices that did not run."""
    cells = [
        [
            f"{settings['model']} {settings['dtype']} {settings['division']}",
            name,
            mebibytes(own["sent_bytes"]),
            mebibytes(own["peak_bytes"]),
            f"{own['compile_seconds']:.0f}",
        ]
        for row in rows
        for settings in [row["settings"]]
        for name, own in row.get("programs", {}).items()
    ]
    header = ["", "method", "sent MiB", "peak MiB", "seconds to compile"]
    return table(header, cells, left=2)


def on(method: str, devices: int) -> str:
    """The name in a row of what was measured of a method on so many devices."""
    return f"{method} ×{devices}"


def alone(method: str) -> str:
    """The same on one device, where there is nothing to sum once."""
    return on(method.removesuffix("-once"), 1)


def efficiency(row: Row, method: str) -> float | None:
    """The time on one device ÷ the time on all."""
    return ratio(row, alone(method), on(method, row["settings"]["devices"]))


def ratio(row: Row, name: str, against: str) -> float | None:
    """The median of the rounds' ratios, if both were measured."""
    pairs = [(r[name], r[against]) for r in row["rounds"] if name in r and against in r]
    return statistics.median(x / y for x, y in pairs) if pairs else None


def shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def wire(rows: list[Row]) -> str:
    """Bytes that enter collectives on one device, and how many run."""
    cells = []
    for r in rows:
        for own in r["traffic"]:
            name = [r["settings"]["method"], own["kind"], own["spans"], own["each"]]
            sizes = [mebibytes(own[kind]) for kind in ("fixed", "divided")]
            cells.append([*name, *sizes, f"{own['count']:,.0f}"])
    header = ["method", "collective", "among", "in each", "MiB", "MiB ÷ parts", "count"]
    return table(header, cells, 4)


def peers(rows: list[Row]) -> str:
    rows, failures = _split(rows)
    cells = [
        [
            r["settings"]["method"],
            mebibytes(r["device_peak_bytes"]),
            f"{r['micro_step_ms']:.1f}",
            f"{r['first_update_seconds']:.1f}",
        ]
        for r in rows
    ]
    header = ["PyTorch", "peak MiB", "micro-step ms", "first update s"]
    return failures + table(header, cells)


def host_time(rows: list[Row]) -> str:
    cells = [[name, f"{ms:.1f}"] for r in rows for name, ms in r["milliseconds"].items()]
    return table(["on the host", "ms of the processor"], cells)


def compile_time(rows: list[Row]) -> str:
    """Against the first row, and what the compiled program holds in MiB."""
    rows, failures = _split(rows)
    cells = []
    for r in rows:
        times = [f"{r['seconds']:.1f}", f"{r['processor_seconds']:.1f}"]
        ratios = [
            f"{r['processor_seconds'] / against['processor_seconds']:.2f}" if against else "-"
            for against in (
                _of(rows, "ema" if _of(rows, "ema") else "plain"),
                _of(rows, "multisteps"),
            )
        ]
        sizes = [mebibytes(r["temporary_bytes"]), mebibytes(r["peak_bytes"])]
        cells.append([r["settings"]["method"], *times, *ratios, *sizes])
    without = "÷ ema" if _of(rows, "ema") else "÷ plain"
    header = ["method", "clock s", "processor s", without, "÷ multisteps", "temporaries", "peak"]
    return failures + table(header, cells)


def footprint(rows: list[Row]) -> str:
    """In MiB; ΔM is against `none`."""
    rows, failures = _split(rows)
    none = next((r for r in rows if is_floor(r)), None)
    cells = []
    for r in rows:
        names = ("parameter", "adapter", "optimizer", "accumulator", "temporary", "peak")
        sizes = [mebibytes(r[f"{name}_bytes"]) for name in names]
        more = mebibytes(r["peak_bytes"] - none["peak_bytes"]) if none else "-"
        cells.append(
            [r["settings"]["variant"], *sizes, more, mebibytes(r.get("device_peak_bytes"))]
        )
    kinds = ["parameters", "adapters", "state", "accumulator", "temporaries", "peak"]
    return failures + table(["variant", *kinds, "ΔM", "device peak"], cells)


def is_floor(row: Row) -> bool:
    """Whether it has neither accumulator nor momentum, nor another base than Adafactor."""
    return row["settings"]["variant"] in ("none", "unfactored/none")


def pilot(rows: list[Row]) -> str:
    """The means of the seeds, and how far these are apart."""
    cells = []
    for method in rows[0]["methods"]:
        own = [r["methods"][method] for r in rows]
        losses = [r["training"][-1] for r in own]
        means = [statistics.mean(r[name] for r in own) for name in ("test_loss", "accuracy")]
        spread = max(losses) - min(losses)
        figures = [f"{x:.3f}" for x in (statistics.mean(losses), spread, means[0])]
        cells.append([method, *figures, f"{means[1]:.1f}"])
    return table(["method", "training loss", "spread", "test loss", "accuracy %"], cells)


def quality(rows: list[Row]) -> str:
    """The fewest bytes last; of the scores the means of the seeds."""
    rows = sorted(rows, key=lambda r: (-state_bytes(r), r["settings"]["resample_every"]))
    names = list(rows[0]["scores"])
    kappas = {r["settings"]["resample_every"] for r in rows}
    cells = [
        [
            r["settings"]["variant"],
            *([f"{r['settings']['resample_every']:,}"] if len(kappas) > 1 else []),
            f"{state_bytes(r) / r['parameter_bytes']:.4f}",
            mebibytes(r["accumulator_bytes"]),
            mebibytes(r["optimizer_bytes"]),
            *_losses(r["losses"], r["learning_rate"]),
            *(f"{statistics.mean(r['scores'][name]):.1f}" for name in names),
            "-" if r["update_ms"] is None else f"{r['update_ms']:.1f}",
        ]
        for r in rows
    ]
    header = ["variant", *(["κ"] if len(kappas) > 1 else []), "share", "accumulator MiB"]
    header += ["other state MiB", "test loss", "spread", "rate", *names, "ms an update"]
    return table(header, cells)


def _losses(losses: list[float], rate: float) -> tuple[str, str, str]:
    """Their mean, how far they are apart, and at which learning rate."""
    mean = statistics.mean(losses)
    if not math.isfinite(mean):
        return "diverges", "-", "-"
    return f"{mean:.3f}", f"{max(losses) - min(losses):.3f}", f"{rate:g}"


def state_bytes(row: Row) -> int:
    """What a variant of `quality` keeps beside the parameters."""
    return row["accumulator_bytes"] + row["optimizer_bytes"]


def translation(rows: list[Row]) -> str:
    """The means of the seeds; bytes against those of the parameters."""
    return _scores(rows, "BLEU")


def summarization(rows: list[Row]) -> str:
    """The same."""
    return _scores(rows, "rougeL")


def _scores(rows: list[Row], score: str) -> str:
    rows, failures = _split(rows)
    variants: dict[str, list[Row]] = {}
    for r in rows:
        variants.setdefault(r["settings"]["variant"], []).append(r)
    cells = []
    for variant, own in variants.items():
        scores = [r[score] for r in own]
        shares = [
            own[0][f"{n}_bytes"] / own[0]["parameter_bytes"] for n in ("accumulator", "optimizer")
        ]
        loss = statistics.mean(r["test_loss"] for r in own)
        figures = [
            f"{loss:.3f}",
            f"{statistics.mean(scores):.1f}",
            f"{min(scores):.1f} to {max(scores):.1f}",
        ]
        cells.append([variant, *(f"{x:.3f}" for x in shares), *figures, str(len(own))])
    header = ["variant", "accumulator", "other state", "test loss", score, "", "seeds"]
    return failures + table(header, cells)


def _of(rows: list[Row], method: str) -> Row | None:
    return next((r for r in rows if r["settings"]["method"] == method), None)


OF = {
    "memory": memory,
    "speed": times,
    "momentum": times,
    "finish": times,
    "main_job": times,
    "allreduce": allreduce,
    "scaling": scaling,
    "compiled": compiled,
    "wire": wire,
    "peers": peers,
    "host_time": host_time,
    "compile_time": compile_time,
    "translation": translation,
    "summarization": summarization,
    "quality": quality,
    "footprint": footprint,
    "pilot": pilot,
}


def _split(rows: list[Row]) -> tuple[list[Row], str]:
    """The rows of what could be measured, and lines that say why others could not."""
    failed = [(r["settings"], r["error"]) for r in rows if "error" in r]
    names = ("method", "variant", "model")  # of which a benchmark has one that tells rows apart
    failures = [f"{next(s[name] for name in names if name in s)}: {error}\n" for s, error in failed]
    return [r for r in rows if "error" not in r], "".join(failures)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns: the first `left` of them to the left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * (width - 1) + ("-" if i < left else ":") for i, width in enumerate(widths)]
    lines = []
    for cells in [header, rule, *rows]:
        aligned = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("| " + " | ".join(aligned) + " |")
    return "\n".join(lines)


def mebibytes(size: float | None) -> str:
    if size is None:
        return "-"
    size /= 2**20
    return f"{size:,.0f}" if abs(size) >= 20 or size == 0 else f"{size:.2f}"
