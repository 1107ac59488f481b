"""Reference and controller of knowledge-guided freezing as actors, and the trainer's side of them.

    trainer -- captured Gram matrices, inputs --> ReferenceActor -- plasticity --> trainer
    trainer -- losses, rates, plasticity --> ControllerActor -- decision --> trainer

The trainer is the hub and never waits: one message to each actor may be under way, results are
picked up when they are there, and a busy reference means a skipped reading (paper, section 5).
Plain classes; the job applies ``ray.remote``.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import torch
from torch import nn

from raysys.errors import ConfigError
from raysys.training.kgt.config import KGTConfig
from raysys.training.kgt.controller import FreezeController, ignore
from raysys.training.kgt.decision import Decision, Offer
from raysys.training.kgt.events import EventLog
from raysys.training.kgt.inline import entering
from raysys.training.kgt.plan import ModulePlan
from raysys.training.kgt.plasticity import sp_loss
from raysys.training.kgt.reference import HookReference, SegmentReference
from raysys.training.kgt.savings import Savings

EXCHANGE_EVERY = 10
MAX_BACKLOG = 10_000
MAX_FAILURES = 5
_LOW_PRIORITY = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """Copies of what the reference runs: segments by module index, or a whole model."""

    segments: Mapping[int, nn.Module] | None
    model: nn.Module | None
    units: Mapping[int, str]
    offer: Offer


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """What the trainer must know of the controller between two exchanges."""

    decision: Decision
    wanted: tuple[int, ...]
    reference_wanted: bool
    last_batch: int


class ReferenceActor:
    """Holds the reference model and evaluates captured batches."""

    def __init__(self, precision: str = "auto", window: int = 10) -> None:
        torch.set_num_threads(1)
        os.nice(_LOW_PRIORITY)
        self.precision = precision
        self.window = window
        self.evaluations = 0
        self._reference: SegmentReference | HookReference | None = None

    def snapshot(self, snapshot: Snapshot) -> str:
        """Take a new snapshot; returns the precision in use."""
        if snapshot.model is not None:
            hooked = HookReference(snapshot.units, self.precision)
            hooked.build(snapshot.model)
            self._reference = hooked
            return hooked.precision
        assert snapshot.segments is not None
        if not isinstance(self._reference, SegmentReference):
            self._reference = SegmentReference(self.precision, evaluations=self.window)
        inputs, enter = entering(snapshot.offer)
        self._reference.build(snapshot.segments, inputs, enter)
        return self._reference.precision

    def evaluate(self, offer: Offer) -> dict[int, float | None] | None:
        """Plasticity of each captured module; None without a snapshot that covers them."""
        reference = self._reference
        if reference is None:
            return None
        wanted = sorted(offer.grams)
        if isinstance(reference, HookReference):
            found = reference.grams(offer.inputs, wanted)
        else:
            inputs, enter = entering(offer)
            found = reference.grams(inputs, enter, offer.start, wanted)
        self.evaluations += 1
        return {m: sp_loss(offer.grams[m], found[m]) for m in wanted if m in found} or None

    def health(self) -> dict[str, Any]:
        """Whether a snapshot is loaded, and how many evaluations were made."""
        return {"ready": self._reference is not None, "evaluations": self.evaluations}

    def close(self) -> None:
        """Forget the model; may be called twice."""
        self._reference = None


class ControllerActor:
    """Runs the state machine. Restarted, it goes on from its state file.

    Args:
        state_path: written after every exchange; empty keeps the state in memory only.
        log_path: JSON-lines event log; empty for none.
    """

    def __init__(
        self,
        config: KGTConfig,
        modules: int,
        total_steps: int,
        savings: Savings | None = None,
        state_path: str = "",
        log_path: str = "",
    ) -> None:
        log = EventLog(Path(log_path)) if log_path else ignore
        self.core = FreezeController(config, modules, total_steps, savings=savings, log=log)
        self.last_batch = 0
        self._state_path = Path(state_path) if state_path else None
        if self._state_path is not None and self._state_path.is_file():
            self.restore(pickle.loads(self._state_path.read_bytes()))

    def exchange(self, batch: int, events: Sequence[tuple[Any, ...]]) -> View:
        """Take the trainer's events in order and answer with the current view.

        Args:
            batch: grows by one; a batch that was taken before is not taken again, so that the
                trainer may send it a second time after a failure.
            events: ``("step", step, loss, rate, epoch)``, ``("read", step, losses, rate, epoch)``
                or ``("refreshed",)``.
        """
        if batch > self.last_batch:
            for event in events:
                self._take(event)
            self.last_batch = batch
            self._save()
        return self.view()

    def _take(self, event: tuple[Any, ...]) -> None:
        if event[0] == "step":
            self.core.observe(*event[1:])
        elif event[0] == "read":
            self.core.read(*event[1:])
        elif event[0] == "refreshed":
            self.core.reference_refreshed()
        else:
            raise ConfigError("event", event[0], "'step', 'read' or 'refreshed'")

    def view(self) -> View:
        """Decision, wanted modules and whether a snapshot is due."""
        # Step 0 is a multiple of every interval: what is wanted whenever a reading is due.
        wanted = self.core.wants(0)
        return View(self.core.decision, wanted, self.core.reference_wanted, self.last_batch)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"core": self.core.state_dict(), "last_batch": self.last_batch}

    def restore(self, state: Mapping[str, Any]) -> View:
        """Go on from a state."""
        self.core.load_state_dict(state["core"])
        self.last_batch = state["last_batch"]
        return self.view()

    def health(self) -> dict[str, Any]:
        """Stage, frozen modules and process id."""
        return {"stage": self.core.stage, "frozen": self.core.frozen_upto, "pid": os.getpid()}

    def close(self) -> None:
        """Nothing to release; may be called twice."""

    def _save(self) -> None:
        if self._state_path is not None:
            part = self._state_path.with_suffix(".part")
            part.write_bytes(pickle.dumps(self.state()))
            part.replace(self._state_path)


class RemoteControl:
    """The trainer's side: a :class:`~raysys.training.kgt.decision.Control` that never waits.

    Args:
        controller: handle of a :class:`ControllerActor`.
        reference: handle of a :class:`ReferenceActor`.
        config: the resolved options.
    """

    needs_gradients = False

    def __init__(
        self, controller: Any, reference: Any, config: KGTConfig, model: nn.Module, plan: ModulePlan
    ) -> None:
        self.config = config
        self.skipped = 0
        self.failures = 0
        self.disabled_reason = ""
        self._controller = controller
        self._reference = reference
        self._model = model
        self._plan = plan
        self._view = View(Decision(), (), False, 0)
        self._events: list[tuple[Any, ...]] = []
        self._sent: tuple[int, list[tuple[Any, ...]], Any] | None = None
        self._batch = 0
        self._evaluating: tuple[Offer, Any] | None = None
        self._snapshotting: Future[Any] | Any = None
        self._snapshot_due = True
        self._epoch = 0
        self._missed = -1
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="kgt-snapshot")

    def wants(self, step: int) -> tuple[int, ...]:
        """Modules to capture, as the last view said; nothing while the reference is busy.

        A reference slower than n steps thus stretches the interval; what it missed is counted.
        """
        if self.disabled_reason or step % self.config.every:
            return ()
        if self._evaluating is None:
            return self._view.wanted
        if self._view.wanted and step != self._missed:
            self._missed = step  # several forward passes may belong to one step
            self.skipped += 1
        return ()

    def observe(self, step: int, loss: float, rate: float, epoch: int) -> None:
        """Note the step; every few steps, exchange with the controller."""
        self._epoch = epoch
        if self.disabled_reason:
            return
        if len(self._events) < MAX_BACKLOG:
            self._events.append(("step", step, loss, rate, epoch))
        if (step + 1) % EXCHANGE_EVERY == 0:
            self._collect()
            self._exchange()

    def offer(self, offer: Offer) -> bool:
        """Send the batch to the reference, or a new snapshot first where one is due."""
        if self.disabled_reason or self._evaluating is not None or self._busy_with_snapshot():
            self.skipped += 1
            return False
        if self._snapshot_due or self._view.reference_wanted:
            self._send_snapshot(offer)
            return False
        self._evaluating = (offer, self._reference.evaluate.remote(offer))
        return True

    def _busy_with_snapshot(self) -> bool:
        """Whether the last snapshot has not been loaded yet."""
        if self._snapshotting is None:
            return False
        if not self._snapshotting.done():
            return True
        ready, _ = ray.wait([self._snapshotting.result()], timeout=0)
        if not ready:
            return True
        try:
            ray.get(ready[0])
            self._events.append(("refreshed",))
            self._snapshot_due = False
        except ray.exceptions.RayError as error:
            self._failed(f"the reference failed: {error}")
        self._snapshotting = None
        return False

    def _send_snapshot(self, offer: Offer) -> None:
        """Copy the weights now, between two optimizer steps; ship them from a thread."""
        units = {i: module.units[-1] for i, module in enumerate(self._plan.modules) if module.units}
        if self._plan.mode == "segments":
            chosen = range(offer.start, max(offer.grams) + 1)
            copies = {i: copy.deepcopy(self._plan.modules[i].segment) for i in chosen}
            segments = {i: segment for i, segment in copies.items() if segment is not None}
            snapshot = Snapshot(segments, None, units, offer)
        else:
            snapshot = Snapshot(None, copy.deepcopy(self._model), units, offer)
        self._view = dataclasses.replace(self._view, reference_wanted=False)
        self._snapshotting = self._sender.submit(self._reference.snapshot.remote, snapshot)

    def _collect(self) -> None:
        """Pick up a finished evaluation, if there is one."""
        self._busy_with_snapshot()
        if self._evaluating is None:
            return
        offer, reference = self._evaluating
        ready, _ = ray.wait([reference], timeout=0)
        if not ready:
            return
        self._evaluating = None
        try:
            losses = ray.get(ready[0])
        except ray.exceptions.RayError as error:
            self._snapshot_due = True  # a restarted reference has no snapshot
            self._failed(f"the reference failed: {error}")
            return
        if losses is None:
            self._snapshot_due = True
            return
        self.failures = 0
        self._events.append(("read", offer.step, losses, offer.rate, self._epoch))

    def _exchange(self) -> None:
        """Take the controller's answer if it is there, then send the next batch of events."""
        if self._sent is not None:
            batch, events, answer = self._sent
            ready, _ = ray.wait([answer], timeout=0)
            if not ready:
                return
            try:
                self._view = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                self._failed(f"the controller failed: {error}")
                if not self.disabled_reason:
                    again = self._controller.exchange.remote(batch, events)
                    self._sent = (batch, events, again)
                return
            self._sent = None
        events, self._events = self._events, []
        self._batch += 1
        answer = self._controller.exchange.remote(self._batch, events)
        self._sent = (self._batch, events, answer)

    def _failed(self, reason: str) -> None:
        self.failures += 1
        if self.failures >= MAX_FAILURES:
            # Freezing is an extra: stop deciding, release nothing, let training go on.
            self.disabled_reason = reason.split("\n", maxsplit=1)[0]

    def gradients(self, step: int, modules: list[list[nn.Parameter]]) -> None:
        """Not used by this criterion."""

    def latest(self) -> Decision:
        """The newest decision that has arrived."""
        return self._view.decision

    def state_dict(self) -> dict[str, Any]:
        """Ask the controller for its state: the one call that waits, for a checkpoint."""
        events, self._events = self._events, []
        self._batch += 1
        # Calls to one actor run in order, so the state comes after every event sent so far.
        self._controller.exchange.remote(self._batch, events)
        controller = ray.get(self._controller.state.remote())
        return {"controller": controller, "disabled_reason": self.disabled_reason}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the controller a checkpoint's state; the reference gets a new snapshot."""
        self._view = ray.get(self._controller.restore.remote(state["controller"]))
        self._batch = self._view.last_batch
        self._events, self._sent, self._evaluating = [], None, None
        self._snapshot_due = True
        self.disabled_reason = state["disabled_reason"]

    def close(self) -> None:
        """End the sending thread; the actors belong to who started them."""
        self._sender.shutdown()


def start_remote_control(
    config: KGTConfig,
    model: nn.Module,
    plan: ModulePlan,
    total_steps: int,
    *,
    state_path: str = "",
    log_path: str = "",
    num_cpus: float = 0,
) -> RemoteControl:
    """Start both actors beside the caller and connect to them.

    Both restart on failure; they end when the returned object's handles do.
    """
    savings = Savings([module.cost for module in plan.modules])
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    controller = (
        ray.remote(ControllerActor)
        .options(num_cpus=0, max_restarts=-1)
        .remote(config, len(plan), total_steps, savings, state_path, log_path)
    )
    reference = (
        ray.remote(ReferenceActor)
        .options(num_cpus=num_cpus, max_restarts=-1, scheduling_strategy=here)
        .remote(config.reference, config.window)
    )
    return RemoteControl(controller, reference, config, model, plan)
