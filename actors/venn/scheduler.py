"""The scheduler: single writer of the plan, leader or warm standby, gRPC for jobs and gateways.

A standby follows the log and waits for the leader's lock; when it gets it, it applies the rest of
the log, moves the epoch on and serves at the same address. Everything runs on one event loop, so
commands are serial without locks.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from actors.proto.messages import pb, rpc
from actors.venn import wire
from actors.venn.log import Journal, LeaderLock, Replica
from actors.venn.security import SecurityConfig, interceptors, server_port
from actors.venn.status import typed, typed_stream
from raysys.errors import ConfigError, RemoteError
from raysys.federated.venn.scheduler import SchedulerCore
from raysys.federated.venn.scheduler_state import ServiceConfig

FOLLOW_S = 0.05
MESSAGE_BYTES = 64 * 2**20
EVENTS_KEPT = 10_000
_SERVICES = tuple(
    pb.DESCRIPTOR.services_by_name[name].full_name for name in ("JobPlane", "PlanFeed")
)


class SchedulerServer(rpc.JobPlaneServicer, rpc.PlanFeedServicer):  # type: ignore[misc]
    """Leader or standby over one state folder; ``run`` until ``close``.

    Args:
        folder: log, snapshots and lock; shared by leader and standby.
        address: where the leader serves; the same for both.
        clock: wall-clock seconds. It must go on across restarts, so not the monotonic clock; it is
            kept from running backwards by never using less than the last command's time.
    """

    def __init__(
        self,
        folder: str,
        address: str,
        config: ServiceConfig | None = None,
        security: SecurityConfig | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config or ServiceConfig()
        self.address = address
        self.port = 0
        self.core = SchedulerCore(self.config)
        self.leading = asyncio.Event()
        self.following = asyncio.Event()
        self.took_over_s = 0.0
        self._replica = Replica(Path(folder), self.core)
        self._lock = LeaderLock(Path(folder))
        self._journal: Journal | None = None
        self._security = security or SecurityConfig()
        self._clock = clock
        self._last_s = 0.0
        self._stalled = False
        self._server: Any = None
        self._dirty = asyncio.Event()
        self._plans = asyncio.Condition()
        self._watchers: dict[str, list[asyncio.Queue[Any]]] = {}
        self._alive: dict[str, float] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Follow the log until the lock is free, then lead."""
        while not self._lock.acquire():
            self._replica.catch_up()
            self.following.set()
            await asyncio.sleep(FOLLOW_S)
        await self._lead()
        await asyncio.Event().wait()

    async def start(self) -> int:
        """Lead, or fail if another process does; returns the port.

        Raises:
            RemoteError: the folder has a leader.
        """
        if not self._lock.acquire():
            raise RemoteError(str(self._replica.folder), "it has a leader already", "Stop it first")
        await self._lead()
        return self.port

    async def _lead(self) -> None:
        started_s = time.monotonic()
        self._journal = Journal.promote(self._replica)
        self.commit({"op": "lead"})
        self.commit({"op": "plan"})
        now_s = time.monotonic()
        self._alive = dict.fromkeys(self.core.state.gateways, now_s)
        await self._serve()
        self.took_over_s = time.monotonic() - started_s
        self._tasks = [
            asyncio.create_task(self._plan_loop()),
            asyncio.create_task(self._tick_loop()),
        ]
        self.leading.set()
        self.following.set()

    async def _serve(self) -> None:
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
        ]
        checks = interceptors(self._security, time.time)
        server = grpc.aio.server(options=options, interceptors=checks)
        rpc.add_JobPlaneServicer_to_server(self, server)
        rpc.add_PlanFeedServicer_to_server(self, server)
        healthy = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        reflection.enable_server_reflection((*_SERVICES, reflection.SERVICE_NAME), server)
        self.port = server_port(server, self.address, self._security)
        await server.start()
        for name in _SERVICES:
            await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._server = server

    async def close(self) -> None:
        """Stop serving and give the lock up; may be called twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._server is not None:
            await self._server.stop(0.2)
            self._server = None
        if self._journal is not None:
            self._journal.close()
        self._lock.close()

    def health(self) -> dict[str, Any]:
        """State for supervisors; called from other threads, so it looks at copies."""
        opened = [job.open for job in list(self.core.state.jobs.values())]
        waiting = [one for one in opened if one is not None and one.remaining > 0]
        now_s = max(self._clock(), self._last_s)
        return {
            "jobs": len(opened),
            "waiting_jobs": len(waiting),
            "wanted_devices": sum(one.remaining for one in waiting),
            "longest_wait_s": max((now_s - one.opened_s for one in waiting), default=0.0),
            "leading": self.leading.is_set(),
            "port": self.port,
            "applied": self._replica.applied if self._journal is None else self._journal.applied,
            "epoch": self.core.state.epoch,
            "took_over_s": self.took_over_s,
        }

    def commit(self, command: dict[str, Any]) -> dict[str, Any]:
        """Stamp, apply and log one command, and pass its events on."""
        assert self._journal is not None
        self._last_s = max(self._clock(), self._last_s)
        reply = self._journal.commit({**command, "now": self._last_s})
        for job_id, event in self.core.events:
            for queue in self._watchers.get(job_id, ()):
                if queue.qsize() < EVENTS_KEPT:
                    queue.put_nowait(event)
        self.core.events.clear()
        if self.core.state.dirty:
            self._dirty.set()
        return reply

    async def _plan_loop(self) -> None:
        """Plan on job events, several within the debounce time at once, and every minute."""
        while True:
            try:
                await asyncio.wait_for(self._dirty.wait(), self.config.replan_interval_s)
                await asyncio.sleep(self.config.debounce_s)
            except TimeoutError:
                pass
            self._dirty.clear()
            self.commit({"op": "plan", "stalled": self._stalled})
            self._stalled = False
            async with self._plans:
                self._plans.notify_all()

    async def _tick_loop(self) -> None:
        checked_s = 0.0
        while True:
            await asyncio.sleep(self.config.report_interval_s)
            now_s = time.monotonic()
            limit_s = now_s - self.config.gateway_timeout_s
            dead = [name for name, seen_s in self._alive.items() if seen_s < limit_s]
            if dead or self.core.tick_due(max(self._clock(), self._last_s)):
                for name in dead:
                    del self._alive[name]
                self.commit({"op": "tick", "dead": dead})
            if now_s - checked_s > self.config.rebalance_s:
                checked_s = now_s
                if self.core.rebalance_needed():
                    self._stalled = True
                    self._dirty.set()

    # ------------------------------------------------------------------ JobPlane

    @typed
    async def Register(self, request: Any, context: Any) -> Any:
        version = self.config.schema.version
        if request.schema_version not in {0, version}:
            raise ConfigError("schema_version", request.schema_version, f"version {version}")
        reply = self.commit(
            {
                "op": "register",
                "job_id": request.job_id,
                "requirement": dict(request.requirement),
                "rounds": request.rounds,
                "response_s": request.response_s,
                "plan_uri": request.plan_uri,
                "upload_endpoint": request.upload_endpoint,
            }
        )
        epoch = self.core.state.epoch
        return pb.JobTicket(job_id=request.job_id, slot=reply["slot"], epoch=epoch)

    @typed
    async def OpenRound(self, request: Any, context: Any) -> Any:
        reply = self.commit(
            {
                "op": "open",
                "job_id": request.job_id,
                "demand": request.demand,
                "deadline_s": request.deadline_s,
                "overcommit": request.overcommit,
                "keep_failed": request.keep_failed,
                "lease_s": request.lease_s,
                "fraction": request.fraction,
            }
        )
        return pb.RoundTicket(**reply)

    @typed
    async def AddDemand(self, request: Any, context: Any) -> Any:
        row = {"job_id": request.job_id, "round_id": request.round_id, "devices": request.devices}
        return pb.RoundTicket(**self.commit({"op": "add", **row}))

    @typed
    async def CloseRound(self, request: Any, context: Any) -> Any:
        self.commit(
            {
                "op": "close",
                "job_id": request.job_id,
                "round_id": request.round_id,
                "success": request.success,
                "answers": request.answers,
                "response_s": request.response_s,
            }
        )
        return pb.Ack(epoch=self.core.state.epoch)

    @typed
    async def Finish(self, request: Any, context: Any) -> Any:
        reply = self.commit({"op": "finish", "job_id": request.job_id})
        return pb.JobReport(
            job_id=request.job_id,
            rounds_done=reply["rounds_done"],
            rounds_aborted=reply["rounds_aborted"],
            devices_assigned=reply["assigned"],
            devices_failed=reply["failed"],
            completion_s=reply["completion_s"],
        )

    @typed
    async def Explain(self, request: Any, context: Any) -> Any:
        report = self.core.explain(request.job_id, max(self._clock(), self._last_s))
        return pb.Explanation(json=json.dumps(report))

    @typed
    async def Overview(self, request: Any, context: Any) -> Any:
        report = self.core.overview(max(self._clock(), self._last_s))
        return pb.Explanation(json=json.dumps(report))

    async def _events(self, request: Any, context: Any) -> AsyncIterator[Any]:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._watchers.setdefault(request.job_id, []).append(queue)
        try:
            job = self.core.state.jobs.get(request.job_id)
            if job is not None and job.open is not None:
                opened = job.open
                kind = "EXPIRED" if opened.expired else "FILLED" if opened.filled else "ASSIGNED"
                state = pb.JobEvent(kind=kind, round_id=opened.round_id)
                state.assigned, state.failed = opened.spent, opened.failed
                yield state
            while True:
                event = dict(await queue.get())
                event.pop("reason", None)
                yield pb.JobEvent(**event)
        finally:
            self._watchers[request.job_id].remove(queue)
            if not self._watchers[request.job_id]:
                del self._watchers[request.job_id]

    # ------------------------------------------------------------------ PlanFeed

    @typed
    async def Report(self, request: Any, context: Any) -> Any:
        known = self.core.state.gateways.get(request.gateway)
        if known is None or known.incarnation != request.incarnation:
            raise ConfigError(
                "gateway", request.gateway, "a joined gateway", "Watch the plan first"
            )
        self._alive[request.gateway] = time.monotonic()
        if request.rounds or request.checkins or request.answers:
            self.commit(
                {
                    "op": "report",
                    "gateway": request.gateway,
                    "incarnation": request.incarnation,
                    "sequence": request.sequence,
                    "rounds": [
                        [row.round_id, row.spent, row.done, row.failed, row.limit, row.version]
                        for row in request.rounds
                    ],
                    "checkins": [
                        [wire.mask_from_bytes(row.mask), row.count] for row in request.checkins
                    ],
                    "answers": wire.answers_of(request),
                }
            )
        return pb.Ack(epoch=self.core.state.epoch)

    async def _feed(self, request: Any, context: Any) -> AsyncIterator[Any]:
        name = request.gateway
        if not name or len(name) > 200:
            raise ConfigError("gateway", name, "1 to 200 characters")
        self.commit({"op": "join", "gateway": name, "incarnation": request.incarnation})
        self._alive[name] = time.monotonic()
        sent = -1
        while True:
            known = self.core.state.gateways.get(name)
            if known is None or known.incarnation != request.incarnation:
                raise RemoteError(name, "another incarnation has joined, or reports stopped")
            if self.core.state.version != sent:
                sent = self.core.state.version
                yield wire.plan_message(self.core, name, max(self._clock(), self._last_s))
            async with self._plans:
                while self.core.state.version == sent:
                    await self._plans.wait()

    @typed_stream
    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """JobPlane.Watch and PlanFeed.Watch share a name; the message tells them apart."""
        stream = self._events if isinstance(request, pb.JobRef) else self._feed
        async for message in stream(request, context):
            yield message
