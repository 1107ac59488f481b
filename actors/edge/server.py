"""The edge plane: enrolment, plans, models, updates and shared profiles over gRPC."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from actors.edge.job import EdgeJob
from actors.edge.registry import Registry
from actors.proto.edge_messages import pb, rpc
from actors.venn.security import (
    SecurityConfig,
    TokenAuthority,
    interceptors,
    lease_seal,
    server_port,
)
from actors.venn.status import code_of, typed, typed_stream
from raysys.config import check_range
from raysys.credentials import SECRET, revealed
from raysys.errors import ConfigError, DataError, InfeasibleError, RaysysError
from raysys.federated.core.tickets import LeaseClaim
from raysys.federated.swan.plans import PlanLimits, plan_to_json
from raysys.federated.swan.rounds import LeaseKey
from raysys.federated.swan.sharing import ProfileBook, SharingConfig

CHUNK_BYTES = 256 * 1024
MESSAGE_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeServerConfig:
    """The service.

    Args:
        code: enrolment code, or ``file:PATH``.
        folder: where enrolled devices are kept; empty for memory only.
        gateways: addresses told to devices. attributes: columns of a check-in, in Venn's order.
        partial_uploads: unfinished uploads held for a resume, oldest dropped first.
        tickets: leases must carry the ticket that their gateway signed. It takes effect where
            there is a token secret; turn it off for gateways that have another secret.
    """

    code: str = field(default="", repr=False, metadata=SECRET)
    folder: str = ""
    gateways: tuple[str, ...] = ()
    schema_version: int = 1
    attributes: tuple[str, ...] = ("cpu", "mem", "os")
    partial_uploads: int = 256
    tickets: bool = True
    limits: PlanLimits = field(default_factory=PlanLimits)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        check_range(self, "partial_uploads", 1)
        check_range(self, "schema_version", 1)


class EdgeServer(rpc.EdgePlaneServicer, rpc.EnrolmentServicer):  # type: ignore[misc]
    """Serves any number of jobs; ``start``, then ``close``."""

    def __init__(
        self,
        config: EdgeServerConfig,
        clients: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.jobs: dict[str, EdgeJob] = {}
        self.book = ProfileBook(config.sharing)
        self.port = 0
        self.bytes_down = self.bytes_up = 0
        self._clock = clock
        self.refused_leases = 0
        self._authority = _authority(config.security)
        self._seal = lease_seal(config.security) if config.tickets else None
        self.registry = Registry(
            revealed(config.code, "server.code"),
            clients,
            authority=self._authority,
            folder=config.folder,
        )
        self._partial: dict[LeaseKey, bytearray] = {}
        self._server: Any = None

    async def start(self, address: str = "127.0.0.1:0") -> int:
        """Bind and serve; returns the port."""
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
        ]
        checks = interceptors(self.config.security, self._clock)
        self._server = grpc.aio.server(options=options, interceptors=checks)
        rpc.add_EdgePlaneServicer_to_server(self, self._server)
        rpc.add_EnrolmentServicer_to_server(self, self._server)
        self.port = server_port(self._server, address, self.config.security)
        await self._server.start()
        return self.port

    async def close(self) -> None:
        """Stop serving; may be called twice."""
        if self._server is not None:
            await self._server.stop(0.2)
            self._server = None

    def add(self, job: EdgeJob, host: str = "127.0.0.1") -> None:
        """Serve a job's plans from here."""
        job.address = job.address or f"{host}:{self.port}"
        self.jobs[job.config.job_id] = job

    @typed
    async def Enrol(self, request: Any, context: Any) -> Any:
        now_s = self._clock()
        token = self.registry.enrol(request.device_id, request.code, request.description, now_s)
        return pb.EnrolTicket(
            token=token,
            life_s=self.registry.token_life_s,
            gateways=self.config.gateways,
            schema_version=self.config.schema_version,
            attributes=self.config.attributes,
            mean_sample_ms=self.registry.mean_sample_ms,
        )

    @typed
    async def GetPlan(self, request: Any, context: Any) -> Any:
        job, lease = self._lease(request, context)
        client = self.registry.client_of(request.device_id)
        admission = job.admit(lease, request.lease.round, request.device_id, client)
        return pb.PlanAnswer(
            lease=request.lease,
            challenge=request.challenge,
            nonce=admission.nonce,
            plan=plan_to_json(admission.plan),
            model_bytes=len(job.model),
            model_sha256=job.model_sha256,
        )

    @typed_stream
    async def Download(self, request: Any, context: Any) -> AsyncIterator[Any]:
        job, _ = self._lease(request, context)
        model = job.model
        if request.model_sha256 != job.model_sha256:
            raise InfeasibleError("this model", "a newer one has taken its place", "Check in again")
        for start in range(min(request.offset, len(model)), len(model), CHUNK_BYTES):
            part = model[start : start + CHUNK_BYTES]
            self.bytes_down += len(part)
            yield pb.Chunk(offset=start, content=part)

    async def Upload(self, parts: AsyncIterator[Any], context: Any) -> Any:
        try:
            return await self._receive(parts, context)
        except RaysysError as error:
            await context.abort(code_of(error), str(error)[:2000])

    @typed
    async def Progress(self, request: Any, context: Any) -> Any:
        _, lease = self._lease(request, context)
        return pb.UploadReceipt(have_bytes=len(self._partial.get(lease, b"")))

    @typed
    async def ShareProfile(self, request: Any, context: Any) -> Any:
        device = self._known(request.device_id, context)
        now_s = self._clock()
        if request.wrong:
            self.book.strike(request.key, device)
        elif request.profile:
            self.book.add(now_s, request.key, device, _profile(request.profile))
        agreed = self.book.consensus(now_s, request.key, request.key.partition("|")[0])
        text = json.dumps(agreed) if agreed is not None else ""
        return pb.ProfileMessage(key=request.key, profile=text)

    async def _receive(self, parts: AsyncIterator[Any], context: Any) -> Any:
        head: Any = None
        job: EdgeJob | None = None
        lease: LeaseKey = ("", 0, 0)
        held = bytearray()
        async for part in parts:
            if head is None:
                if part.WhichOneof("part") != "head":
                    raise ConfigError("upload", "a chunk", "the head first")
                head = part.head
                job, lease = self._lease(head, context)
                held = self._resume(lease, head.total_bytes)
                continue
            chunk = part.chunk
            if chunk.offset != len(held) or chunk.offset + len(chunk.content) > head.total_bytes:
                raise ConfigError("upload.offset", chunk.offset, f"{len(held)}, within the total")
            held += chunk.content
            self.bytes_up += len(chunk.content)
        if job is None:
            raise ConfigError("upload", "nothing", "a head and chunks")
        if len(held) < head.total_bytes:
            return pb.UploadReceipt(have_bytes=len(held))
        content = bytes(held)
        self._partial.pop(lease, None)
        if hashlib.sha256(content).digest() != head.sha256:
            raise DataError("upload", "checksum does not match", "Send it again")
        accepted = job.answer(lease, head.device_id, head.nonce, content)
        reason = "" if accepted else "screened out"
        return pb.UploadReceipt(
            complete=True, accepted=accepted, have_bytes=len(content), reason=reason
        )

    def _resume(self, lease: LeaseKey, total: int) -> bytearray:
        if not 0 < total <= self.config.limits.max_model_bytes:
            most = self.config.limits.max_model_bytes
            raise ConfigError("upload.total_bytes", total, f"1 to {most}")
        held = self._partial.pop(lease, bytearray())
        self._partial[lease] = held if len(held) <= total else bytearray()
        while len(self._partial) > self.config.partial_uploads:
            self._partial.pop(next(iter(self._partial)))
        return self._partial[lease]

    def _lease(self, request: Any, context: Any) -> tuple[EdgeJob, LeaseKey]:
        """The job and lease of a request from a device that is who it says it is."""
        device = self._known(request.device_id, context)
        lease = request.lease
        self._check_ticket(device, lease)
        job = self.jobs.get(lease.job_id)
        if job is None:
            raise InfeasibleError(f"job {lease.job_id[:80]!r}", "it is not here", "Check in again")
        return job, (lease.gateway, lease.epoch, lease.counter)

    def _check_ticket(self, device: str, lease: Any) -> None:
        if self._seal is None:
            return
        claim = LeaseClaim(
            device, lease.gateway, lease.epoch, lease.counter, lease.job_id, lease.round
        )
        try:
            self._seal.check(claim, lease.ticket, self._clock())
        except RaysysError:
            self.refused_leases += 1
            raise

    def _known(self, device: bytes, context: Any) -> str:
        name = device.hex()
        if self._authority is not None:
            header = dict(context.invocation_metadata()).get("authorization", "")
            claims = self._authority.check(str(header).removeprefix("Bearer "), self._clock())
            if claims["sub"] != name:
                raise ConfigError("device_id", name, "the device that the token was issued to")
        self.registry.client_of(device)
        return name


def _authority(security: SecurityConfig) -> TokenAuthority | None:
    if not security.token_secret:
        return None
    revoked = Path(security.revoked) if security.revoked else None
    return TokenAuthority(Path(security.token_secret).read_bytes().strip(), revoked)


def _profile(text: str) -> dict[str, Any]:
    if len(text) > 65_536:
        raise ConfigError("profile", len(text), "at most 65536 bytes")
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise ConfigError("profile", "(text)", "JSON") from error
    if not isinstance(plain, dict):
        raise ConfigError("profile", "(text)", "a JSON object")
    return plain
