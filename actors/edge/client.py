"""A device's calls to the edge plane, each answer checked before anything is believed.

An answer must carry the challenge and lease that were sent, sizes must be what was announced and
within the device's limits, and content must have the announced checksum.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

from actors.edge.state import Work
from actors.proto.edge_messages import pb, rpc
from actors.venn.security import SecurityConfig, channel, metadata
from actors.venn.status import remote_error
from raysys.federated.swan.plans import Plan, PlanLimits, PlanRefusedError, plan_from_json

TIMEOUT_S = 10.0
CHUNK_BYTES = 256 * 1024
MESSAGE_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Planned:
    """An accepted plan: its text, what it means, and the model that belongs to it."""

    text: str
    plan: Plan
    nonce: bytes
    model_bytes: int
    model_sha256: bytes


class EdgeClient:
    """One endpoint; ``async with`` closes it.

    Raises (all methods):
        RemoteError: the call failed; the reason starts with the gRPC status.
    """

    def __init__(
        self,
        address: str,
        device_id: bytes,
        security: SecurityConfig | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.address = address
        self._id = device_id
        self._security = security or SecurityConfig()
        self._timeout_s = timeout_s
        self._channel = channel(address, self._security, MESSAGE_BYTES)
        self._plane = rpc.EdgePlaneStub(self._channel)
        self._enrolment = rpc.EnrolmentStub(self._channel)

    async def close(self) -> None:
        """Close the channel; may be called twice."""
        await self._channel.close()

    async def __aenter__(self) -> EdgeClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def enrol(self, code: str, description: str) -> Any:
        """Enrol and return the ticket."""
        return await self.enrol_as(self._id, code, description)

    async def enrol_as(self, device_id: bytes, code: str, description: str) -> Any:
        """Enrol one of many devices over this channel."""
        request = pb.EnrolRequest(device_id=device_id, code=code, description=description)
        return await self._call(self._enrolment.Enrol, request)

    async def plan(self, work: Work, limits: PlanLimits) -> Planned:
        """The plan of a lease.

        Raises:
            PlanRefusedError: a replayed or foreign answer, or a plan that asks too much.
        """
        challenge = secrets.token_bytes(16)
        lease = _lease(work)
        request = pb.PlanRequest(device_id=self._id, lease=lease, challenge=challenge)
        answer = await self._call(self._plane.GetPlan, request)
        if answer.challenge != challenge or answer.lease != lease:
            raise self._refuse("the answer is to another question (replayed?)")
        if not 0 < answer.model_bytes <= limits.max_model_bytes:
            raise self._refuse(f"a model of {answer.model_bytes} bytes")
        if len(answer.model_sha256) != 32 or not 1 <= len(answer.nonce) <= 256:
            raise self._refuse("no proper checksum or nonce")
        plan = plan_from_json(answer.plan, limits, self.address)
        return Planned(
            answer.plan, plan, answer.nonce, answer.model_bytes, bytes(answer.model_sha256)
        )

    async def download(self, work: Work, have: bytes) -> bytes:
        """The model of a plan, going on after what there is already.

        Raises:
            PlanRefusedError: more bytes than announced, out of order, or a wrong checksum.
        """
        content = bytearray(have[: work.model_bytes])
        request = pb.ModelRequest(
            device_id=self._id,
            lease=_lease(work),
            model_sha256=bytes.fromhex(work.model_sha256),
            offset=len(content),
        )
        try:
            stream = self._plane.Download(
                request, timeout=6 * self._timeout_s, metadata=metadata(self._security)
            )
            async for chunk in stream:
                if chunk.offset != len(content):
                    raise self._refuse("chunks out of order")
                content += chunk.content
                if len(content) > work.model_bytes:
                    stream.cancel()
                    raise self._refuse(f"more than the announced {work.model_bytes} bytes")
        except grpc.aio.AioRpcError as error:
            raise DownloadBrokenError(bytes(content), remote_error(self.address, error)) from error
        if len(content) < work.model_bytes:
            raise self._refuse(f"{len(content)} of {work.model_bytes} bytes, and no more")
        if hashlib.sha256(content).hexdigest() != work.model_sha256:
            raise self._refuse("the model does not have its checksum")
        return bytes(content)

    async def upload(self, work: Work, content: bytes) -> Any:
        """Send an update, going on where an earlier try broke off; returns the receipt."""
        head = pb.UploadHead(
            device_id=self._id,
            lease=_lease(work),
            nonce=bytes.fromhex(work.nonce),
            total_bytes=len(content),
            sha256=hashlib.sha256(content).digest(),
        )
        progress = await self._call(self._plane.Progress, head)
        start = progress.have_bytes if progress.have_bytes <= len(content) else 0

        async def parts() -> AsyncIterator[Any]:
            yield pb.UploadPart(head=head)
            for at in range(start, len(content), CHUNK_BYTES):
                chunk = pb.Chunk(offset=at, content=content[at : at + CHUNK_BYTES])
                yield pb.UploadPart(chunk=chunk)

        try:
            return await self._plane.Upload(
                parts(), timeout=6 * self._timeout_s, metadata=metadata(self._security)
            )
        except grpc.aio.AioRpcError as error:
            raise remote_error(self.address, error) from error

    async def share_profile(self, key: str, profile: str, wrong: bool = False) -> str:
        """Send a profile (or only ask) and return what the devices agree upon, JSON or empty."""
        request = pb.ProfileMessage(device_id=self._id, key=key, profile=profile, wrong=wrong)
        answer = await self._call(self._plane.ShareProfile, request)
        return str(answer.profile)

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=self._timeout_s, metadata=metadata(self._security))
        except grpc.aio.AioRpcError as error:
            raise remote_error(self.address, error) from error

    def _refuse(self, reason: str) -> PlanRefusedError:
        return PlanRefusedError(self.address, reason, "The device goes on without it")


class DownloadBrokenError(Exception):
    """A download broke off; what came so far, and why. Internal to the device."""

    def __init__(self, content: bytes, cause: Exception) -> None:
        super().__init__(content, cause)
        self.content = content
        self.cause = cause


def _lease(work: Work) -> Any:
    return pb.Lease(
        gateway=work.gateway,
        epoch=work.epoch,
        counter=work.counter,
        job_id=work.job_id,
        round=work.round,
        ticket=bytes.fromhex(work.ticket),
    )
