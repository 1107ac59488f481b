"""Identity and hostile input on the wire: TLS, mutual TLS, tokens, fuzzed messages."""

from __future__ import annotations

import asyncio
import datetime
import gc
import ipaddress
import random
import resource
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from actors.proto import generate
from actors.proto.messages import pb
from actors.venn.client import DeviceClient, JobClient
from actors.venn.gateway import GatewayServer
from actors.venn.scheduler import SchedulerServer
from actors.venn.security import SecurityConfig, TokenAuthority
from raysys.errors import ConfigError, RemoteError

SECRET = b"0123456789abcdef0123456789abcdef"


def write_certificates(folder: Path, name: str) -> tuple[str, str, str]:
    """An authority and a certificate for localhost that it signed: paths of both and the key."""
    now = datetime.datetime.now(datetime.UTC)

    def sign(
        common: str,
        key: ec.EllipticCurvePrivateKey,
        issuer: str,
        signer: ec.EllipticCurvePrivateKey,
        authority: bool,
    ) -> x509.Certificate:
        loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([loopback]), critical=False)
            .sign(signer, hashes.SHA256())
        )

    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = sign(f"root-{name}", root_key, f"root-{name}", root_key, True)
    leaf = sign("localhost", key, f"root-{name}", root_key, False)
    paths = [folder / f"{name}-{part}.pem" for part in ("root", "leaf", "key")]
    paths[0].write_bytes(root.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    paths[2].write_bytes(key.private_bytes(*plain, serialization.NoEncryption()))
    return str(paths[0]), str(paths[1]), str(paths[2])


def test_mutual_tls_lets_only_the_known_in(tmp_path: Path) -> None:
    root, leaf, key = write_certificates(tmp_path, "ours")
    other_root, other_leaf, other_key = write_certificates(tmp_path, "other")
    ours = SecurityConfig(certificate=leaf, key=key, authority=root, mutual=True)
    nobody = SecurityConfig(authority=root)
    stranger = SecurityConfig(authority=root, certificate=other_leaf, key=other_key)
    fooled = SecurityConfig(authority=other_root, certificate=leaf, key=key)

    async def scenario() -> None:
        server = SchedulerServer(str(tmp_path / "state"), "127.0.0.1:0", security=ours)
        address = f"127.0.0.1:{await server.start()}"
        gateway = GatewayServer("g", address, security=ours)
        port = await gateway.start()
        async with JobClient(address, "job", ours) as job:
            assert (await job.register({"cpu": 1})).slot == 0
        async with DeviceClient(f"127.0.0.1:{port}", ours) as device:
            columns = [np.ones(1, dtype=np.float32)] * 3
            assert (await device.check_in(bytes(16), columns)).slots.tolist() == [-1]
        for security in (nobody, stranger, fooled):
            async with JobClient(address, "job", security) as job:
                with pytest.raises(RemoteError, match=r"UNAVAILABLE|DEADLINE"):
                    await job._call(job._stub.Overview, pb.Empty(), 1.0)
        await gateway.close()
        await server.close()

    asyncio.run(scenario())


def test_tokens_by_role_expiry_and_revocation(tmp_path: Path) -> None:
    secret, revoked = tmp_path / "secret", tmp_path / "revoked"
    secret.write_bytes(SECRET)
    authority = TokenAuthority(SECRET)

    def config(token: str = "") -> SecurityConfig:
        return SecurityConfig(token_secret=str(secret), revoked=str(revoked), token=token)

    async def scenario() -> None:
        server = SchedulerServer(str(tmp_path / "state"), "127.0.0.1:0", security=config())
        address = f"127.0.0.1:{await server.start()}"
        good = authority.issue("me", "job", 0.0, 1e12)
        cases = [
            ("", "UNAUTHENTICATED"),
            ("x.y", "UNAUTHENTICATED"),
            (good[:-2] + "AA", "UNAUTHENTICATED"),
            (authority.issue("me", "job", 0.0, 1.0), "UNAUTHENTICATED.*expired"),
            (authority.issue("me", "device", 0.0, 1e12), "PERMISSION_DENIED.*role job"),
        ]
        for token, code in cases:
            async with JobClient(address, "job", config(token)) as job:
                with pytest.raises(RemoteError, match=code):
                    await job.overview()
        async with JobClient(address, "job", config(good)) as job:
            assert (await job.overview())["jobs"] == []
            revoked.write_text(authority.check(good, 0.0)["id"], encoding="utf-8")
            with pytest.raises(RemoteError, match=r"UNAUTHENTICATED.*revoked"):
                await job.overview()
        channel = grpc.aio.insecure_channel(address)
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="raysys.venn.v1.JobPlane")
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = reflection.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = {item.name for item in (await call.read()).list_services_response.service}
        assert {"raysys.venn.v1.JobPlane", "raysys.venn.v1.PlanFeed"} <= listed
        call.cancel()
        await channel.close()
        await server.close()

    asyncio.run(scenario())


def test_security_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="token_secret"):
        TokenAuthority(b"short")
    with pytest.raises(ConfigError, match="role"):
        TokenAuthority(SECRET).issue("me", "king", 0, 1)
    with pytest.raises(ConfigError, match="key"):
        SecurityConfig(certificate="a.pem")
    with pytest.raises(ConfigError, match="authority"):
        SecurityConfig(certificate="a.pem", key="b.pem", mutual=True)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


METHODS = [
    ("DeviceGateway", "CheckIn", pb.CheckInBatch),
    ("DeviceGateway", "Renew", pb.LeaseBatch),
    ("DeviceGateway", "Release", pb.LeaseBatch),
    ("JobPlane", "Register", pb.JobSpec),
    ("JobPlane", "OpenRound", pb.RoundRequest),
    ("JobPlane", "AddDemand", pb.DemandDelta),
    ("JobPlane", "CloseRound", pb.RoundClose),
    ("JobPlane", "Finish", pb.JobRef),
    ("JobPlane", "Explain", pb.JobRef),
    ("PlanFeed", "Report", pb.UsageReport),
]
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
ODD = [
    0,
    1,
    -1,
    2**31 - 1,
    -(2**31),
    2**63 - 1,
    -(2**63),
    2**64 - 1,
    float("nan"),
    float("inf"),
    -1.5,
]
TEXTS = ["", "job", "x" * 300, "\x00", "../../etc", "job-\U0001f4f1"]


def hostile(kind: type, rng: random.Random) -> bytes:
    """Well-formed with odd values, or broken bytes."""
    message = kind()
    for field in message.DESCRIPTOR.fields:
        value: object = rng.choice(ODD)
        if field.type == field.TYPE_STRING:
            value = rng.choice(TEXTS)
        elif field.type == field.TYPE_BYTES:
            value = rng.randbytes(rng.choice([0, 1, 8, 16, 31, 32]))
        try:
            if field.name == "requirement":
                message.requirement[rng.choice(["cpu", "zz"])] = float(rng.choice(ODD))
            elif field.name in {"rounds", "checkins"} and field.message_type is not None:
                item = getattr(message, field.name).add()
                for inner in item.DESCRIPTOR.fields:
                    if inner.type != inner.TYPE_BYTES:
                        setattr(item, inner.name, rng.choice(ODD))
            elif field.is_repeated:
                getattr(message, field.name).extend([value] * rng.randint(0, 4))
            else:
                setattr(message, field.name, value)
        except (ValueError, TypeError, OverflowError):
            continue
    data = message.SerializeToString()
    style = rng.random()
    if style < 0.2:
        return data[: rng.randint(0, len(data))]
    if style < 0.4:
        return rng.randbytes(rng.randint(0, 200))
    return data


def test_hostile_messages_get_typed_codes_and_do_no_harm(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = SchedulerServer(str(tmp_path), "127.0.0.1:0")
        scheduler = f"127.0.0.1:{await server.start()}"
        gateway = GatewayServer("g", scheduler)
        device = f"127.0.0.1:{await gateway.start()}"
        channels = {
            "DeviceGateway": grpc.aio.insecure_channel(device),
            "JobPlane": grpc.aio.insecure_channel(scheduler),
            "PlanFeed": grpc.aio.insecure_channel(scheduler),
        }
        rng = random.Random(7)
        codes: set[grpc.StatusCode] = set()
        before = 0
        for number in range(1200):
            service, method, kind = METHODS[number % len(METHODS)]
            call = channels[service].unary_unary(f"/raysys.venn.v1.{service}/{method}")
            data = hostile(kind, rng)
            try:
                await call(data, timeout=10)
                codes.add(grpc.StatusCode.OK)
            except grpc.aio.AioRpcError as error:
                codes.add(error.code())
            if number == 400:
                gc.collect()
                before = resident_bytes()
        gc.collect()
        assert codes <= ALLOWED
        assert grpc.StatusCode.INVALID_ARGUMENT in codes
        assert resident_bytes() - before < 32 * 2**20
        for channel in channels.values():
            await channel.close()
        async with JobClient(scheduler, "after") as job:
            await job.register({"cpu": 1})
            assert "after" in {item["job"] for item in (await job.overview())["jobs"]}
        await gateway.close()
        await server.close()

    asyncio.run(scenario())


def test_hostile_streams_get_typed_codes_and_the_port_survives_noise(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = SchedulerServer(str(tmp_path), "127.0.0.1:0")
        scheduler = f"127.0.0.1:{await server.start()}"
        gateway = GatewayServer("g", scheduler)
        port = await gateway.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        jobs = grpc.aio.insecure_channel(scheduler)
        check_in = channel.stream_stream("/raysys.venn.v1.DeviceGateway/CheckInStream")
        watch = jobs.unary_stream("/raysys.venn.v1.JobPlane/Watch")
        feed = jobs.unary_stream("/raysys.venn.v1.PlanFeed/Watch")
        rng = random.Random(11)
        codes: set[grpc.StatusCode] = set()
        for number in range(120):
            # One message a stream: a client that goes on sending to an ended call blames itself.
            codes.add(await outcome(check_in(iter([hostile(pb.CheckInBatch, rng)]), timeout=5)))
            if number % 8 == 0:  # these stay open when the message happens to be good
                codes.add(await outcome(watch(hostile(pb.JobRef, rng), timeout=0.05)))
                codes.add(await outcome(feed(hostile(pb.GatewayRef, rng), timeout=0.05)))
        assert codes <= ALLOWED | {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}
        assert grpc.StatusCode.INVALID_ARGUMENT in codes
        for noise in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            rng.randbytes(5000),
            b"PRI * HTTP/2.0\r\n\r\n",
        ):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(noise)
            writer.close()
            await writer.wait_closed()
        async with DeviceClient(f"127.0.0.1:{port}") as device:
            columns = [np.ones(1, dtype=np.float32)] * 3
            assert len((await device.check_in(bytes(16), columns)).slots) == 1
        for closing in (channel, jobs, gateway, server):
            await closing.close()

    asyncio.run(scenario())


async def outcome(call: Any) -> grpc.StatusCode:
    """Read a stream to its end."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_too_large_messages_are_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = SchedulerServer(str(tmp_path), "127.0.0.1:0")
        gateway = GatewayServer("g", f"127.0.0.1:{await server.start()}")
        async with DeviceClient(f"127.0.0.1:{await gateway.start()}") as device:
            with pytest.raises(RemoteError, match="RESOURCE_EXHAUSTED"):
                await device.check_in(bytes(17 * 2**20), [])
        await gateway.close()
        await server.close()

    asyncio.run(scenario())


def test_generated_protocol_code_is_current(tmp_path: Path) -> None:
    written = generate.generate(tmp_path)
    assert len(written) >= 2
    for path in written:
        assert path.read_bytes() == (generate.FOLDER / path.name).read_bytes(), path.name
