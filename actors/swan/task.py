"""A training loop as the engine sees it: step ends, time between them, state to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from actors.swan.checkpoint import CheckpointFolder, random_state, restore_random_state
from raysys.errors import DataError

if TYPE_CHECKING:
    from actors.swan.engine import Swan


class TrainingTask:
    """One task; made by :meth:`Swan.training`.

    Attributes:
        steps: steps finished, those before a resume included.
        resumed: whether a checkpoint was found.
    """

    def __init__(
        self,
        engine: Swan,
        parts: Mapping[str, Any],
        store: CheckpointFolder | None,
        checkpoint_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.steps = 0
        self.resumed = False
        self._engine, self._parts, self._store = engine, parts, store
        self._checkpoint_s, self._clock = checkpoint_s, clock
        self._began_s = self._saved_s = clock()
        self._saved_step = -1
        self._run = 0
        self._size = 0.0

    def step_end(self, samples: int = 0, loss: float = 0.0) -> None:
        """The step has ended: account for it, make moves, save when due, wait while paused.

        Args:
            samples: samples or tokens of the step, for tasks whose steps differ in size; times
                are then compared per sample.
            loss: checked when given.

        Raises:
            ConfigError: the loss is NaN or infinite; nothing is saved from then on.
        """
        if not math.isfinite(loss):
            self._store = None
            self._engine.report_divergence(loss)
        self.steps += 1
        self._run += 1
        self._size += samples
        now_s = self._clock()
        passed_s = now_s - self._began_s
        if passed_s >= self._engine.config.min_step_s:
            units = self._size if samples else self._run
            self._engine.step_end(passed_s / units, self._run)
            self._run, self._size = 0, 0.0
            self._began_s = self._clock()
        if self._store is not None and now_s - self._saved_s >= self._checkpoint_s:
            self.save()
            self._began_s = self._clock()
        before_s = self._clock()
        self._engine.hold(self.save)
        if self._clock() - before_s > 0.001:
            self._began_s = self._clock()
            self._run, self._size = 0, 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Callback with the signature of transformers' ``TrainerCallback``."""
        self.step_end()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Callback with the signature of Lightning's ``Callback``."""
        self.step_end()

    def save(self) -> None:
        """Write a checkpoint, unless this step has been saved already.

        Raises:
            StorageError: the disk refuses; the last one stays valid.
        """
        self._saved_s = self._clock()
        if self._store is None or self._saved_step == self.steps:
            return
        state: dict[str, Any] = {"steps": self.steps, "random": random_state()}
        state["parts"] = {name: part.state_dict() for name, part in self._parts.items()}
        self._store.save(self.steps, state)
        self._saved_step = self.steps

    def resume(self) -> None:
        """Restore the newest checkpoint, if there is one.

        Raises:
            DataError: it is of other parts, or of a model of another shape.
        """
        found = None if self._store is None else self._store.load()
        if found is None:
            return
        self.steps, state = found
        held = state["parts"]
        if set(held) != set(self._parts):
            reason = f"holds {sorted(held)}, the task has {sorted(self._parts)}"
            raise DataError("checkpoint", reason, "Give the task's own folder")
        for name, part in self._parts.items():
            try:
                part.load_state_dict(held[name])
            except (RuntimeError, ValueError, KeyError) as error:
                reason = f"{name} does not fit ({str(error)[:200]})"
                raise DataError("checkpoint", reason, "Give the model of this checkpoint") from (
                    error
                )
        restore_random_state(state["random"])
        self._saved_step = self.steps
        self.resumed = True
