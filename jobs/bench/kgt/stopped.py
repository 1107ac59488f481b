"""Does training wait for its controller? Step times while the controller's process is stopped.

Two identical trainings in one process, each with actors of its own, make one step in turn. The
controller of the first is stopped (SIGSTOP); the second is the control, so what the machine does
meanwhile meets both. Neither can freeze anything: a frozen prefix would change the step itself.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import statistics
import time
from typing import Any

import torch

from actors.kgt import RemoteControl, start_remote_control
from actors.session import Session, SessionConfig
from jobs.bench.kgt import tasks
from raysys.training import datasets
from raysys.training.kgt import KGTConfig
from raysys.training.kgt.config import resolve
from raysys.training.kgt.decision import Control
from raysys.training.kgt.loop import Recipe, TrainLoop
from raysys.training.kgt.models import resnet1d
from raysys.training.kgt.plan import ModulePlan, parse

_BATCH = 64
_STEPS = 1_000_000
# Readings go on, but no slope is ever below such a threshold.
_CONFIG = KGTConfig(window=3, every=10, reference="fp32", modules=16, coef=1e-12)


@dataclasses.dataclass(frozen=True, slots=True)
class Phase:
    """Pairs of steps, (wall seconds, CPU seconds of the training thread) for both trainings."""

    disturbed: list[tuple[float, float]]
    control: list[tuple[float, float]]

    def ratio(self, part: int) -> float:
        """Median of the paired ratios; part 0 is wall time, 1 CPU time."""
        pairs = zip(self.disturbed, self.control)
        return statistics.median(one[part] / other[part] for one, other in pairs)

    def row(self) -> dict[str, Any]:
        """JSON-ready summary."""
        wall = sorted(step[0] for step in self.disturbed)
        return {
            "pairs": len(wall),
            "wall_ratio": self.ratio(0),
            "cpu_ratio": self.ratio(1),
            "step_s": statistics.median(wall),
            "step_p99_s": wall[round(0.99 * (len(wall) - 1))],
            "control_step_s": statistics.median(step[0] for step in self.control),
        }


def stopped_controller(seconds: float) -> tuple[Phase, Phase, float]:
    """Measure ``seconds`` with the first controller stopped, and as long with both running.

    Returns:
        The stopped phase, the undisturbed phase, and the longest call into the stopped control.
    """
    import ray

    torch.set_num_threads(1)
    with Session.start(SessionConfig(address="local", num_cpus=4, object_store_mb=128)):
        pair = [_Training(), _Training()]
        for training in pair:
            training.loop.run(until=60)
        pid = ray.get(pair[0].remote._controller.health.remote())["pid"]
        calm = _alternate(pair, seconds / 2)
        pair[0].control.longest = 0.0
        os.kill(pid, signal.SIGSTOP)
        try:
            stopped = _alternate(pair, seconds)
            longest = pair[0].control.longest
        finally:
            os.kill(pid, signal.SIGCONT)
        after = _alternate(pair, seconds / 2)
        for training in pair:
            training.loop.close()
    calm = Phase(calm.disturbed + after.disturbed, calm.control + after.control)
    return stopped, calm, longest


def _alternate(pair: list[_Training], seconds: float) -> Phase:
    phase = Phase([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        phase.disturbed.append(pair[0].step())
        phase.control.append(pair[1].step())
    return phase


class _Training:
    """One training with a reference and a controller of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = resnet1d()
        data = tasks.train_data(datasets.mnist1d(2000, 100).train)
        plan = parse(model, (data.x[:_BATCH],), modules=16)
        config = resolve(_CONFIG, _STEPS, len(plan))
        self.remote = start_remote_control(config, model, plan, _STEPS)
        self.control = _TimedControl(self.remote)
        recipe = Recipe(epochs=_STEPS // 31, batch_size=_BATCH, schedule="constant", lr=0.01)
        self.loop = TrainLoop(model, data, recipe, _CONFIG, plan=plan, control=self._use)

    def _use(self, plan: ModulePlan, steps: int) -> Control:
        control: Any = self.control
        return control  # type: ignore[no-any-return]

    def step(self) -> tuple[float, float]:
        """Train one step; wall seconds and CPU seconds of this thread."""
        wall, cpu = time.perf_counter(), time.thread_time()
        self.loop.run(until=self.loop.step + 1)
        return time.perf_counter() - wall, time.thread_time() - cpu


class _TimedControl:
    """Passes calls on and keeps the longest."""

    needs_gradients = False

    def __init__(self, inner: RemoteControl) -> None:
        self.inner = inner
        self.longest = 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = method(*args)
            self.longest = max(self.longest, time.perf_counter() - start)
            return result

        return timed
