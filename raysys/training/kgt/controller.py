"""The state machine of knowledge-guided freezing: bootstrapping, guided stage, release.

Pure: events in (a step done, plasticity read), decisions and log rows out. No tensors, no clock.
Paper: section 4 (life cycle, algorithm 1, unfreezing). Ours: reading all unfrozen modules at once
(``scope="all"``), releasing only what had not settled (``unfreeze="settled"``), thresholds kept
across a rate drop, and two further conditions: epochs done, and the predicted saving.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from raysys.errors import DataError
from raysys.training.kgt.config import KGTConfig
from raysys.training.kgt.criterion import ModuleTrack
from raysys.training.kgt.decision import Decision
from raysys.training.kgt.savings import Savings
from raysys.training.kgt.unfreeze import POLICIES, RELATIVE_TOLERANCE, UnfreezeState

Stage = Literal["bootstrap", "guided"]
EventSink = Callable[[Mapping[str, Any]], None]
_MIN_LOSS_WINDOWS = 3


def ignore(event: Mapping[str, Any]) -> None:
    """Event sink that keeps nothing."""
    del event


class FreezeController:
    """Decides which prefix of the modules is frozen.

    Args:
        config: resolved options (window and interval not zero).
        modules: number of layer modules M; the last is never frozen.
        total_steps: planned optimizer steps.
        savings: predicted saving per module; None treats every freeze as worth it.
        log: takes one JSON-ready mapping per event.
        lead_steps: how far ahead a decision takes effect.
    """

    def __init__(
        self,
        config: KGTConfig,
        modules: int,
        total_steps: int,
        *,
        savings: Savings | None = None,
        log: EventSink = ignore,
        lead_steps: int = 1,
    ) -> None:
        self.config = config
        self.modules = modules
        self.total_steps = total_steps
        self.savings = savings
        self.log = log
        self.lead_steps = lead_steps
        self.stage: Stage = "bootstrap"
        self.window = config.window
        self.decision = Decision()
        self.tracks: dict[int, ModuleTrack] = {}
        self.thresholds: dict[int, float] = {}
        self.settled: dict[int, float] = {}
        self.readings_since_refresh = 0
        self.reference_wanted = False
        self.skipped = 0
        self._loss_sum = 0.0
        self._loss_count = 0
        self._windows: list[float] = []
        self._rate_at_freeze: float | None = None
        self._lowest_rate = math.inf
        self._epoch_at_freeze = 0
        self._base_rate: float | None = None
        self._phase_rate = 0.0

    @property
    def frozen_upto(self) -> int:
        """How many leading modules are frozen."""
        return self.decision.frozen_upto

    def wants(self, step: int) -> tuple[int, ...]:
        """Modules to evaluate at this step."""
        if self.stage == "bootstrap" or step % self.config.every:
            return ()
        last = self.modules - 1
        if self.config.scope == "frontmost":
            return (self.frozen_upto,) if self.frozen_upto < last else ()
        return tuple(range(self.frozen_upto, last))

    def observe(self, step: int, loss: float, rate: float, epoch: int = 0) -> None:
        """Take one finished optimizer step: bootstrapping ends, or a rate drop releases."""
        if self.stage == "bootstrap":
            self._bootstrap(step, loss)
        if self.frozen_upto == 0:
            self._watch_phase(step, rate)
            return
        self._lowest_rate = min(self._lowest_rate, rate)
        state = UnfreezeState(
            step=step,
            rate=rate,
            rate_at_freeze=self._rate_at_freeze,
            lowest_rate=self._lowest_rate,
            epoch=epoch,
            epoch_at_freeze=self._epoch_at_freeze,
            factor=self.config.unfreeze_factor,
            every_epochs=self.config.unfreeze_epochs,
        )
        if POLICIES[self.config.unfreeze](state):
            self._release(step, rate, epoch)

    def _watch_phase(self, step: int, rate: float) -> None:
        """With ``settled``, a rate drop that finds nothing frozen begins a new phase all the same.

        Readings from before the drop would otherwise count as a module's standstill after it.
        """
        self._phase_rate = max(self._phase_rate, rate)
        if self.config.unfreeze != "settled" or not self.tracks:
            return
        if rate <= self.config.unfreeze_factor * self._phase_rate * (1 + RELATIVE_TOLERANCE):
            self._new_phase(rate)
            self.log({"event": "phase", "step": step, "rate": rate})

    def _new_phase(self, rate: float) -> None:
        """Forget all readings and halve the window, so that freezing again is quicker."""
        if self.config.keep_thresholds:
            known = {m: t.threshold for m, t in self.tracks.items() if t.threshold is not None}
            self.thresholds |= known
        self.window = max(2, self.window // 2)
        self.tracks = {}
        self.reference_wanted = True
        self._phase_rate = rate

    def read(
        self, step: int, plasticity: Mapping[int, float | None], rate: float, epoch: int = 0
    ) -> None:
        """Take the readings of one evaluation; a None reading is skipped and counted."""
        for module, value in sorted(plasticity.items()):
            if module < self.frozen_upto:
                continue  # a late answer about a module that has been frozen meanwhile
            normal = self._normalised(value, rate)
            if normal is None:
                self.skipped += 1
                self.log({"event": "skipped", "step": step, "module": module})
                continue
            reading = self._track(module).add(normal)
            self.log({"event": "reading", "step": step, **dataclasses.asdict(reading)})
        self.readings_since_refresh += 1
        if self.readings_since_refresh >= self.window:
            self.reference_wanted = True
        self._freeze_converged(step, rate, epoch)

    def reference_refreshed(self) -> None:
        """A new snapshot of the model is in use: its period starts again."""
        self.reference_wanted = False
        self.readings_since_refresh = 0

    def _bootstrap(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            self._loss_sum, self._loss_count, self._windows = 0.0, 0, []
            return
        self._loss_sum += loss
        self._loss_count += 1
        if self._loss_count < self.config.bootstrap_window:
            return
        self._windows.append(self._loss_sum / self._loss_count)
        self._loss_sum, self._loss_count = 0.0, 0
        if len(self._windows) < _MIN_LOSS_WINDOWS:
            return
        before, now = self._windows[-2:]
        change = abs(before - now) / max(abs(before), 1e-12)
        early = step + 1 < self.config.min_bootstrap_share * self.total_steps
        if change < self.config.bootstrap_rate and not early:
            self.stage = "guided"
            self.reference_wanted = True
            self.log({"event": "guided", "step": step, "loss_change": change})

    def _normalised(self, value: float | None, rate: float) -> float | None:
        if value is None or not self.config.rate_normalised:
            return value
        if rate <= 0:
            return None
        self._base_rate = self._base_rate or rate
        return value * self._base_rate / rate

    def _track(self, module: int) -> ModuleTrack:
        if module not in self.tracks:
            self.tracks[module] = ModuleTrack(
                module, self.window, self.config.coef, self.thresholds.get(module)
            )
        return self.tracks[module]

    def _freeze_converged(self, step: int, rate: float, epoch: int) -> None:
        if epoch < self.config.min_epochs:
            return
        upto = self.frozen_upto
        while upto < self.modules - 1 and upto in self.tracks and self.tracks[upto].converged:
            upto += 1
        if upto == self.frozen_upto:
            return
        if self.savings is not None:
            share = self.savings.share(self.frozen_upto, upto, 1 - step / self.total_steps)
            if share < self.config.min_saving:
                self.log({"event": "not_worth_it", "step": step, "upto": upto, "saving": share})
                return
        if self.frozen_upto == 0:
            self._rate_at_freeze, self._lowest_rate = rate, rate
            self._epoch_at_freeze = epoch
        for module in range(self.frozen_upto, upto):
            self._retire(module)
        self._decide(upto, step, "converged")

    def _retire(self, module: int) -> None:
        track = self.tracks.pop(module)
        first = track.first_smoothed or track.smoothed[-1]
        self.settled[module] = track.smoothed[-1] / first if first > 0 else 0.0
        if self.config.keep_thresholds and track.threshold is not None:
            self.thresholds[module] = track.threshold

    def _release(self, step: int, rate: float, epoch: int) -> None:
        keep = 0
        if self.config.unfreeze == "settled":
            while keep < self.frozen_upto and self.settled[keep] < self.config.settled_below:
                keep += 1
        self._new_phase(rate)
        self._epoch_at_freeze = epoch
        self._rate_at_freeze, self._lowest_rate = (rate, rate) if keep else (None, math.inf)
        self._decide(keep, step, "learning rate dropped")

    def _decide(self, upto: int, step: int, reason: str) -> None:
        version = self.decision.version + 1
        before = self.frozen_upto
        self.decision = Decision(version, upto, step + self.lead_steps, reason)
        event = "freeze" if upto > before else "release" if upto < before else "kept"
        self.log({"event": event, "step": step, "upto": upto, "before": before, "reason": reason})

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, JSON-ready."""
        state = {name: getattr(self, name) for name in _PLAIN}
        return {
            **state,
            "modules": self.modules,
            "decision": dataclasses.astuple(self.decision),
            "tracks": {str(index): track.state_dict() for index, track in self.tracks.items()},
            "thresholds": {str(index): value for index, value in self.thresholds.items()},
            "settled": {str(index): value for index, value in self.settled.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's state.

        Raises:
            DataError: it belongs to another number of modules.
        """
        if state["modules"] != self.modules:
            raise DataError(
                "checkpoint",
                f"{state['modules']} layer modules, this model has {self.modules}",
                "Resume with the same model and grouping",
            )
        for name in _PLAIN:
            setattr(self, name, state[name])
        self._windows = list(self._windows)
        self.decision = Decision(*state["decision"])
        self.tracks = {int(i): ModuleTrack.from_state(s) for i, s in state["tracks"].items()}
        self.thresholds = {int(index): value for index, value in state["thresholds"].items()}
        self.settled = {int(index): value for index, value in state["settled"].items()}


_PLAIN: Sequence[str] = (
    "stage",
    "window",
    "readings_since_refresh",
    "reference_wanted",
    "skipped",
    "_loss_sum",
    "_loss_count",
    "_windows",
    "_rate_at_freeze",
    "_lowest_rate",
    "_epoch_at_freeze",
    "_base_rate",
    "_phase_rate",
)
