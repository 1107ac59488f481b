"""A training loop as the engine sees it: step ends, time between them, state to keep."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from actors.swan.checkpoint import (
    CheckpointFolder,
    random_state,
    restore_random_state,
    snapshot,
)
from actors.swan.memory import out_of_memory
from raysys.errors import DataError

if TYPE_CHECKING:
    from actors.swan.engine import Swan

Result = TypeVar("Result")


class TrainingTask:
    """One task; made by :meth:`Swan.training`.

    Attributes:
        steps: steps finished, those before a resume included.
        resumed: whether a checkpoint was found.
        stopped: asked while paused; when it says so, the loop goes on, and should end.
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
        self.stopped: Callable[[], bool] = bool
        self._engine, self._parts, self._store = engine, parts, store
        self._checkpoint_s, self._clock = checkpoint_s, clock
        self._began_s = self._saved_s = clock()
        self._saved_step = -1
        self._run = 0
        self._size = 0.0

    @contextlib.contextmanager
    def attached(self, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
        """Let every step of an optimiser end a step for the block; save at its end."""
        handle = None
        if optimizer is not None:
            handle = optimizer.register_step_post_hook(lambda *_: self.step_end())
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
            self.save()

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
        self._engine.hold(self.save, self.stopped)
        if self._clock() - before_s > 0.001:
            self._began_s = self._clock()
            self._run, self._size = 0, 0.0

    def attempt(self, work: Callable[[], Result]) -> Result:
        """Forward and backward pass of one step; out of memory costs the choice, not the task.

        The number of threads in use is never taken again, gradients are cleared, the random
        generators put back, and ``work`` is done again on fewer threads. Batch statistics that a
        failed forward pass has moved stay moved.

        Raises:
            InfeasibleError: memory does not even suffice for the smallest choice.
        """
        put_back = snapshot()
        while True:
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0][:200]
            # Outside of the handler, so that what the failed step held is free by now.
            self._engine.out_of_memory(reason)
            put_back()
            clear = getattr(self._parts.get("optimizer"), "zero_grad", None)
            if clear is not None:
                clear()

    def micro_batches(self, samples: int) -> Iterator[slice]:
        """Parts of a step's samples; under a strict policy moves and pauses happen in between.

        Each part's loss is to be weighted with its share of the samples; gradients add up.
        Otherwise the one part is the whole batch.
        """
        policy = self._engine.config.policy
        parts = min(policy.parts, samples) if policy.strict else 1
        for part in range(parts):
            if part:
                self._engine.between(self.stopped)
            yield slice(part * samples // parts, (part + 1) * samples // parts)

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
