"""Checkpoints from which a run goes on to the same bits, and Ctrl-C that leaves one."""

import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The last checkpoint of a run, in a folder of its own.

    It is complete or not there at all: Orbax writes aside and renames, and drops the one before
    only then.
    """

    def __init__(self, folder: Path):
        self.folder = folder.absolute()

    def exists(self) -> bool:
        return self.folder.is_dir() and bool(ocp.utils.checkpoint_steps(self.folder))

    def save(self, step: int, state: Any, notes: Mapping[str, Any]) -> None:
        """Keep the arrays of `state`, and `notes`, which JSON can hold."""
        with self._manager() as manager:
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(dict(notes))
                ),
            )

    def notes(self) -> dict[str, Any]:
        with self._manager() as manager:
            args = ocp.args.Composite(notes=ocp.args.JsonRestore())
            return dict(manager.restore(manager.latest_step(), args=args)["notes"])

    def restore(self, like: Any) -> Any:
        """The state, in the structure of `like`; its shapes suffice."""
        with self._manager() as manager:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            return manager.restore(manager.latest_step(), args=args)["state"]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self.folder, options=options)


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
