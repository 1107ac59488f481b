"""The edge plane with a real Venn: devices train, uploads resume, strangers are turned away."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_parts import CLIENTS, RECIPE, device_config, identities, venn_config

from actors.edge.agent import DeviceAgent
from actors.edge.client import DownloadBrokenError, EdgeClient
from actors.edge.config import SamplesConfig
from actors.edge.job import EdgeJob, EdgeJobConfig
from actors.edge.registry import Registry
from actors.edge.server import EdgeServer, EdgeServerConfig
from actors.edge.service import EdgeService
from actors.edge.simulated import SimulateConfig, SimulatedFleet
from actors.edge.state import Work
from actors.venn.security import SecurityConfig
from raysys.errors import ConfigError, DataError, RemoteError
from raysys.federated.core.partition import PartitionConfig
from raysys.federated.core.recipe import (
    load_data,
    make_job,
    make_line,
    make_population,
)
from raysys.federated.core.runner import run_rounds
from raysys.federated.core.tickets import LeaseClaim, LeaseSeal
from raysys.federated.swan.plans import FACTS, PlanLimits, pack_update
from raysys.federated.swan.rounds import EdgeRound


def test_devices_learn_what_the_simulation_learns(tmp_path: Path) -> None:
    data = load_data(RECIPE.data, RECIPE.seed, None)
    spec = RECIPE.model.spec(data)
    simulated = make_job(RECIPE, spec, make_population(RECIPE, data))
    run_rounds(simulated, data.samples(), 2)
    service_side, device_side = identities(tmp_path)

    async def scenario() -> np.ndarray[Any, Any]:
        server = EdgeServerConfig(code="c", security=service_side, folder=str(tmp_path / "edge"))
        service = EdgeService(venn_config(tmp_path), server, CLIENTS, time.time())
        address = await service.start("127.0.0.1:0")
        line = make_line(RECIPE, spec)
        config = EdgeJobConfig(job_id="j", clients_per_round=CLIENTS, deadline_s=120)
        job = service.add(config, line, RECIPE.seed, "127.0.0.1")
        agents = [
            DeviceAgent(device_config(tmp_path, n, address, security=device_side))
            for n in range(CLIENTS)
        ]
        runs = [asyncio.create_task(agent.run()) for agent in agents]
        await job.run(2)
        for agent in agents:
            agent.stop()
        updates = await asyncio.gather(*runs)
        await service.close()
        assert sum(updates) == 2 * CLIENTS
        assert service.server is not None
        assert service.server.refused_leases == 0, "the gateway signed what was used"
        assert all(agent.device.state.token for agent in agents)
        assert all(agent.device.state.sample_ms > 0 for agent in agents)
        return line.weights(0)

    real = asyncio.run(scenario())
    assert np.allclose(real, simulated.strategy.weights(0), atol=2e-5)


def test_fleet_of_modelled_devices_in_one_process(tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        RECIPE, clients_per_round=8, partition=PartitionConfig(clients=20, scheme="iid")
    )
    data = load_data(recipe.data, recipe.seed, None)

    async def scenario() -> None:
        config = EdgeServerConfig(code="c")
        service = EdgeService(venn_config(tmp_path), config, 20, time.time())
        address = await service.start("127.0.0.1:0")
        line = make_line(recipe, recipe.model.spec(data))
        settings = EdgeJobConfig(job_id="j", clients_per_round=8, deadline_s=120)
        job = service.add(settings, line, recipe.seed, "127.0.0.1")
        samples = SamplesConfig(split=recipe.partition)
        fleet = SimulatedFleet(
            SimulateConfig(
                server=address, code="c", count=20, updates=8, duration_s=120, samples=samples
            )
        )
        report, _ = await asyncio.gather(fleet.run(), job.run(1))
        await service.close()
        assert report.enrolled == 20
        assert report.accepted >= 8
        assert report.modelled_s > 0
        assert job.reports[0].counts["ok"] == 8

    asyncio.run(scenario())


def test_uploads_resume_and_strangers_are_turned_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = EdgeServer(EdgeServerConfig(code="c"), clients=2)
        end = f"127.0.0.1:{await server.start()}"
        work = Work(end, "g", 1, 5, "nobody", 0, end, end, time.time() + 60, nonce="00")
        async with EdgeClient(end, b"d" * 16) as client:
            with pytest.raises(RemoteError, match="has not enrolled"):
                await client.upload(work, b"x")
            with pytest.raises(RemoteError, match="enrolment code"):
                await client.enrol("wrong", "{}")
            await client.enrol("c", '{"client": 1, "sample_ms": 2.0}')
            with pytest.raises(RemoteError, match="it is not here"):
                await client.upload(work, b"x")
            profile = {"schema": 1, "device": "x", "choices": [{"counts": [1], "seconds": 1.0}]}
            assert await client.share_profile("x|k", json.dumps(profile)) == ""
            broken = {**profile, "choices": [{"counts": [1], "seconds": -1.0}]}
            with pytest.raises(RemoteError, match="a positive time"):
                await client.share_profile("x|k", json.dumps(broken))
            for name in (b"e", b"f"):
                async with EdgeClient(end, name * 16) as other:
                    if name == b"e":
                        await other.enrol("c", "{}")
                    else:
                        with pytest.raises(RemoteError, match="places are taken"):
                            await other.enrol("c", "{}")
        assert server.registry.mean_sample_ms == 2.0
        held = server._resume(("g", 1, 5), 100)
        held += b"part"
        assert server._resume(("g", 1, 5), 100) == b"part"
        with pytest.raises(ConfigError, match="total_bytes"):
            server._resume(("g", 1, 5), 2**50)
        await server.close()

    asyncio.run(scenario())


def test_registry_keeps_its_devices(tmp_path: Path) -> None:
    first = Registry("c", 2, folder=str(tmp_path))
    first.enrol(b"a" * 16, "c", '{"client": 1}', 0.0)
    again = Registry("c", 2, folder=str(tmp_path))
    assert again.client_of(b"a" * 16) == 1
    again.enrol(b"a" * 16, "c", "{}", 0.0)
    assert again.client_of(b"a" * 16) == 1, "enrolling again keeps the number"
    for device, code, text in (
        (b"short", "c", "{}"),
        (b"b" * 16, "x", "{}"),
        (b"b" * 16, "c", "["),
        (b"b" * 16, "c", "x" * 5000),
    ):
        with pytest.raises(ConfigError):
            again.enrol(device, code, text, 0.0)
    kept = tmp_path / "devices.jsonl"
    kept.write_text(kept.read_text() + '{"id": "torn')
    mended = Registry("c", 2, folder=str(tmp_path))
    assert mended.client_of(b"a" * 16) == 1
    mended.enrol(b"e" * 16, "c", '{"client": "x", "sample_ms": "y"}', 0.0)
    assert Registry("c", 2, folder=str(tmp_path)).client_of(b"e" * 16) == 0
    kept.write_text('{"id": "torn\n' + kept.read_text())
    with pytest.raises(DataError, match="line 1"):
        Registry("c", 2, folder=str(tmp_path))


def test_leases_without_a_living_ticket_of_a_gateway_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s" * 40)
    security = SecurityConfig(token_secret=str(tmp_path / "secret"))
    seal = LeaseSeal(b"s" * 40)
    data = load_data(RECIPE.data, RECIPE.seed, None)
    line = make_line(RECIPE, RECIPE.model.spec(data))

    async def scenario() -> None:
        server = EdgeServer(EdgeServerConfig(code="c", security=security), clients=CLIENTS)
        end = f"127.0.0.1:{await server.start()}"
        job = EdgeJob(EdgeJobConfig(job_id="j"), line, CLIENTS, 0, None)  # type: ignore[arg-type]
        server.add(job)
        job.model, job.model_sha256 = b"m", hashlib.sha256(b"m").digest()
        job.opened = EdgeRound(line, 0, 1, seed=0, secret=b"r" * 32)
        tokens = {}
        for device in (b"d", b"e"):
            async with EdgeClient(end, device * 16) as client:
                tokens[device] = (await client.enrol("c", "{}")).token

        def work(counter: int, ticket: bytes) -> Work:
            return Work(
                end, "g", 1, counter, "j", 0, end, end, time.time() + 60, ticket=ticket.hex(),
                nonce="00", model_sha256=job.model_sha256.hex(), model_bytes=1,
            )  # fmt: skip

        def ticket(counter: int, device: bytes = b"d", life_s: float = 60.0) -> bytes:
            claim = LeaseClaim((device * 16).hex(), "g", 1, counter, "j", 0)
            return seal.issue(claim, time.time() + life_s)

        bad = {
            "came with the lease": work(1, b""),
            "signed for this device": work(1, b"forged"),
            "has expired": work(1, ticket(1, life_s=-60.0)),
            "this device, lease and round": work(2, ticket(1)),
            "for this device, lease": work(1, ticket(1, b"e")),
        }
        identity = dataclasses.replace(security, token=tokens[b"d"])
        async with EdgeClient(end, b"d" * 16, identity) as client:
            for reason, refused in bad.items():
                for ask in (
                    client.plan(refused, PlanLimits()),
                    client.download(refused, b""),
                    client.upload(refused, b"x"),
                ):
                    with pytest.raises((RemoteError, DownloadBrokenError), match=reason):
                        await ask
            assert server.refused_leases == 3 * len(bad)
            good = work(1, ticket(1))
            good.nonce = (await client.plan(good, PlanLimits())).nonce.hex()
            update = pack_update(np.zeros_like(line.weights(0)), dict.fromkeys(FACTS, 1.0))
            assert (await client.upload(good, update)).accepted
            # The same lease again, with its genuine ticket: nothing counts twice ...
            assert (await client.upload(good, update)).accepted
            assert job.opened is not None
            assert (job.opened.answers, job.opened.duplicates) == (1, 1)
            # ... and in the next round it is worth nothing.
            job.opened = EdgeRound(line, 1, 1, seed=0, secret=b"r" * 32)
            with pytest.raises(RemoteError, match=r"FAILED_PRECONDITION.*not of this round"):
                await client.upload(good, update)
        await server.close()

    asyncio.run(scenario())
