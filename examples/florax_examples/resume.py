"""Checkpoints from which a run goes on to the same bits, and Ctrl-C that leaves one."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import orbax.checkpoint as ocp

from florax_examples import devices
from florax_examples.models.checkpoints import CheckpointError
from florax_examples.report import human, tree_bytes, write_json

DIGESTS = "digests.json"


class Checkpoints:
    """The last two checkpoints of a run, in a folder of its own.

    Each is a folder named after its step: `state`, which is Orbax's, and `notes.json`. Last of all
    `digests.json` is written, which has the SHA-256 of every other file. So what was cut short or
    has changed since is found out, where Orbax may read other numbers without an error, and the
    checkpoint before it counts.
    """

    def __init__(self, folder: Path):
        self.folder = folder.absolute()

    def exists(self) -> bool:
        """Whether there is a checkpoint that was once complete."""
        return any((self._of(step) / DIGESTS).is_file() for step in self._steps())

    def latest(self) -> int | None:
        """The step of the newest checkpoint that is whole; says which newer ones are not.

        Every process looks for itself: so they agree, or all end.

        Raises:
          CheckpointError: there are checkpoints, and none is whole.
        """
        for step in self._steps():
            damage = _damage(self._of(step))
            if damage is None:
                return step
            if devices.is_first():
                print(f"passing over the checkpoint {self._of(step)}: {damage}", file=sys.stderr)
        if self.exists():
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole: remove that folder to begin anew"
            )
        return None

    def save(self, step: int, state: Any, notes: Mapping[str, Any]) -> None:
        """Keep the arrays of `state`, and `notes`, which JSON can hold.

        The checkpoint before the last one goes first: there is never need of room for a third.

        Raises:
          CheckpointError: it cannot be written; the last one is still there.
        """
        folder = self._of(step)
        try:
            if devices.is_first():
                for old in self._steps()[1:]:
                    shutil.rmtree(self._of(old))
                folder.mkdir(parents=True)
            devices.wait_for_all("there is a folder for the checkpoint")
            _check_room(folder, tree_bytes(state))
            devices.wait_for_all("there is room for the checkpoint")
            with _no_traces(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                checkpointer.save(folder / "state", args=ocp.args.StandardSave(state))
            if devices.is_first():
                write_json(folder / "notes.json", notes)
                write_json(folder / DIGESTS, _digests(folder))
        except FileExistsError as error:  # of a run beside this one, and not ours to remove
            raise CheckpointError(
                f"the checkpoint {folder} is there already: does another run write to this folder?"
            ) from error
        except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
            shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint {folder} cannot be written: {_reason(error)}; what was saved "
                "before is there: add --resume to go on from it"
            ) from error
        devices.wait_for_all("the checkpoint is complete")

    def notes(self, step: int) -> dict[str, Any]:
        return json.loads((self._of(step) / "notes.json").read_text())

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, in the structure of `like` and divided as that is.

        Newer checkpoints, which are not whole, are removed: the run will write them again.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            args = ocp.args.StandardRestore(abstract)
            state = checkpointer.restore(self._of(step) / "state", args=args)
        if devices.is_first():
            for newer in self._steps()[: self._steps().index(step)]:
                shutil.rmtree(self._of(newer))
        devices.wait_for_all("what cannot be used is gone")
        return state

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _of(self, step: int) -> Path:
        return self.folder / str(step)

    def _steps(self) -> list[int]:
        """The newest first, complete or not."""
        names = [path.name for path in self.folder.glob("*")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file, by its path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != DIGESTS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.relative_to(folder).as_posix()] = digest
    return found


def _damage(folder: Path) -> str | None:
    """What a checkpoint lacks; None if it is whole."""
    try:
        expected = json.loads((folder / DIGESTS).read_text())
    except FileNotFoundError:
        return "it was never completed"
    except ValueError:
        return f"{DIGESTS} is no JSON"
    found = _digests(folder)
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    return f"{wrong[0]} is not what was written" if wrong else None


def _check_room(folder: Path, needed: int) -> None:
    """Where Orbax runs out of room in the middle, its threads say so in pages."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"it needs {human(needed)}, and {human(free)} are free")


@contextlib.contextmanager
def _no_traces() -> Iterator[None]:
    """Without Orbax's own words on an error that it raises as well: pages of them."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _reason(error: Exception) -> str:
    """What the system says, which TensorStore has at the end of a long sentence."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else str(error).partition("\n")[0]


class Interruption:
    """Within this context Ctrl-C (or SIGTERM) only raises a flag, so that a step is never cut.

    A second one ends the script at once.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Interruption":
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
