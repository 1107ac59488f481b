"""The engine: makes an ordinary PyTorch loop a Swan task.

    with Swan() as swan, swan.training(model=model, optimizer=optimizer, folder="ckpt") as task:
        for batch in loader:            # the loop is not changed
            ...
            optimizer.step()            # a step ends here

A move changes the affinity of every thread at once, and the number of threads between two steps;
nothing is copied. The owner's demand is watched by a thread of its own.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from actors.swan.affinity import (
    apply_affinity,
    current_nice,
    lower_priority,
    residency,
    restore_priority,
    run_times,
)
from actors.swan.checkpoint import CheckpointFolder
from actors.swan.config import EngineConfig
from actors.swan.discovery import clock_share, discover, gone
from actors.swan.lock import take_lock
from actors.swan.pressure import PressureReader
from actors.swan.sensors import SleepWatch, choose_meter, read_battery, read_celsius
from actors.swan.task import TrainingTask
from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.swan.choices import Choice
from raysys.federated.swan.pilot import Change, Pilot, Step
from raysys.federated.swan.topology import Topology

__all__ = ["EngineConfig", "Swan"]

ENFORCED_SHARE = 0.8
REPORT_S = 86_400.0
MIN_CHECKED_S = 0.2
SLOW_S = 1.0  # heat, supply and hot-plug change slowly; looking costs more than the rest


class Swan:
    """One engine per process; ``with`` restores affinity, threads and priority at its end.

    Args:
        topology: what to use instead of discovery.
        shared: a profile from other devices, verified before use, or, if ``trusted``, of this one.
        on_event: called with a dictionary for every move, thermal, budget and error event.

    Raises:
        InfeasibleError: another engine holds the lock.
        CapabilityError: no usable core.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        topology: Topology | None = None,
        shared: dict[str, Any] | None = None,
        trusted: bool = False,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config or EngineConfig()
        self.events: list[dict[str, Any]] = []
        self.moves = 0
        self._sys, self._proc = Path(self.config.sys_root), Path(self.config.proc_root)
        self._clock, self._on_event = clock, on_event
        self._before = (sorted(os.sched_getaffinity(0)), torch.get_num_threads(), current_nice())
        self._lock = take_lock(self.config.lock)
        self.topology = topology or discover(self._sys, self._proc, os.sched_getaffinity(0))
        _, battery_wh = read_battery(self._sys)
        self.pilot = Pilot(self.topology, self.config.policy, battery_wh, shared, trusted)
        self._meter = choose_meter(self.topology, clock, self._sys)
        self._pressure = PressureReader(clock, self._proc)
        self._guard = threading.RLock()
        self._wake = threading.Condition(self._guard)
        self._stop = threading.Event()
        self._asked_to_pause = False
        self._busy = False
        self._sleep = SleepWatch()
        self._mixed = True  # the running step has seen a move (or is the first)
        self._looked = run_times(self._proc)
        self._enforced = False
        self._applied: tuple[int, ...] = ()
        self._watcher = threading.Thread(target=self._watch, name="swan-watch", daemon=True)

    def __enter__(self) -> Swan:
        if self.config.nice:
            lower_priority(self.config.nice, self._proc)
        with self._guard:
            self._apply(Change(self.pilot.choice, "start"))
        self._set_threads()
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop watching and put the process back as it was; may be called twice."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._watcher.is_alive() and self._watcher is not threading.current_thread():
            self._watcher.join(5)
        cores, count, nice = self._before
        apply_affinity(cores, self._proc)
        torch.set_num_threads(count)
        if self.config.nice:
            restore_priority(nice, self._proc)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def training(
        self,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        folder: str | Path | None = None,
        **parts: Any,
    ) -> Iterator[TrainingTask]:
        """Make the block a task: every ``optimizer.step()`` in it ends a step.

        Args:
            optimizer: whose steps count; None for a loop that calls ``task.step_end()`` itself.
            folder: where checkpoints go; when it holds one, the task resumes from it.
            parts: further objects with ``state_dict`` and ``load_state_dict`` (model, scheduler,
                sampler, scaler) that a checkpoint must hold.

        Raises:
            DataError: the folder's checkpoints are all damaged, or of another task.
            InfeasibleError: the engine has a task already.
        """
        with self._guard:
            if self._busy:
                raise InfeasibleError("a second task", "this engine has one", "Wait for its end")
            self._busy = self._mixed = True
        try:
            named = {**({} if optimizer is None else {"optimizer": optimizer}), **parts}
            store = None if folder is None else CheckpointFolder(Path(folder))
            task = TrainingTask(self, named, store, self.config.checkpoint_s, self._clock)
            task.resume()
            with task.attached(optimizer):
                yield task
        finally:
            self._busy = False

    def report_divergence(self, loss: float) -> None:
        """The task has diverged: tell it and stop it, never slow it down or hide it.

        Raises:
            ConfigError: always.
        """
        with self._guard:
            self._note("error", f"the loss is {loss}")
        raise ConfigError("loss", loss, "a finite loss", "The task has diverged; lower its rate")

    def step_end(self, seconds: float, steps: int = 1) -> None:
        """A step (or several alike) of ``seconds`` each has ended; makes the moves that are due."""
        with self._guard:
            now_s = self._clock()
            joules = self._meter.read(self._applied) / steps
            slept_s = self._sleep.read()
            if slept_s:
                # Clocks and counters do not agree on what a step across a sleep has cost.
                self._note("sleep", f"the device slept for {slept_s:.1f} s")
                self._mixed = True
            choice = self.pilot.choice
            if not self._mixed and choice is not None:
                clock = clock_share(choice.cores, self._sys)
                step = Step(
                    seconds=seconds,
                    joules=joules,
                    source=self._meter.source,
                    clock=clock,
                )
                self._apply(self.pilot.on_step(now_s, step))
                self._check_enforced(now_s)
            self._set_threads()
            # Whatever moved did so between two steps; only the watcher cuts into the next one.
            self._mixed = False

    def hold(self, on_pause: Callable[[], None], stopped: Callable[[], bool] = bool) -> None:
        """Block while paused, unless ``stopped``; ``on_pause`` runs first, to save the task."""
        with self._wake:
            if not self._paused():
                return
        on_pause()
        with self._wake:
            while self._paused() and not (self._stop.is_set() or stopped()):
                self._wake.wait(self.config.sample_s)
        self._set_threads()

    def between(self, stopped: Callable[[], bool] = bool) -> None:
        """Between two micro-batches: carry moves out in full, and wait while paused.

        Nothing is saved here: gradients of half a step are not part of a checkpoint.
        """
        began_s = self._clock()
        self.hold(lambda: None, stopped)
        with self._guard:
            self._mixed |= self._clock() - began_s > self.config.sample_s
            self._set_threads()

    def out_of_memory(self, reason: str) -> None:
        """Memory ran out in a step: never use so many threads again, and move to fewer now.

        Raises:
            InfeasibleError: there is no smaller choice.
        """
        with self._guard:
            used = len(self._applied)
            self._note("error", f"out of memory on {used} threads: {reason}")
            fixed = self.config.policy.deterministic
            change = None if fixed else self.pilot.drop_larger("out of memory", self._clock())
            if change is None:
                remedy = "Use a smaller batch or model"
                raise InfeasibleError("this step", f"out of memory on {used} threads", remedy)
            self._apply(change)
            self._mixed = True
        self._set_threads()

    def pause(self) -> None:
        """Ask the task to pause at its next step end."""
        with self._guard:
            self._asked_to_pause = True

    def resume(self) -> None:
        """Take :meth:`pause` back."""
        with self._wake:
            self._asked_to_pause = False
            self._wake.notify_all()

    def force(self, choice: Choice, reason: str = "forced") -> None:
        """Move now, whatever the pilot thinks; for tests and demonstrations."""
        with self._guard:
            self._apply(Change(choice, reason))
        self._set_threads()

    def status(self) -> dict[str, Any]:
        """State in plain values."""
        with self._guard:
            return {
                **self.pilot.status(),
                "applied": list(self._applied),
                "threads": torch.get_num_threads(),
                "energy_source": self._meter.source,
                "notes": list(self.topology.notes),
                "engine_moves": self.moves,
                "paused": self._paused(),
            }

    def typical_step(self) -> tuple[float, float]:
        """Median seconds and joules of a step on the present choice; NaN before there are any."""
        with self._guard:
            choice = self.pilot.choice
            return (math.nan, math.nan) if choice is None else self.pilot.profile.typical(choice)

    def _paused(self) -> bool:
        return self._asked_to_pause or self.pilot.choice is None

    def _watch(self) -> None:
        slow_s, celsius, battery = -math.inf, math.nan, None
        report_s, paused_s = self._clock() + REPORT_S, 0.0
        while not self._stop.wait(self.config.sample_s):
            demand = self._pressure.look()
            with self._wake:
                now_s = self._clock()
                if now_s - slow_s >= SLOW_S:
                    slow_s, celsius = now_s, read_celsius(self._sys)
                    battery, _ = read_battery(self._sys)
                    self._leave_lost()
                self._apply(self.pilot.on_sample(now_s, demand, celsius, battery))
                if not self._paused():
                    self._wake.notify_all()
                else:
                    paused_s += self.config.sample_s
                if now_s >= report_s:
                    self._report(paused_s)
                    report_s, paused_s = now_s + REPORT_S, 0.0

    def _report(self, paused_s: float) -> None:
        """Once a day, above all for a device whose owner never lets it train."""
        state = self.status()
        words = f"{state['steps']} steps, {self.moves} moves, paused for {paused_s:.0f} s a day"
        self._note("report", words, loan_j=state["loan_j"])

    def _leave_lost(self) -> None:
        """Go on with what is left when cores were unplugged, or taken from us from outside."""
        lost = set(gone(self.topology, self._sys))
        reason = "unplugged"
        now = os.sched_getaffinity(os.getpid())
        if self._applied and now != set(self._applied):
            # Somebody set our main thread's affinity. A narrower set is a wish to be obeyed; for
            # a wider one we just go back to where we were.
            reason = "taken away from outside"
            lost |= set(self.topology.cores) - now if now < set(self.topology.cores) else set()
            self._note("error", f"affinity was changed from outside to {sorted(now)}")
            self._applied = tuple(sorted(now))
        elif not lost:
            return
        if lost:
            self._note("error", f"cores {sorted(lost)} are {reason}")
            self._start_over(lost)
        self._apply(Change(self.pilot.choice, f"cores were {reason}"))

    def _start_over(self, lost: set[int]) -> None:
        """A fresh pilot for the cores that are left; what is owed stays owed."""
        try:
            self.topology = self.topology.without(lost)
        except ConfigError:  # none of ours is left: see what the system grants now
            self.topology = discover(self._sys, self._proc, os.sched_getaffinity(os.getpid()))
        loan = self.pilot.loan.state()
        self.pilot = Pilot(self.topology, self.config.policy, self.pilot.loan.battery_wh)
        self.pilot.loan.load(loan)

    def _apply(self, change: Change | None) -> None:
        """Carry out a change: affinity at once; the thread count follows at the step's end."""
        if change is None:
            return
        if change.choice is None:
            self._note("move", change.reason, target="pause")
            return
        cores = change.choice.cores
        if cores == self._applied:
            return
        result = apply_affinity(cores, self._proc)
        origin, self._applied = self._applied, cores
        self._mixed, self._enforced = True, False
        self.moves += 1
        self._looked = run_times(self._proc)
        label = change.choice.label(self.topology)
        self._note("move", change.reason, target=label, origin=list(origin), cores=list(cores))
        if not result.complete:
            reason = f"affinity refused: {result.refused[0][1]}"
            self._note("error", reason)
            self._apply(self.pilot.drop(change.choice, reason, self._clock()))

    def _check_enforced(self, now_s: float) -> None:
        """Some systems accept an affinity and ignore it: believe only where threads really ran."""
        choice = self.pilot.choice
        if self._enforced or choice is None or choice.cores != self._applied:
            return
        after = run_times(self._proc)
        used = sum(s - self._looked.get(t, (0.0, 0))[0] for t, (s, _) in after.items())
        if used < MIN_CHECKED_S:
            return
        share = residency(self._looked, after, self._applied)
        self._looked = after
        self._enforced = share >= ENFORCED_SHARE
        if share < ENFORCED_SHARE and len(self.pilot.profile.usable()) > 1:
            reason = f"unenforceable: {share:.0%} of the time on its cores"
            self._note("error", reason)
            self._apply(self.pilot.drop(choice, reason, now_s))

    def _wanted_threads(self) -> int:
        if self.config.policy.deterministic:
            return self._most_threads()
        return max(len(self._applied), 1)

    def _most_threads(self) -> int:
        return max(choice.threads for choice in self.pilot.profile.choices)

    def _set_threads(self) -> None:
        wanted = self._wanted_threads()
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)
            # Threads that the runtime starts now inherit; those that it kept may not have.
            apply_affinity(self._applied, self._proc)

    def _note(self, kind: str, reason: str, **more: Any) -> None:
        event = {"kind": kind, "reason": reason, "at_s": self._clock(), **more}
        self.events = [*self.events[-999:], event]
        if self._on_event is not None:
            self._on_event(event)
