"""What do sketches save on the wire, and in time, on several devices?

    python benchmarks/scaling.py --part measure    # on all devices of this host
    python benchmarks/scaling.py --part compile    # the same, but nothing runs: bytes alone
    python benchmarks/scaling.py --part predict    # on thousands, on paper

Every device has as many rows of a micro-batch, on one device as on all (weak scaling), so that an
efficiency is the time on one divided by that on all. Bytes are counted in the compiled program.
With JAX_COMPILATION_CACHE_DIR set, what `--part compile` has compiled, of several rows at the same
time if these are told apart by `--only`, is not compiled again by `--part measure`.

On paper, bytes are those of programs that are compiled for 8 and 16 devices of the CPU, without an
array; times are those of a model of links, whose assumptions are printed.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from florax_benchmarks import (
    collectives,
    divided,
    links,
    models,
    predicted,
    results,
    tables,
    timing,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the results: methods that take turns, each on all devices and some on one."""

    model: str
    dtype: str
    batch: int  # rows of a micro-batch on one device
    length: int  # tokens of a row
    accumulate: int  # micro-batches an update
    rank: int
    division: str
    methods: tuple[str, ...]  # on all devices
    alone: tuple[str, ...]  # on one

    @property
    def title(self) -> str:
        return f"{self.model} {self.dtype} {self.batch}×{self.length} {self.division}"

    def settings(self, part: str, devices: int) -> dict[str, Any]:
        """What identifies a row of the results."""
        own = dataclasses.asdict(self)
        lists = {name: list(own[name]) for name in ("methods", "alone")}
        return {"part": part, "devices": devices, **own, **lists}


DATA = ("full", "full-once", "sketched", "sketched-once")
BOTH = ("full", "sketched")
XL = ("gpt2-xl", "float32", 1, 512, 16, 256)
LLAMA = ("llama-7b", "bfloat16", 16, 256, 4, 256)
CASES = {
    "real": (  # the most important first
        Case(*XL, "data", DATA, BOTH),
        Case(*XL, "fsdp", (*BOTH, "sketched-int8"), BOTH),
        Case(*LLAMA, "fsdp", BOTH, BOTH),
        Case(*XL, "data", ("full", "both-int8"), ("both-int8",)),
        Case(*LLAMA, "data", DATA, BOTH),
    ),
    "tiny": (
        Case("gpt2-tiny", "float32", 1, 64, 4, 32, "data", DATA, BOTH),
        Case("llama-tiny", "bfloat16", 2, 64, 2, 16, "fsdp", BOTH, ("full",)),
        Case("gpt2-tiny", "float32", 1, 64, 4, 32, "data", ("full", "both-int8"), ()),
    ),
}
PAPER = (
    *(Case("llama-7b", "bfloat16", 1, 2048, 1, 256, d, m, ()) for d, m in
      (("data", DATA), ("fsdp", BOTH), ("hybrid", BOTH))),
    *(Case("llama-70b", "bfloat16", 1, 2048, 1, 512, d, BOTH, ()) for d in ("fsdp", "hybrid")),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    part: Literal["measure", "compile", "predict"] = "measure"  # what to do
    size: Literal["real", "tiny"] = "real"  # of the models; tiny ones to try the script
    only: str = ""  # only rows with this text in their title, as in "llama-7b fsdp"
    rounds: int = 3  # timed updates of each method, after one that is not
    limit: float = 270.0  # seconds, after which no further row is begun
    results: Path = results.FOLDER  # folder for the JSON; what it has is not measured again


class Compiled:
    """A method's compiled step on one mesh, with what it starts from, and what is known of it."""

    def __init__(self, program: divided.Program, devices: int, vocabulary: int):
        start = time.perf_counter()
        self.step, self.init, self.devices = program.lowered.compile(), program.init, devices
        seconds = time.perf_counter() - start
        shardings = jax.tree.map(lambda x: x.sharding, (program.params, program.batches))

        def draw(key: jax.Array) -> tuple[Any, Any]:
            tokens = functools.partial(jax.random.randint, key, minval=0, maxval=vocabulary)
            batches = jax.tree.map(lambda x: tokens(x.shape).astype(x.dtype), program.batches)
            return models.random_parameters(program.params, key), batches

        self.draw = jax.jit(draw, out_shardings=shardings)
        memory = self.step.memory_analysis()
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        self.peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
        self.figures = {
            **_wire(self.step.as_text(), devices),
            "peak_bytes": self.peak,
            "compile_seconds": round(seconds, 1),
        }


def _wire(text: str, devices: int) -> dict[str, Any]:
    """What a compiled program sends in an update, and the largest of its collectives."""
    try:
        found = collectives.read(text, devices)
    except ValueError as error:  # its time can be measured all the same
        return {"payload_bytes": None, "sent_bytes": None, "unread": str(error)}
    largest = sorted(found, key=lambda own: -own.payload)[:12]
    return {
        "payload_bytes": collectives.payload(found),
        "sent_bytes": round(collectives.sent(found)),
        "collectives": collectives.by_kind(found),
        "largest": [own._asdict() for own in largest],
    }


class Turns:
    """Lets methods train in turn on parameters that they hand on: one set is alive at a time."""

    def __init__(self, steps: dict[str, Compiled]):
        self.steps = steps
        self.states: dict[str, Any] = {}
        self.devices, self.params, self.batches = 0, None, None

    def update(self, name: str) -> float:
        """Train for one update; its seconds a micro-step."""
        own = self.steps[name]
        if self.devices != own.devices:
            self.params = self.batches = None  # frees them first
            self.params, self.batches = own.draw(jax.random.key(0))
            self.devices = own.devices
        if name not in self.states:
            self.states[name] = own.init(self.params)
        jax.block_until_ready((self.params, self.states[name], self.batches))
        start = time.perf_counter()
        loss, self.params, self.states[name] = own.step(
            self.params, self.states[name], self.batches
        )
        loss = float(loss)
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise ValueError(f"{name}: the loss is {loss}")
        return seconds / len(jax.tree.leaves(self.batches)[0])

    def forget(self, name: str) -> None:
        """After a failure, which may have taken parameters and state with it."""
        self.states.pop(name, None)
        self.devices, self.params, self.batches = 0, None, None


def measure(case: Case, rounds: int | None, known: str | None) -> dict[str, Any] | None:
    """Of one row; without rounds what is known of the compiled programs alone."""
    every = jax.device_count()
    shape, dtype = models.SHAPES[case.model], jnp.dtype(case.dtype)

    def lower(method: str, devices: int) -> divided.Program:
        sizes = (case.batch, case.length, case.accumulate, case.rank)
        mesh = divided.mesh_of(devices)
        return divided.lower(method, case.division, mesh, shape, dtype, *sizes)

    named = [(name, every) for name in case.methods] + [(name, 1) for name in case.alone]
    devices = {tables.on(name, count): count for name, count in named}
    programs = {tables.on(name, count): lower(name, count) for name, count in named}
    program = results.fingerprint(*(x.lowered for x in programs.values()))
    if program == known:
        return None
    steps, errors = _compiled(programs, devices, shape.vocabulary)
    turns = Turns(steps)
    for name in [*steps] if rounds else ():
        if error := _failure(lambda name=name: _first(turns, name)):
            errors[name] = error
            turns.forget(name)
            del steps[name]
    figures = {name: own.figures for name, own in steps.items()}
    common = {"program": program, "programs": figures, "errors": errors}
    if not steps:
        return common | {"error": next(iter(errors.values()))}
    if not rounds:
        return common
    updates = {name: functools.partial(turns.update, name) for name in steps}
    return common | timing.take_turns(updates, rounds, warmup=0)


def _compiled(
    programs: dict[str, divided.Program], devices: dict[str, int], vocabulary: int
) -> tuple[dict[str, Compiled], dict[str, str]]:
    """What compiles, several at once, and why the others do not."""
    steps: dict[str, Compiled] = {}
    errors: dict[str, str] = {}

    def compile_one(name: str) -> None:
        def compiled() -> None:
            steps[name] = Compiled(programs[name], devices[name], vocabulary)

        if error := _failure(compiled):
            errors[name] = error

    with ThreadPoolExecutor(len(programs)) as pool:
        [*pool.map(compile_one, programs)]
    return {name: steps[name] for name in programs if name in steps}, errors


def _first(turns: Turns, name: str) -> None:
    """An update that is not timed, unless its memory is known not to suffice."""
    limit = memory_limit()
    own = turns.steps[name]
    others = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(turns.states))
    if own.peak + others > limit:
        needs = f"{own.peak / 2**30:.1f} GiB, beside the others' {others / 2**30:.1f}"
        raise MemoryError(f"needs {needs}; the device has {limit / 2**30:.1f}")
    turns.update(name)


def memory_limit() -> float:
    """Bytes that a device has; CPUs do not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)


def _failure(work: Callable[[], None]) -> str | None:
    """Why it failed, in a line, or None: that something does not fit is a result too."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def count_devices() -> dict[str, Any]:
    return {"count": jax.device_count(), "kind": jax.devices()[0].device_kind}


# On paper.

HOST = 8  # devices of a host
COUNTED = 7  # micro-batches: no number of layers, so that what runs in each is told from these


def compiled_bytes(case: Case, method: str, known: str | None) -> dict[str, Any] | None:
    """What enters the collectives of a method's compiled program, on any number of devices."""
    # Where all devices have a part of the parameters each, from two numbers of parts.
    meshes = [(HOST, 2)] if case.division == "hybrid" else [(HOST, 1)]
    meshes += [(2 * HOST, 1)] if case.division == "fsdp" else []
    lowered = [
        divided.lower(
            method, case.division, divided.mesh_of(*sizes), models.SHAPES[case.model],
            jnp.dtype(case.dtype), case.batch, case.length, COUNTED, case.rank,
        ).lowered
        for sizes in meshes
    ]  # fmt: skip
    if (program := results.fingerprint(*lowered)) == known:
        return None
    counted = [
        _traffic(own.compile().as_text(), case.division, *sizes)
        for own, sizes in zip(lowered, meshes, strict=True)
    ]
    if case.division == "fsdp":
        fitted = fit(*counted, HOST)
    else:
        fitted = [links.Traffic(*key, size, 0, count) for key, (size, count) in counted[0].items()]
    traffic = [own._asdict() for own in fitted if own.bytes(HOST) >= 1]
    return {"program": program, "traffic": traffic}


Counted: TypeAlias = dict[tuple[str, str, str], tuple[float, float]]


def _traffic(text: str, division: str, devices: int, hosts: int) -> Counted:
    """Bytes and collectives by kind, by the devices among which, and by how often."""
    found = collectives.read(text, devices * hosts, devices, as_on_gpus=True)
    totals: Counted = {}
    for own in found:
        spans = "devices" if own.hosts == 1 else "hosts" if own.hosts == own.group else "all"
        in_each = own.times % COUNTED == 0
        key = (
            own.kind,
            spans if division == "hybrid" else "all",
            "micro-batch" if in_each else "update",
        )
        times = own.times / COUNTED if in_each else own.times
        size, count = totals.get(key, (0.0, 0.0))
        totals[key] = (size + own.bytes * times, count + times)
    return totals


def fit(some: Counted, twice: Counted, parts: int) -> list[links.Traffic]:
    """Of bytes with so many parts of the parameters, and with twice as many: a + b / parts."""
    traffic = []
    for key in {**some, **twice}:
        (few, count), (many, count_of_many) = (own.get(key, (0.0, 0.0)) for own in (some, twice))
        sizes = (2 * many - few, 2 * parts * (few - many))
        traffic.append(links.Traffic(*key, *sizes, max(count, count_of_many)))
    return traffic


def predict(s: Settings) -> None:
    os.environ["FLORAX_DEVICE"] = "cpu"  # compiled for it, not run
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(2 * HOST)
    on_paper = [(case, True) for case in PAPER] if s.size == "real" else []
    for case, paper in [*((case, False) for case in CASES[s.size]), *on_paper]:
        for method in case.methods if s.only in case.title else ():
            settings = case.settings(s.part, 0) | {"method": method, "on_paper": paper}
            for name in ("part", "devices", "accumulate", "methods", "alone"):
                del settings[name]
            isolated = functools.partial(results.isolated, compiled_bytes, case, method)
            row = results.get_of_program(s.results, "wire", settings, isolated)
            print(f"{case.title} {method}: {row.get('error', 'counted')}", flush=True)
    print(f"\n{predicted.assumptions()}")
    for model in predicted.MODELS:
        each = f"{predicted.EACH} micro-batches of 2,048 tokens an update"
        print(f"\n{model}, {each}:\n{predicted.steps(s.results, model)}")
        print(f"\nwhere sketches save less than 5%:\n{predicted.ends(s.results, model)}")
    print(f"\nmeasured, beside what is predicted:\n{predicted.beside(s.results)}")


def measure_all(s: Settings) -> None:
    end = time.monotonic() + s.limit
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    here = results.isolated(count_devices)  # this process leaves the devices to the rows'
    if "error" in here:
        raise ValueError(here["error"])
    os.environ["FLORAX_DEVICE"] = f"{here['count']} × {here['kind']}"
    rows = []
    for case in CASES[s.size]:
        if s.only not in case.title:
            continue
        if time.monotonic() > end:
            print(f"not begun in {s.limit:.0f} seconds: {case.title}")
            continue
        start = time.monotonic()
        rounds = s.rounds if s.part == "measure" else None
        isolated = functools.partial(results.isolated, measure, case, rounds)
        settings = case.settings(s.part, here["count"])
        file = {"measure": "scaling", "compile": "compiled"}[s.part]
        row = results.get_of_program(s.results, file, settings, isolated)
        print(f"{case.title}: {time.monotonic() - start:.0f} seconds", flush=True)
        rows.append(row)
        print(f"{tables.OF[file](rows[-1:])}\n", flush=True)
    if len(rows) > 1:
        print(tables.OF[file](rows))


def main(s: Settings) -> None:
    (predict if s.part == "predict" else measure_all)(s)


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))
