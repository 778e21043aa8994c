"""What was measured: a line of JSON per row of a table, with what is needed to measure it again."""

import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import optax
import tyro

T = TypeVar("T")

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SCRIPTS = REPOSITORY / "benchmarks"
FOLDER = SCRIPTS / "results"


def read(folder: Path, benchmark: str) -> list[dict[str, Any]]:
    """All rows of one benchmark, the oldest first; what is in them is not to be changed."""
    file = folder / f"{benchmark}.jsonl"
    if not file.exists():
        return []
    state = file.stat()
    return [*_rows(file, state.st_mtime_ns, state.st_size)]


@functools.lru_cache(maxsize=16)
def _rows(file: Path, changed: int, size: int) -> list[dict[str, Any]]:
    return [_as_nan(json.loads(line)) for line in file.read_text().splitlines()]


def _as_null(value: Any) -> Any:
    """With null for what diverged, for JSON has only finite numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _as_null(own) for name, own in value.items()}
    return [_as_null(own) for own in value] if isinstance(value, list | tuple) else value


def _as_nan(value: Any) -> Any:
    """With NaN for null in lists, which are of numbers; elsewhere null is a setting's None."""
    if isinstance(value, dict):
        return {name: _as_nan(own) for name, own in value.items()}
    if not isinstance(value, list):
        return value
    return [math.nan if own is None else _as_nan(own) for own in value]


def latest(folder: Path, benchmark: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The newest row with these settings, and possibly others."""
    rows = [r for r in read(folder, benchmark) if settings.items() <= r["settings"].items()]
    return rows[-1] if rows else None


def get(
    folder: Path, benchmark: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The newest row with these settings; measured now unless this code was, on this device."""
    row, where = latest(folder, benchmark, settings), conditions() | {"source": source()}
    if row and "error" not in row and row["conditions"] == where:
        return row
    return _append(folder, benchmark, settings, measure(), where)


def get_of_program(
    folder: Path,
    benchmark: str,
    settings: dict[str, Any],
    measure: Callable[[str | None], dict[str, Any] | None],
) -> dict[str, Any]:
    """The newest row with these settings; measured now unless the same program was.

    A change of the code that leaves the program as it is so leaves the row what it is.

    Args:
      folder: of the results.
      benchmark: the file's name in it.
      settings: what identifies the row.
      measure: called with the `fingerprint` of the newest row's program, if that ran on this device
        with these versions. It returns None if its own is the same, else figures and `program`.
    """
    row, where = latest(folder, benchmark, settings), conditions()
    valid = row and "error" not in row and where.items() <= row["conditions"].items()
    figures = measure(row["conditions"].get("program") if row and valid else None)
    if figures is None:
        assert row is not None
        return row
    program = {"program": figures.pop("program")} if "program" in figures else {}
    return _append(folder, benchmark, settings, figures, where | program)


def fingerprint(*lowered: jax.stages.Lowered) -> str:
    """Of programs that are not compiled yet: what compiled figures depend on beside conditions."""
    text = "".join(program.as_text() for program in lowered)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _append(
    folder: Path,
    benchmark: str,
    settings: dict[str, Any],
    figures: dict[str, Any],
    where: dict[str, str],
) -> dict[str, Any]:
    row = {
        "settings": settings,
        **figures,
        "conditions": where,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(_command()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{benchmark}.jsonl").open("a") as file:
        file.write(json.dumps(_as_null(row), allow_nan=False) + "\n")
    return row


def _command() -> Iterator[str]:
    """The command line of this process, with a name for every folder that is the user's own."""
    yield from ("python", f"benchmarks/{Path(sys.argv[0]).name}")
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument == "--results":
            next(arguments)
        elif "/" in argument and Path(argument).exists() and not argument.startswith("examples/"):
            yield Path(argument).name.upper()
        else:
            yield argument


def isolated(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Measure in a fresh process: what is left on the device goes with it, and so does a failure.

    That something cannot run, or not in this memory, is a result too.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, *args).result()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def run(command: Sequence[str | Path], limit: float, **options: Any) -> int | None:
    """Run a command for so many seconds at most: its exit status, or None if it was stopped.

    What it has started is stopped with it; `options` are those of `subprocess.Popen`.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        return process.wait(timeout=max(0, limit))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process measures on this device: several may compile meanwhile."""
    name = f"florax-{os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}.lock"
    with (Path(tempfile.gettempdir()) / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def conditions() -> dict[str, str]:
    """Device and versions: rows are comparable where these are equal."""
    return {"device": device(), "jax": jax.__version__, "optax": optax.__version__}


def source() -> str:
    """A hash of the code, for what depends on more of it than a program's text."""
    library = sorted((REPOSITORY / "src/florax").glob("*.py"))
    own = [HERE / f"{name}.py" for name in ("models", "methods", "steps")]
    code = b"".join(file.read_bytes() for file in [*library, *own])
    return hashlib.sha256(code).hexdigest()[:8]


def device() -> str:
    """Asked of a process of its own, once: this one may have to leave the device to others."""
    if "FLORAX_DEVICE" not in os.environ:
        question = [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"]
        answer = subprocess.run(question, capture_output=True, text=True, check=True)
        os.environ["FLORAX_DEVICE"] = answer.stdout.strip()
    return os.environ["FLORAX_DEVICE"]


def commit() -> str:
    """Where the code is no repository, the environment's FLORAX_COMMIT says what it is."""
    if name := os.environ.get("FLORAX_COMMIT"):
        return name
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def settings(kind: type[T], description: str | None) -> T:
    """The settings from the command line; a mistake is one line."""
    try:
        return tyro.cli(kind, description=description)
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
