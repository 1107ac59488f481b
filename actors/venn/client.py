"""Clients of the service: for job servers, for edge gateways, and one that plays many devices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from actors.proto.messages import pb, rpc
from actors.venn.security import SecurityConfig, channel, metadata
from actors.venn.status import remote_error
from raysys.federated.core.tickets import TICKET_BYTES

TIMEOUT_S = 10.0


class _Client:
    """A channel with identity; ``async with`` closes it."""

    def __init__(self, address: str, security: SecurityConfig | None = None) -> None:
        self.address = address
        self._security = security or SecurityConfig()
        self._channel = channel(address, self._security)

    async def close(self) -> None:
        """Close the channel; may be called twice."""
        await self._channel.close()

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any, timeout_s: float = TIMEOUT_S) -> Any:
        try:
            return await method(
                request,
                timeout=timeout_s,
                metadata=metadata(self._security),
                wait_for_ready=True,
            )
        except grpc.aio.AioRpcError as error:
            raise remote_error(self.address, error) from error


class JobClient(_Client):
    """One job at the JobPlane.

    Raises (all methods):
        RemoteError: the call was refused or the service cannot be reached.
    """

    def __init__(self, address: str, job_id: str, security: SecurityConfig | None = None) -> None:
        super().__init__(address, security)
        self.job_id = job_id
        self._stub = rpc.JobPlaneStub(self._channel)

    async def register(self, requirement: Mapping[str, float], rounds: int = 0, **more: Any) -> Any:
        """Register the job; the same job may register again after a crash."""
        spec = pb.JobSpec(job_id=self.job_id, requirement=dict(requirement), rounds=rounds, **more)
        return await self._call(self._stub.Register, spec)

    async def open_round(self, demand: int, deadline_s: float, **more: Any) -> Any:
        """Ask for ``demand`` devices; returns the ticket with the round's id."""
        request = pb.RoundRequest(job_id=self.job_id, demand=demand, deadline_s=deadline_s, **more)
        return await self._call(self._stub.OpenRound, request)

    async def add_demand(self, round_id: int, devices: int) -> Any:
        """Ask for replacements, or refill an asynchronous job."""
        delta = pb.DemandDelta(job_id=self.job_id, round_id=round_id, devices=devices)
        return await self._call(self._stub.AddDemand, delta)

    async def close_round(
        self, round_id: int, success: bool, answers: int = 0, response_s: float = 0.0
    ) -> Any:
        """End the round and tell how it went."""
        request = pb.RoundClose(
            job_id=self.job_id,
            round_id=round_id,
            success=success,
            answers=answers,
            response_s=response_s,
        )
        return await self._call(self._stub.CloseRound, request)

    async def finish(self) -> Any:
        """Leave; returns the report."""
        return await self._call(self._stub.Finish, pb.JobRef(job_id=self.job_id))

    async def explain(self) -> dict[str, Any]:
        """Why the job waits."""
        answer = await self._call(self._stub.Explain, pb.JobRef(job_id=self.job_id))
        return dict(json.loads(answer.json))

    async def overview(self) -> dict[str, Any]:
        """Jobs, groups and supply of the whole service."""
        answer = await self._call(self._stub.Overview, pb.Empty())
        return dict(json.loads(answer.json))

    async def events(self) -> AsyncIterator[Any]:
        """Events of the job until the stream breaks."""
        reference = pb.JobRef(job_id=self.job_id)
        try:
            async for event in self._stub.Watch(reference, metadata=metadata(self._security)):
                yield event
        except grpc.aio.AioRpcError as error:
            raise remote_error(self.address, error) from error

    async def follow(self, pause_s: float = 0.05) -> AsyncIterator[Any]:
        """Events of the job without end: the stream is opened again when the leader changes.

        Every (re)connection starts with the state of the open round, if there is one.

        Raises:
            RemoteError: the service refuses the caller.
        """
        reference = pb.JobRef(job_id=self.job_id)
        while True:
            try:
                async for event in self._stub.Watch(reference, metadata=metadata(self._security)):
                    yield event
            except grpc.aio.AioRpcError as error:
                if error.code() in {
                    grpc.StatusCode.UNAUTHENTICATED,
                    grpc.StatusCode.PERMISSION_DENIED,
                    grpc.StatusCode.INVALID_ARGUMENT,
                }:
                    raise remote_error(self.address, error) from error
            await asyncio.sleep(pause_s)


@dataclass(frozen=True, slots=True, eq=False)
class Assignments:
    """Answer to a batch: see ``OfferBatch`` in the protocol for the codes in ``slots``."""

    gateway: str
    epoch: int
    slots: npt.NDArray[np.int32]
    leases: npt.NDArray[np.uint64]
    expiry_s: npt.NDArray[np.float32]
    retry_after_s: npt.NDArray[np.float32]
    tasks: dict[int, Any]
    tickets: bytes = b""

    def ticket(self, place: int) -> bytes:
        """Proof of the lease at a place of the batch; empty from a service without tickets."""
        return ticket_at(self.tickets, place)


class DeviceClient(_Client):
    """Checks devices in at one gateway, in batches.

    Raises (all methods):
        RemoteError: the call was refused or the gateway cannot be reached.
    """

    def __init__(
        self, address: str, security: SecurityConfig | None = None, schema_version: int = 1
    ) -> None:
        super().__init__(address, security)
        self._stub = rpc.DeviceGatewayStub(self._channel)
        self._schema_version = schema_version

    async def check_in(
        self,
        device_ids: bytes,
        columns: Sequence[npt.NDArray[np.float32]],
        sequence: int = 0,
        speed: tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]] | None = None,
    ) -> Assignments:
        """Check in N devices; ids of 16 bytes each, one float32 array per attribute.

        Args:
            speed: compute time and bandwidth of every device over the population's means; lets
                the service match tiers.
        """
        compute, bandwidth = (np.asarray(part, dtype="<f4").tobytes() for part in speed or ((), ()))
        request = pb.CheckInBatch(
            schema_version=self._schema_version,
            device_ids=device_ids,
            columns=[np.asarray(column, dtype="<f4").tobytes() for column in columns],
            sequence=sequence,
            compute=compute,
            bandwidth=bandwidth,
        )
        return unpack(await self._call(self._stub.CheckIn, request))

    async def release(self, epoch: int, leases: Sequence[int], outcomes: Sequence[int]) -> bytes:
        """End leases with outcomes 0 done, 1 declined, 2 failed; one byte each: accepted or not."""
        request = pb.LeaseBatch(
            epoch=epoch,
            lease_counters=np.asarray(leases, dtype="<u8").tobytes(),
            outcomes=bytes(outcomes),
        )
        return bytes((await self._call(self._stub.Release, request)).accepted)

    async def renew(self, epoch: int, leases: Sequence[int]) -> npt.NDArray[np.float32]:
        """Prolong leases; seconds left of each, 0 for one that is not live."""
        return (await self.prolong(epoch, leases))[0]

    async def prolong(
        self, epoch: int, leases: Sequence[int]
    ) -> tuple[npt.NDArray[np.float32], bytes]:
        """As :meth:`renew`, with the new tickets; see :func:`ticket_at`."""
        counters = np.asarray(leases, dtype="<u8").tobytes()
        request = pb.LeaseBatch(epoch=epoch, lease_counters=counters)
        answer = await self._call(self._stub.Renew, request)
        return np.frombuffer(answer.expiry_s, dtype="<f4"), bytes(answer.lease_tickets)


def ticket_at(tickets: bytes, place: int) -> bytes:
    """One entry of a column of lease tickets; empty where there is none."""
    found = tickets[TICKET_BYTES * place : TICKET_BYTES * (place + 1)]
    return found if any(found) else b""


def unpack(answer: Any) -> Assignments:
    """Columns of an ``OfferBatch``."""
    return Assignments(
        answer.gateway,
        answer.epoch,
        np.frombuffer(answer.slots, dtype="<i4"),
        np.frombuffer(answer.lease_counters, dtype="<u8"),
        np.frombuffer(answer.expiry_s, dtype="<f4"),
        np.frombuffer(answer.retry_after_s, dtype="<f4"),
        {task.slot: task for task in answer.tasks},
        bytes(answer.lease_tickets),
    )
