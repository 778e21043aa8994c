"""One table of what florax saves and costs, of the rows in the results folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from florax_benchmarks import results, tables
from florax_benchmarks.tables import Row


def workload(model: str, dtype: str, batch: int, length: int, rank: int = 256) -> dict[str, Any]:
    return {"model": model, "dtype": dtype, "batch": batch, "length": length, "rank": rank}


XL32 = workload("gpt2-xl", "float32", 1, 512)
XL16 = workload("gpt2-xl", "bfloat16", 8, 512)
LLAMA = workload("llama-7b", "bfloat16", 16, 256)
LLAMA_1024 = workload("llama-7b", "bfloat16", 16, 256, rank=1024)
T5 = workload("t5-3b", "float32", 1, 128)
MOMENTUM = {"model": "gpt2-xl", "dtype": "float32", "rank": 256}
PAPER_7B = 21.2 * 2**10  # MiB, which FLORA's paper reports for the LLaMA of its Figure 2


class Figures:
    """Figures of the newest rows of a results folder; None where there is no row."""

    def __init__(self, folder: Path):
        self.folder = folder

    def one(self, benchmark: str, settings: dict[str, Any], take: Callable[[Row], Any]) -> Any:
        row = results.latest(self.folder, benchmark, settings)
        return take(row) if row and "error" not in row else None

    def memory(self, settings: dict[str, Any], take: Any, florax: str = "sketched") -> list[Any]:
        methods = ("none", "full", "dense", florax)
        return [self.one("memory", settings | {"method": m}, take) for m in methods]

    def micro_step(self, settings: dict[str, Any], florax: str = "sketched") -> list[Any]:
        return [None, 1, None, self.times("speed", settings, "ratio")(florax)]

    def times(
        self, benchmark: str, settings: dict[str, Any], kind: str
    ) -> Callable[[str], float | None]:
        """By method, from the newest row that has it: not every one takes turns with all others."""
        rows = results.read(self.folder, benchmark)
        own = [r for r in rows if settings.items() <= r["settings"].items() and kind in r]
        return {method: x for r in own for method, x in r[kind].items()}.get


def table(folder: Path) -> str:
    """Beside florax no accumulation, full-size buffers, FLORA as in the paper, and elsewhere."""
    figures = Figures(folder)
    figure, memory, micro_step = figures.one, figures.memory, figures.micro_step

    def flora_opt(take: Callable[[Row], Any]) -> Any:
        return figure("peers", XL32 | {"method": "flora-opt"}, take)

    torch_full = figure("peers", XL32 | {"method": "full"}, micro_step_ms)
    torch_ratio = ratio(flora_opt(micro_step_ms), torch_full)
    compiled = memory(XL32, lambda r: r["compile_seconds"])
    ema, flora_momentum = (
        figure("momentum", MOMENTUM, lambda r, name=name: r["milliseconds"][name])
        for name in ("optax.ema", "cosine, residual")
    )
    finish = figures.times("finish", XL32, "milliseconds")
    reduced = figure("allreduce", {}, lambda r: r["sketched_bytes"] / r["dense_bytes"])
    rows = [
        ("GPT-2-XL, float32, 1×512: beyond", *memory(XL32, beyond)),
        ("  peak", *memory(XL32, peak), flora_opt(peak)),
        ("  micro-step ÷ full", *micro_step(XL32), torch_ratio),
        ("  compile time ÷ full", *(ratio(seconds, compiled[1]) for seconds in compiled)),
        ("  momentum alone, ms an update", None, ema, None, flora_momentum),
        ("  sketches in 8 bits: beyond", *memory(XL32, beyond, "sketched-int8")),
        ("    micro-step ÷ full", *micro_step(XL32, "sketched-int8")),
        ("  both sides: beyond", *memory(XL32, beyond, "both")),
        ("    micro-step ÷ full", *micro_step(XL32, "both")),
        ("    an update without micro-batches, ms", None, finish("full"), None, finish("both")),
        ("  both sides in 8 bits: beyond", *memory(XL32, beyond, "both-int8")),
        ("    micro-step ÷ full", *micro_step(XL32, "both-int8")),
        ("  full size in 8 bits: beyond", *memory(XL32, beyond, "whole-int8")),
        ("    micro-step ÷ full", *micro_step(XL32, "whole-int8")),
        ("  full size in 4 bits: beyond", *memory(XL32, beyond, "whole-int4")),
        ("    micro-step ÷ full", *micro_step(XL32, "whole-int4")),
        ("GPT-2-XL, bfloat16, 8×512: beyond", *memory(XL16, beyond)),
        ("  micro-step ÷ full", *micro_step(XL16)),
        ("LLaMA-7B, bfloat16, 16×256: peak", *memory(LLAMA, peak)),
        ("  micro-step ÷ full", *micro_step(LLAMA)),
        ("  layerwise, ×16: peak", *memory(LLAMA, peak, "layerwise-accumulate")),
        ("  layerwise, momentum: peak", *memory(LLAMA, peak, "layerwise"), PAPER_7B),
        ("  the same, r = 1024", *memory(LLAMA_1024, peak, "layerwise")),
        ("  the same, r = 1024 in 8 bits", *memory(LLAMA_1024, peak, "layerwise-int8")),
        ("T5-3B, float32, 1×512→128: peak", *memory(T5, peak)),
        ("GPT-2-XL, 8 devices: bytes reduced ÷ full", None, 1, None, reduced),
        (
            "examples/gpt2.py, CPU: micro-step ÷ full",
            None,
            1,
            None,
            figures.times("main_job", {}, "ratio")("sketched"),
        ),
    ]
    header = ["r = 256, ×16; memory in MiB", "none", "full", "dense", "florax", "elsewhere"]
    cells = [[label, *map(number, figures)] for label, *figures in rows]
    return tables.table(header, [row + ["-"] * (len(header) - len(row)) for row in cells])


def beyond(row: Row) -> float:
    return tables.beyond(row) / 2**20


def peak(row: Row) -> float:
    """As the device reports it where it ran, else as compiled."""
    return (row.get("device_peak_bytes") or row["peak_bytes"]) / 2**20


def micro_step_ms(row: Row) -> float:
    return row["micro_step_ms"]


def ratio(x: float | None, base: float | None) -> float | None:
    return None if x is None or base is None else x / base


def number(x: float | None) -> str:
    return "-" if x is None else f"{x:,.0f}" if abs(x) >= 100 or x == int(x) else f"{x:.2f}"
