"""What was measured: a line of JSON per row of a table, with what is needed to measure it again."""

import datetime
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
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
    """All rows of one benchmark, the oldest first."""
    file = folder / f"{benchmark}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def latest(folder: Path, benchmark: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The newest row with these settings, and possibly others."""
    rows = [r for r in read(folder, benchmark) if settings.items() <= r["settings"].items()]
    return rows[-1] if rows else None


def get(
    folder: Path, benchmark: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The newest row with these settings; measured now unless this code was, on this device."""
    row = latest(folder, benchmark, settings)
    if row and "error" not in row and row["conditions"] == conditions():
        return row
    row = {
        "settings": settings,
        **measure(),
        "conditions": conditions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{benchmark}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def isolated(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Measure in a fresh process: what is left on the device goes with it, and so does a failure.

    That something cannot run, or not in this memory, is a result too.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, *args).result()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def conditions() -> dict[str, str]:
    """Device, versions, and a hash of the code: rows are comparable where these are equal."""
    library = sorted((REPOSITORY / "src/florax").glob("*.py"))
    own = [HERE / f"{name}.py" for name in ("models", "methods", "steps")]
    code = b"".join(file.read_bytes() for file in [*library, *own])
    return {
        "device": device(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "source": hashlib.sha256(code).hexdigest()[:8],
    }


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
