"""A device that is steered from outside: the service ``SwanDevice`` around one engine.

A plan is data; it passes the same checks as one that comes with a lease, and the owner's wishes
hold. One training at a time; one that was stopped or killed resumes when it is asked for again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from actors.edge.config import EdgeDeviceConfig
from actors.edge.device import Device
from actors.edge.profiles import KEPT, MOST_BYTES, Profiles
from actors.edge.trainer import Progress, train_plan
from actors.proto.swan_messages import pb, rpc
from actors.swan.discovery import discover
from actors.swan.engine import Swan
from actors.swan.sensors import read_battery, read_celsius
from actors.venn.security import interceptors, server_port
from actors.venn.status import typed, typed_stream
from raysys.errors import ConfigError, InfeasibleError, InterruptedRunError
from raysys.federated.swan.energy import EnergyLoan
from raysys.federated.swan.pilot import Pilot
from raysys.federated.swan.plans import (
    Plan as TrainingPlan,
)
from raysys.federated.swan.plans import (
    PlanRefusedError,
    check_work,
    pack_update,
    plan_from_json,
    unpack_weights,
)
from raysys.federated.swan.profile import check_plain
from raysys.federated.swan.willingness import refusal

CHUNK_BYTES = 256 * 1024
_log = logging.getLogger(__name__)
PROGRESS_S = 0.25
FOLDER = "steered"
KEPT_STOPPED = 3


@dataclass(slots=True)
class _Running:
    """The training in hand; ``engine`` is there once its thread has begun."""

    steps: int
    stopped: threading.Event
    engine: Swan | None = None
    progress: Progress = field(default_factory=Progress)
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=256))


class DeviceControl(rpc.SwanDeviceServicer):  # type: ignore[misc]
    """Serves one device; ``start``, then ``close``.

    Args:
        clock: wall-clock seconds.
    """

    def __init__(self, config: EdgeDeviceConfig, clock: Callable[[], float] = time.time) -> None:
        self.device = Device(config, clock=clock)
        self.profiles = Profiles(self.device)
        self.samples = config.samples.load()
        self.port = 0
        self.trained = 0
        self._sys = Path(config.engine.sys_root)
        self.loan = EnergyLoan(read_battery(self._sys)[1], config.engine.policy.loan)
        if self.device.state.loan:
            self.loan.load(self.device.state.loan)
        self._given: dict[str, dict[str, Any]] = {}
        self._running: _Running | None = None
        self._trainer = ThreadPoolExecutor(1, thread_name_prefix="swan-train")
        self._server: Any = None

    async def start(self, address: str = "127.0.0.1:0") -> int:
        """Bind and serve; returns the port."""
        config = self.device.config
        most = config.limits.max_model_bytes + 2**20
        options = [("grpc.max_receive_message_length", most)]
        checks = interceptors(config.security, self.device.clock)
        self.device.folder.lock()
        self._server = grpc.aio.server(options=options, interceptors=checks)
        rpc.add_SwanDeviceServicer_to_server(self, self._server)
        self.port = server_port(self._server, address, config.security)
        await self._server.start()
        return self.port

    async def close(self) -> None:
        """Stop the training, which stays on disk, and the service; may be called twice."""
        if self._running is not None:
            self._running.stopped.set()
        if self._server is not None:
            await self._server.stop(5.0)
            self._server = None
        self._trainer.shutdown(wait=True)
        self.device.save()
        self.device.folder.unlock()

    @typed
    async def Plan(self, request: Any, context: Any) -> Any:
        plan, steps = self._plan(request.plan)
        key = self.profiles.key(plan)
        known = self.profiles.own(key) or self._given.get(key)
        places = [] if known is None else list(self._places(known))
        return pb.ProfileSummary(
            key=key,
            frontier=places,
            local_steps=steps,
            expected_s=steps * places[0].step_s if places else 0.0,
            refusal=self._refusal(),
        )

    @typed_stream
    async def Train(self, request: Any, context: Any) -> AsyncIterator[Any]:
        plan, steps = self._plan(request.plan)
        weights = self._model(request.model, plan)
        reason = "it trains already" if self._running is not None else self._refusal()
        if reason:
            raise InfeasibleError("training on this device", reason, "Ask again later")
        self._running = running = _Running(steps, threading.Event())
        name = hashlib.sha256(request.plan.encode() + request.model).hexdigest()[:24]
        folder = self.device.folder.folder / FOLDER / name
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._trainer, self._train, plan, weights, folder, running)
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=PROGRESS_S)
                yield self._progress(running)
            update = await work
        except InterruptedRunError as error:
            again = "The same request resumes it"
            raise InfeasibleError("the end of this training", "it was stopped", again) from error
        finally:
            # Also when the caller has hung up: nobody waits for this training any more.
            running.stopped.set()
            (ended,) = await asyncio.gather(work, return_exceptions=True)
            if isinstance(ended, Exception):  # its caller may be gone and never hear of it
                _log.warning("a training ended early: %r", ended)
            self._running = None
            self.device.save()
        self.trained += 1
        for message in _chunks(update, steps):
            yield message

    @typed
    async def Control(self, request: Any, context: Any) -> Any:
        running = self._running
        engine = None if running is None else running.engine
        if running is None or engine is None:
            idle = request.kind == pb.Command.STATUS
            state = json.dumps({"training": False})
            return pb.Ack(accepted=idle, reason="" if idle else "nothing trains", state=state)
        if request.kind == pb.Command.PAUSE:
            engine.pause()
        elif request.kind == pb.Command.RESUME:
            engine.resume()
        elif request.kind == pb.Command.STOP:
            running.stopped.set()
        return pb.Ack(accepted=True, state=json.dumps({"training": True, **engine.status()}))

    @typed
    async def ShareProfile(self, request: Any, context: Any) -> Any:
        if len(request.profile) > MOST_BYTES or len(request.key) > 1024:
            raise ConfigError("profile", len(request.profile), f"at most {MOST_BYTES} bytes")
        try:
            plain = json.loads(request.profile)
        except ValueError as error:
            raise ConfigError("profile", "(text)", "JSON") from error
        if not isinstance(plain, dict):
            raise ConfigError("profile", "(text)", "a JSON object")
        check_plain(plain, self.profiles.kind)
        if not list(self._places(plain)):
            raise ConfigError("profile.choices", "(others)", "choices that this device has")
        self._given = dict(list({**self._given, request.key: plain}.items())[-KEPT:])
        return pb.Ack(accepted=True)

    def _plan(self, text: str) -> tuple[TrainingPlan, int]:
        limits = self.device.config.limits
        try:
            plan = plan_from_json(text, limits, "caller")
            return plan, check_work(plan, len(self.samples.targets), limits, "caller")
        except PlanRefusedError as error:
            raise ConfigError("plan", "(text)", error.reason) from error

    def _model(self, content: bytes, plan: TrainingPlan) -> npt.NDArray[np.float32]:
        try:
            return unpack_weights(content, plan.spec, "caller")
        except PlanRefusedError as error:
            raise ConfigError("model", f"{len(content)} bytes", error.reason) from error

    def _refusal(self) -> str:
        battery, _ = read_battery(self._sys)
        now_s = self.device.clock()
        local_s = now_s + time.localtime(now_s).tm_gmtoff
        loan = self.loan.refusal(local_s, battery)
        settings = self.device.config.willingness
        return refusal(settings, local_s, battery, read_celsius(self._sys), loan)

    def _places(self, known: dict[str, Any]) -> Iterator[Any]:
        """The frontier of a profile; nothing where its choices are not those of this device."""
        engine = self.device.config.engine
        topology = discover(Path(engine.sys_root), Path(engine.proc_root))
        joules = {tuple(row["counts"]): row.get("joules") or 0.0 for row in known["choices"]}
        with contextlib.suppress(ConfigError):
            # Whatever the policy of a training: the frontier is what the device could do.
            policy = dataclasses.replace(engine.policy, kind="swan")
            pilot = Pilot(topology, policy, shared=known, trusted=True)
            for item in pilot.frontier:
                yield pb.Place(
                    choice=item.choice.label(topology),
                    threads=item.choice.threads,
                    step_s=item.seconds,
                    step_j=joules.get(item.choice.counts, 0.0),
                )

    def _train(
        self, plan: TrainingPlan, weights: npt.NDArray[np.float32], folder: Path, running: _Running
    ) -> bytes:
        """In the training thread: the whole local training; the packed update."""
        _forget_old(folder)
        key = self.profiles.key(plan)
        own = self.profiles.own(key)
        known = own or self._given.get(key)
        with Swan(
            self.device.config.engine,
            shared=known,
            trusted=own is not None,
            on_event=running.events.append,
        ) as engine:
            engine.pilot.loan.load(self.loan.state())
            running.engine = engine
            try:
                result = train_plan(
                    plan,
                    weights,
                    self.samples,
                    engine=engine,
                    folder=folder,
                    stopped=running.stopped,
                    progress=running.progress,
                )
            finally:  # a training that was stopped has borrowed as well
                self.loan.load(engine.pilot.loan.state())
                self.device.state.loan = self.loan.state()
            plain = {**engine.pilot.profile.to_plain(), "device": self.profiles.kind}
            if plain["choices"] and not engine.pilot.exploring:
                self.profiles.remember(key, plain)
        shutil.rmtree(folder, ignore_errors=True)
        return pack_update(result.delta, result.facts)

    @staticmethod
    def _progress(running: _Running) -> Any:
        engine, events = running.engine, []
        while running.events:
            event = running.events.popleft()
            events.append(f"{event['kind']}: {event['reason']}")
        state = {} if engine is None else engine.status()
        return pb.Progress(
            step=running.progress.step,
            steps=running.steps,
            choice="pause" if state.get("paused") else state.get("choice", ""),
            events=events,
        )


def _forget_old(folder: Path) -> None:
    """Trainings that were stopped and never asked for again do not pile up."""
    others = [path for path in folder.parent.glob("*") if path != folder]
    others.sort(key=lambda path: path.stat().st_mtime)
    for path in others[:-KEPT_STOPPED]:
        shutil.rmtree(path, ignore_errors=True)


def _chunks(update: bytes, steps: int) -> Iterator[Any]:
    for start in range(0, len(update), CHUNK_BYTES):
        yield pb.Progress(step=steps, steps=steps, update=update[start : start + CHUNK_BYTES])
    yield pb.Progress(step=steps, steps=steps, update_sha256=hashlib.sha256(update).digest())
