"""The tables of what was measured, as Markdown, from the JSON in the results folder.

python benchmarks/report.py
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing

import allreduce
import memory
import peers
import results


@dataclasses.dataclass(frozen=True)
class Settings:
    results: Path = results.FOLDER  # folder of the JSON


def workload(model: str, dtype: str, batch: int, length: int, rank: int = 256) -> dict[str, Any]:
    return {"model": model, "dtype": dtype, "batch": batch, "length": length, "rank": rank}


XL32 = workload("gpt2-xl", "float32", 1, 512)
XL16 = workload("gpt2-xl", "bfloat16", 8, 512)
LLAMA = workload("llama-7b", "bfloat16", 16, 256)
LLAMA_1024 = workload("llama-7b", "bfloat16", 16, 256, rank=1024)
T5 = workload("t5-3b", "float32", 1, 128)
MOMENTUM = {"model": "gpt2-xl", "dtype": "float32", "rank": 256}


def targets(folder: Path) -> str:
    """The project's goals beside what was measured; `must` and `stretch` are upper bounds."""

    def figures(
        benchmark: str, settings: dict[str, Any], figure: Callable[[dict[str, Any]], float]
    ) -> list[float]:
        row = results.latest(folder, benchmark, settings)
        return [figure(row)] if row and "error" not in row else []

    def memories(settings: dict[str, Any], figure: Any, florax: str = "sketched") -> list[Any]:
        rows = [
            figures("memory", settings | {"method": m}, figure) for m in ("none", "full", florax)
        ]
        return [row[0] if row else None for row in rows]

    def times(benchmark: str, settings: dict[str, Any], name: str = "sketched") -> list[Any]:
        return [None, 1, *(figures(benchmark, settings, lambda r: r["ratio"][name]) or [None])]

    def against(base: int, figures: list[Any], relation: Callable[[Any, Any], Any]) -> list[Any]:
        known = figures[base] is not None
        return [None if x is None or not known else relation(x, figures[base]) for x in figures]

    momentum = figures("momentum", MOMENTUM, lambda r: r["milliseconds"])
    reduced = figures("allreduce", {}, allreduce.excess)
    compiled = memories(XL32, lambda r: r["compile_seconds"])
    t5 = memories(T5, peak)
    rows = [
        ("GPT-2-XL, float32, 1×512: beyond", memories(XL32, beyond), 2400, 1700),
        ("  micro-step ÷ full", times("speed", XL32), 0.87, 0.78),
        ("GPT-2-XL, bfloat16, 8×512: beyond", memories(XL16, beyond), 2950, 2200),
        ("  micro-step ÷ full", times("speed", XL16), 0.89, 0.80),
        ("LLaMA-7B, bfloat16, 16×256: peak", memories(LLAMA, peak), 18500, 16500),
        ("  micro-step ÷ full", times("speed", LLAMA), 0.79, 0.75),
        ("  layerwise, momentum: peak", memories(LLAMA, peak, "layerwise"), 15600, 15000),
        ("  the same, r = 1024", memories(LLAMA_1024, peak, "layerwise"), 16900, 16400),
        ("  layerwise, ×16: peak", memories(LLAMA, peak, "layerwise-accumulate"), 17400, 16000),
        ("T5-3B, float32, 1×512→128: peak − none", against(0, t5, lambda x, y: x - y), 0, None),
        (
            "flora_momentum, GPT-2-XL, float32: ms",
            [None, *([m[0]["optax.ema"], m[0]["gaussian"]] if (m := momentum) else [None, None])],
            12,
            8,
        ),
        ("bytes all-reduced ÷ (r / min(n, m))", [None, None, *(reduced or [None])], 1.05, None),
        ("compile time ÷ full", against(1, compiled, lambda x, y: x / y), 1.4, 1.15),
        ("examples/gpt2.py, CPU: micro-step ÷ full", times("main_job", {}), 1.0, 0.85),
    ]
    header = ["r = 256, ×16; memory in MiB", "none", "full", "florax", "must", "stretch"]
    return results.table(
        header, [[label, *map(number, [*found, *bounds])] for label, found, *bounds in rows]
    )


def beyond(row: dict[str, Any]) -> float:
    return memory.beyond(row) / 2**20


def peak(row: dict[str, Any]) -> float:
    """As the device reports it where it ran, else as compiled."""
    return (row.get("device_peak_bytes") or row["peak_bytes"]) / 2**20


def number(x: float | None) -> str:
    return "-" if x is None else f"{x:,.0f}" if abs(x) >= 100 or x == int(x) else f"{x:.2f}"


TABLES = {
    "memory": memory.table,
    "speed": timing.table,
    "momentum": timing.table,
    "main_job": timing.table,
    "allreduce": allreduce.table,
    "peers": peers.table,
}


def main(s: Settings) -> None:
    for benchmark, table in TABLES.items():
        groups: dict[str, dict[str, dict[str, Any]]] = {}
        for row in results.read(s.results, benchmark):  # a newer row takes the place of an older
            names = {k: v for k, v in row["settings"].items() if k not in ("method", "methods")}
            title = ", ".join(
                [*(f"{k} {v}" for k, v in names.items()), row["conditions"]["device"]]
            )
            groups.setdefault(title, {})[str(row["settings"])] = row
        for title, rows in groups.items():
            *_, last = rows.values()
            print(f"### {benchmark}: {title}\n\n{table([*rows.values()])}\n")
            print(f"`{last['command']}`, {last['commit']}, {last['date'][:10]}\n")
    print(targets(s.results))


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))
