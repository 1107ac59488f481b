"""A device gateway: an asyncio gRPC server around :class:`GatewayCore`.

Follows the scheduler's plan feed, reports usage every interval, and keeps serving from the last
plan and its credits while the scheduler is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from actors.proto.messages import pb, rpc
from actors.venn import wire
from actors.venn.security import (
    SecurityConfig,
    channel,
    interceptors,
    lease_seal,
    metadata,
    server_port,
)
from actors.venn.status import typed, typed_stream
from raysys.errors import RemoteError
from raysys.federated.core.tickets import TICKET_BYTES, LeaseClaim
from raysys.federated.venn.gateway import GatewayCore
from raysys.federated.venn.gateway_plan import GatewayConfig, Usage

CALL_TIMEOUT_S = 5.0
PLAN_TIMEOUT_S = 30.0
MESSAGE_BYTES = 16 * 2**20
SERVICE = pb.DESCRIPTOR.services_by_name["DeviceGateway"].full_name


class GatewayServer(rpc.DeviceGatewayServicer):  # type: ignore[misc]
    """One gateway; ``start``, then ``close``. Plain class, so that tests drive it directly.

    Args:
        name: unique in the deployment; the incarnation tells restarts apart.
        scheduler: address of the plan feed.
    """

    def __init__(
        self,
        name: str,
        scheduler: str,
        config: GatewayConfig | None = None,
        security: SecurityConfig | None = None,
        report_interval_s: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.core = GatewayCore(name, time.time_ns(), config or GatewayConfig())
        self.port = 0
        self.checkins = 0
        self._scheduler = scheduler
        self._security = security or SecurityConfig()
        self._seal = lease_seal(self._security)
        self._interval_s = report_interval_s
        self._clock = clock
        self._server: Any = None
        self._channel: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        self._planned = asyncio.Event()
        self._sequence = 0
        self._acknowledged: dict[int, list[int]] = {}
        self._unreported: dict[int, int] = {}

    async def start(self, address: str = "127.0.0.1:0") -> int:
        """Bind, follow the plan feed, and return the port once the first plan is there."""
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
            ("grpc.max_concurrent_streams", 1024),
        ]
        checks = interceptors(self._security, time.time)
        self._server = grpc.aio.server(options=options, interceptors=checks)
        rpc.add_DeviceGatewayServicer_to_server(self, self._server)
        healthy = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, self._server)
        reflection.enable_server_reflection((SERVICE, reflection.SERVICE_NAME), self._server)
        self.port = server_port(self._server, address, self._security)
        self._channel = channel(self._scheduler, self._security)
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._report())]
        try:
            await asyncio.wait_for(self._planned.wait(), PLAN_TIMEOUT_S)
        except TimeoutError:
            reason = f"no plan within {PLAN_TIMEOUT_S:g} s"
            raise RemoteError(self._scheduler, reason, "Start the scheduler first") from None
        await self._server.start()
        await healthy.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        return self.port

    async def close(self) -> None:
        """Stop serving; may be called twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._server is not None:
            await self._server.stop(0.2)
            self._server = None
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    def health(self) -> dict[str, Any]:
        """State for supervisors."""
        plan = self.core.plan
        return {
            "name": self.core.name,
            "port": self.port,
            "plan": plan.version if plan else 0,
            "leases": len(self.core.leases),
            "checkins": self.checkins,
        }

    @typed
    async def CheckIn(self, request: Any, context: Any) -> Any:
        return await self._check_in(request, context)

    @typed_stream
    async def CheckInStream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            yield await self._check_in(request, context)

    @typed
    async def Renew(self, request: Any, context: Any) -> Any:
        counters = await self._counters(request, context)
        left = self.core.renew(counters, self._clock())
        return pb.LeaseAckBatch(
            accepted=(left > 0).tobytes(),
            expiry_s=left.astype("<f4").tobytes(),
            lease_tickets=self._tickets(counters, left),
        )

    @typed
    async def Release(self, request: Any, context: Any) -> Any:
        counters = await self._counters(request, context)
        accepted = self.core.release(counters, request.outcomes, self._clock())
        return pb.LeaseAckBatch(accepted=accepted.tobytes())

    async def _check_in(self, request: Any, context: Any) -> Any:
        plan = self.core.plan
        if plan is not None and request.schema_version != plan.schema.version:
            names = ", ".join(plan.schema.attributes)
            reason = f"schema version is {plan.schema.version}: {names}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        offers = self.core.check_in(
            request.device_ids,
            request.columns,
            self._clock(),
            request.compute,
            request.bandwidth,
        )
        self.checkins += len(offers.slots)
        core = self.core
        tickets = self._tickets(offers.leases, offers.expiry_s)
        return wire.offer_message(offers, request.sequence, core.name, core.incarnation, tickets)

    def _tickets(self, counters: npt.NDArray[np.uint64], left_s: npt.NDArray[np.floating]) -> bytes:
        """Signed proof of every live lease, zeros for the others; empty without a secret."""
        if self._seal is None:
            return b""
        column = bytearray(TICKET_BYTES * len(counters))
        name, epoch, now_s = self.core.name, self.core.incarnation, time.time()
        for place, (device, held) in self.core.holders(counters, self._clock()).items():
            task: Any = held.task
            counter = int(counters[place])
            claim = LeaseClaim(device.hex(), name, epoch, counter, task.job_id, task.round)
            start = TICKET_BYTES * place
            ticket = self._seal.issue(claim, now_s + float(left_s[place]))
            column[start : start + TICKET_BYTES] = ticket
        return bytes(column)

    async def _counters(self, request: Any, context: Any) -> npt.NDArray[np.uint64]:
        counters = wire.counters_of(request.lease_counters)
        if request.epoch != self.core.incarnation:
            reason = "these leases are of an earlier incarnation of this gateway"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        return counters

    async def _follow(self) -> None:
        """Adopt every plan of the feed; join again whenever the stream breaks."""
        stub = rpc.PlanFeedStub(self._channel)
        reference = pb.GatewayRef(gateway=self.core.name, incarnation=self.core.incarnation)
        while True:
            try:
                stream = stub.Watch(reference, metadata=metadata(self._security))
                async for message in stream:
                    if not self._planned.is_set():
                        self.core.heard(self._clock())
                    self.core.adopt(wire.plan_from_message(message, self._clock()))
                    self._planned.set()
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.05)

    async def _report(self) -> None:
        stub = rpc.PlanFeedStub(self._channel)
        while True:
            await asyncio.sleep(self._interval_s)
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self._report_once(stub)

    async def _report_once(self, stub: Any) -> None:
        """Send what changed since the last acknowledged report; counters are cumulative.

        Check-ins are added up until a report with them was acknowledged.
        """
        self.core.tick(self._clock())
        usage = self.core.usage()
        for mask, count in usage.checkins.items():
            self._unreported[mask] = self._unreported.get(mask, 0) + count
        changed = [row for row in usage.rounds if self._acknowledged.get(row[0]) != row]
        message = self._message(changed, usage)
        sent, self._unreported = self._unreported, {}
        sent_s = self._clock()
        try:
            await stub.Report(message, timeout=CALL_TIMEOUT_S, metadata=metadata(self._security))
        except grpc.aio.AioRpcError:
            # Supply is an estimate: after a lost answer these check-ins may count twice.
            for mask, count in sent.items():
                self._unreported[mask] = self._unreported.get(mask, 0) + count
            raise
        self.core.heard(sent_s)
        live = {row[0] for row in usage.rounds}
        kept = {key: row for key, row in self._acknowledged.items() if key in live}
        self._acknowledged = kept | {row[0]: row for row in changed}

    def _message(self, changed: list[list[int]], usage: Usage) -> Any:
        """The next report; profiled answers in a report that gets lost are not sent again."""
        self._sequence += 1
        message = pb.UsageReport(
            gateway=self.core.name, incarnation=self.core.incarnation, sequence=self._sequence
        )
        for round_id, spent, done, failed, limit, version in changed:
            message.rounds.add(
                round_id=round_id,
                spent=spent,
                done=done,
                failed=failed,
                limit=limit,
                version=version,
            )
        for mask, count in self._unreported.items():
            message.checkins.add(mask=wire.mask_to_bytes(mask), count=count)
        for round_id, answers in usage.answers.items():
            kinds, times = zip(*answers) if answers else ((), ())
            message.answers.add(
                round_id=round_id,
                classes=bytes(kinds),
                response_s=np.asarray(times, dtype="<f4").tobytes(),
            )
        return message
