"""States of the contest's trainings on disk, so that a long contest goes on from where it stopped.

A training is a :class:`~raysys.training.lte.stage.Stage`, which can stop and go on at any step;
here its state is written every some steps, complete or not at all. A resumed training equals one
that was never interrupted.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raysys.errors import DataError, StorageError
from raysys.training.lte.stage import Stage

SAVE_EVERY = 60  # steps; two to three minutes of one core for ten million parameters


class States:
    """Named states in one folder.

    Args:
        folder: created where it is missing.
        every: steps between states.

    Raises:
        StorageError: the folder cannot be written.
    """

    def __init__(self, folder: Path, every: int = SAVE_EVERY) -> None:
        self.folder, self.every = folder, every
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(str(folder), reason, "Give another folder") from error

    def load(self, name: str) -> Any:
        """The state of that name, or None.

        Raises:
            DataError: it is damaged.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            return torch.load(path, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise DataError(str(path), f"damaged ({error})", "Delete it") from error

    def save(self, name: str, state: Any) -> None:
        """Write a state under a temporary name, then rename."""
        try:
            handle, partial = tempfile.mkstemp(dir=self.folder, suffix=".part")
            with os.fdopen(handle, "wb") as file:
                torch.save(state, file)
            os.replace(partial, self._path(name))
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(str(self._path(name)), reason, "Free some space") from error

    def drop(self, name: str) -> None:
        """Forget a state that nobody needs any more."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"


def run_stage(
    stage: Stage,
    name: str,
    states: States | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Train a stage to its end, from the state of that name where ``states`` has one."""
    saved = states.load(name) if states else None
    if saved is not None:
        stage.load_state_dict(saved)
    while not stage.done:
        stage.run(until=stage.step + states.every if states else None, on_step=on_step)
        if states:
            states.save(name, stage.state_dict())
