"""The service over real gRPC, in one process: accounting, plans, errors, recovery."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

from actors.proto.messages import pb, rpc
from actors.venn.client import Assignments, DeviceClient, JobClient
from actors.venn.gateway import GatewayServer
from actors.venn.scheduler import SchedulerServer
from raysys.errors import RemoteError
from raysys.federated.venn.gateway_plan import GatewayConfig
from raysys.federated.venn.scheduler_state import ServiceConfig

WAIT_S = 20.0


@dataclass
class Deployment:
    scheduler: SchedulerServer
    gateways: list[GatewayServer]
    devices: list[DeviceClient]

    def job(self, job_id: str) -> JobClient:
        return JobClient(f"127.0.0.1:{self.scheduler.port}", job_id)


@asynccontextmanager
async def deployed(
    folder: Path,
    gateways: int = 1,
    config: ServiceConfig | None = None,
    device_config: GatewayConfig | None = None,
) -> AsyncIterator[Deployment]:
    scheduler = SchedulerServer(str(folder), "127.0.0.1:0", config)
    port = await scheduler.start()
    servers = [GatewayServer(f"g{i}", f"127.0.0.1:{port}", device_config) for i in range(gateways)]
    ports = [await server.start() for server in servers]
    clients = [DeviceClient(f"127.0.0.1:{port}") for port in ports]
    try:
        yield Deployment(scheduler, servers, clients)
    finally:
        for closing in (*clients, *servers, scheduler):
            await closing.close()


def ids(start: int, count: int) -> bytes:
    return b"".join(number.to_bytes(16, "big") for number in range(start, start + count))


def columns(count: int, cpu: float = 10.0) -> list[np.ndarray]:  # type: ignore[type-arg]
    return [np.full(count, value, dtype=np.float32) for value in (cpu, 2000.0, 12.0)]


async def until(condition: object) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


async def drain(
    client: DeviceClient, start: int, wanted: int, batch: int = 50
) -> list[Assignments]:
    """Check fresh devices in until ``wanted`` of them got a task."""
    answers: list[Assignments] = []
    async with asyncio.timeout(WAIT_S):
        while sum(int((answer.slots >= 0).sum()) for answer in answers) < wanted:
            answers.append(await client.check_in(ids(start, batch), columns(batch)))
            start += batch
            await asyncio.sleep(0.005)
    return answers


def test_a_round_from_registration_to_report(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as service, service.job("keyboard") as job:
            await job.register({"cpu": 7.0}, rounds=1, plan_uri="https://plans/1")
            ticket = await job.open_round(30, deadline_s=100)
            events = job.events()
            answers = await drain(service.devices[0], 0, 30)
            leases = [int(x) for a in answers for x in a.leases[a.slots >= 0]]
            assert len(leases) == len(set(leases)) == 30
            task = next(iter(answers[-1].tasks.values()))
            assert (task.job_id, task.plan_uri) == ("keyboard", "https://plans/1")
            async with asyncio.timeout(WAIT_S):
                async for event in events:
                    if event.kind == pb.JobEvent.FILLED:
                        assert event.assigned == 30
                        break
            accepted = await service.devices[0].release(answers[0].epoch, leases, [0] * 30)
            assert accepted == bytes([1] * 30)
            assert await service.devices[0].release(answers[0].epoch, leases[:1], [0]) == b"\0"
            await job.close_round(ticket.round_id, success=True, answers=30, response_s=12.0)
            report = await job.finish()
            assert (report.rounds_done, report.devices_assigned) == (1, 30)

    asyncio.run(scenario())


def test_no_over_assignment_over_two_gateways_with_skewed_arrivals(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path, gateways=2) as service, service.job("job") as job:
            await job.register({})
            await job.open_round(101, deadline_s=100)
            # All devices come to the second gateway: the first one's credits must move there.
            answers = await drain(service.devices[1], 0, 101)
            more = await service.devices[0].check_in(ids(10**6, 500), columns(500))
            given = [int((answer.slots >= 0).sum()) for answer in (*answers, more)]
            assert sum(given) == 101

    asyncio.run(scenario())


def test_credits_leave_a_gateway_that_was_busy_and_falls_idle(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path, gateways=2) as service, service.job("job") as job:
            await job.register({})
            now_s = time.monotonic()
            await service.devices[0].check_in(ids(0, 2000), columns(2000))
            await until(lambda: service.scheduler.core.state.supply.seen == 2000)
            ticket = await job.open_round(4, deadline_s=100)
            answers = await drain(service.devices[1], 10_000, 4, batch=1)
            assert sum(int((answer.slots >= 0).sum()) for answer in answers) == 4
            assert ticket.remaining == 4
            assert time.monotonic() - now_s < WAIT_S

    asyncio.run(scenario())


def test_only_eligible_devices_and_retry_hints(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as service, service.job("job") as job:
            await job.register({"cpu": 7.0})
            await job.open_round(10, deadline_s=100)
            await until(lambda: service.gateways[0].core.rounds)
            weak = await service.devices[0].check_in(ids(0, 100), columns(100, cpu=6.9))
            assert (weak.slots == -1).all()
            assert ((weak.retry_after_s >= 60 * 0.8) & (weak.retry_after_s <= 900 * 1.2)).all()
            both = [np.r_[columns(10)[i], columns(10, cpu=1.0)[i]] for i in range(3)]
            await until(
                lambda: sum(r.limit for r in service.gateways[0].core.rounds.values()) == 10
            )
            mixed = await service.devices[0].check_in(ids(200, 20), both)
            assert (mixed.slots[:10] >= 0).all()
            assert (mixed.slots[10:] == -1).all()

    asyncio.run(scenario())


def test_same_device_same_lease_and_failures_are_replaced(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as service, service.job("job") as job:
            await job.register({})
            await job.open_round(5, deadline_s=100)
            device = service.devices[0]
            answers = await drain(device, 0, 5, batch=5)
            got = next(a for a in answers if (a.slots >= 0).any())
            place = int(np.flatnonzero(got.slots >= 0)[0])
            base = 5 * answers.index(got) + place
            again = await device.check_in(ids(base, 1), columns(1))
            assert again.leases[0] == got.leases[place]
            assert await device.release(got.epoch, [int(got.leases[place])], [2]) == b"\1"
            replaced = await drain(device, 10_000, 1, batch=5)
            assert sum(int((a.slots >= 0).sum()) for a in replaced) == 1

    asyncio.run(scenario())


BAD_ROUNDS = [
    ({"demand": 0, "deadline_s": 10}, "demand"),
    ({"demand": -5, "deadline_s": 10}, "demand"),
    ({"demand": 5, "deadline_s": 0}, "deadline_s"),
    ({"demand": 5, "deadline_s": float("nan")}, "deadline_s"),
    ({"demand": 5, "deadline_s": 10, "overcommit": 0.5}, "overcommit"),
    ({"demand": 5, "deadline_s": 10, "overcommit": 11}, "overcommit"),
    ({"demand": 5, "deadline_s": 10, "fraction": 1.5}, "fraction"),
    ({"demand": 5, "deadline_s": 10, "lease_s": float("inf")}, "lease_s"),
]


def test_bad_input_gets_typed_errors_and_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as service, service.job("job") as job:
            with pytest.raises(RemoteError, match=r"FAILED_PRECONDITION.*not registered"):
                await job.open_round(5, deadline_s=10)
            with pytest.raises(RemoteError, match=r"INVALID_ARGUMENT.*requirement\.gpu"):
                await job.register({"gpu": 1.0})
            with pytest.raises(RemoteError, match="finite"):
                await job.register({"cpu": float("nan")})
            with pytest.raises(RemoteError, match="schema_version"):
                await job.register({}, schema_version=9)
            await job.register({"cpu": 1.0})
            await until(lambda: not service.scheduler.core.state.dirty)
            before = service.scheduler.core.dump()
            for arguments, field in BAD_ROUNDS:
                with pytest.raises(RemoteError, match=f"INVALID_ARGUMENT.*{field}"):
                    await job.open_round(**arguments)  # type: ignore[arg-type]
            assert service.scheduler.core.dump() == before
            ticket = await job.open_round(5, deadline_s=100)
            with pytest.raises(RemoteError, match="no open round"):
                await job.open_round(5, deadline_s=100)
            with pytest.raises(RemoteError, match="answers"):
                await job.close_round(ticket.round_id, True, answers=6)
            await job.close_round(ticket.round_id, False)
            with pytest.raises(RemoteError, match="FAILED_PRECONDITION"):
                await job.close_round(ticket.round_id, False)

    asyncio.run(scenario())


def test_bad_batches_get_typed_errors(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as service:
            device = service.devices[0]
            good = columns(2)
            for bad, field in [
                ((b"short", good), "device_ids"),
                ((b"", columns(0)), "device_ids"),
                ((ids(0, 2), good[:2]), "columns"),
                ((ids(0, 3), good), "columns"),
                ((ids(0, 2), [*good[:2], np.array([1, np.nan], dtype=np.float32)]), "os"),
                ((ids(0, 100_001), columns(100_001)), "device_ids"),
            ]:
                with pytest.raises(RemoteError, match=f"INVALID_ARGUMENT.*{field}"):
                    await device.check_in(*bad)
            other = DeviceClient(device.address, schema_version=2)
            with pytest.raises(RemoteError, match=r"FAILED_PRECONDITION.*cpu, mem, os"):
                await other.check_in(ids(0, 2), good)
            await other.close()
            with pytest.raises(RemoteError, match="earlier incarnation"):
                await device.release(1, [1], [0])
            epoch = service.gateways[0].core.incarnation
            with pytest.raises(RemoteError, match="outcomes"):
                await device.release(epoch, [1, 2], [0])
            assert await device.release(epoch, [77], [0]) == b"\0"
            assert (await device.renew(epoch, [77]))[0] == 0

    asyncio.run(scenario())


def test_streamed_check_ins_and_a_stream_cancelled_half_way(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as service, service.job("job") as job:
            await job.register({})
            await job.open_round(40, deadline_s=100)
            await until(lambda: any(r.limit for r in service.gateways[0].core.rounds.values()))
            channel = grpc.aio.insecure_channel(service.devices[0].address)
            call = rpc.DeviceGatewayStub(channel).CheckInStream()
            for number in range(2):
                batch = pb.CheckInBatch(
                    schema_version=1,
                    device_ids=ids(100 * number, 10),
                    columns=[column.tobytes() for column in columns(10)],
                    sequence=number,
                )
                await call.write(batch)
                answer = await call.read()
                assert answer.sequence == number
                assert len(answer.tasks) == 1
            call.cancel()
            await channel.close()
            assert len(service.gateways[0].core.leases) == 20

    asyncio.run(scenario())


def test_rate_limit_and_sharding(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = GatewayConfig(shards=2, shard=0, min_interval_s=1000.0)
        async with deployed(tmp_path, device_config=config) as service:
            first = await service.devices[0].check_in(ids(0, 20), columns(20))
            wrong = first.slots == -3
            assert 0 < wrong.sum() < 20 or wrong.sum() in {0, 20}
            again = await service.devices[0].check_in(ids(0, 20), columns(20))
            assert (again.slots[~wrong] == -2).all()
            assert (again.slots[wrong] == -3).all()

    asyncio.run(scenario())


def test_restart_keeps_state_and_a_torn_tail_is_ignored(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as service, service.job("job") as job:
            await job.register({"mem": 10.0}, rounds=3)
            await job.open_round(50, deadline_s=1000)
            await drain(service.devices[0], 0, 20, batch=10)
            await until(lambda: service.scheduler.core.state.jobs["job"].open.spent >= 20)  # type: ignore[union-attr]
            await service.gateways[0].close()
            state = service.scheduler.core.dump()
        newest = max(tmp_path.glob("log-*.jsonl"), key=lambda path: path.stat().st_mtime)
        with newest.open("ab") as stream:
            stream.write(b'00000000 [999,{"op":"finish","job_id":"j')
        again = SchedulerServer(str(tmp_path), "127.0.0.1:0")
        await again.start()
        old = SchedulerServer(str(tmp_path / "other"), "127.0.0.1:0").core
        old.load(state)
        assert (
            again.core.state.jobs == old.state.jobs or again.core.state.jobs["job"].open is not None
        )
        assert again.core.state.epoch == old.state.epoch + 1
        await again.close()

    asyncio.run(scenario())


def test_standby_takes_over_at_the_same_address(tmp_path: Path) -> None:
    async def scenario() -> None:
        leader = SchedulerServer(str(tmp_path), "127.0.0.1:0")
        port = await leader.start()
        standby = SchedulerServer(str(tmp_path), f"127.0.0.1:{port}")
        following = asyncio.create_task(standby.run())
        gateway = GatewayServer("g", f"127.0.0.1:{port}")
        device = DeviceClient(f"127.0.0.1:{await gateway.start()}")
        async with JobClient(f"127.0.0.1:{port}", "job") as job:
            await job.register({})
            ticket = await job.open_round(60, deadline_s=1000)
            filled = asyncio.create_task(until_filled(job, ticket.round_id))
            first = await drain(device, 0, 10, batch=10)
            await leader.close()
            await asyncio.wait_for(standby.leading.wait(), WAIT_S)
            rest = await drain(device, 10_000, 60 - sum(int((a.slots >= 0).sum()) for a in first))
            await until(lambda: standby.core.state.jobs["job"].open.spent == 60)  # type: ignore[union-attr]
            total = sum(int((answer.slots >= 0).sum()) for answer in (*first, *rest))
            assert total == 60
            assert await asyncio.wait_for(filled, WAIT_S) == 60
            again = asyncio.create_task(until_filled(job, ticket.round_id))
            assert await asyncio.wait_for(again, WAIT_S) == 60  # the state comes first
            with pytest.raises(RemoteError, match="no open round"):
                await job.open_round(1, deadline_s=10)
        assert standby.health()["epoch"] == 2
        following.cancel()
        for closing in (device, gateway, standby):
            await closing.close()

    asyncio.run(scenario())


async def until_filled(job: JobClient, round_id: int) -> int:
    """Devices of the round when it is filled, whoever leads by then."""
    async for event in job.follow():
        if event.kind == pb.JobEvent.FILLED and event.round_id == round_id:
            return int(event.assigned)
    return 0


def test_explain_and_overview(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as service, service.job("a") as job:
            await job.register({"cpu": 7.0})
            await service.devices[0].check_in(ids(0, 300), columns(300))
            await until(lambda: service.scheduler.core.state.supply.seen == 300)
            await job.open_round(10**4, deadline_s=100)
            why = await job.explain()
            assert (why["state"], why["position"], why["requirement"]) == ("waiting", 0, {"cpu": 7})
            assert why["expected_fill_s"] > 0
            overview = await job.overview()
            assert overview["checkins"] == 300
            assert overview["jobs"][0]["demand"] == 10**4

    asyncio.run(scenario())
