"""Federated jobs at Venn: the door of a job, what it refuses, and what happens without devices."""

from __future__ import annotations

import asyncio
import functools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from actors.venn.client import JobClient
from actors.venn.cohorts import VennConfig, finish_job, with_venn
from actors.venn.enrolment import Enrolment, Fleet, client_of, device_id
from actors.venn.gateway import GatewayServer
from actors.venn.scheduler import SchedulerServer
from raysys.errors import ConfigError, InfeasibleError, RemoteError
from raysys.federated.core.fedbuff import AsyncConfig
from raysys.federated.core.population import population_from_lists
from raysys.federated.core.privacy import PrivacyConfig
from raysys.federated.core.recipe import FederatedConfig, load_data, make_job, make_population

POPULATION = population_from_lists([np.arange(3)] * 50)


def make(**changes: object) -> object:
    recipe = FederatedConfig(clients_per_round=4, **changes)  # type: ignore[arg-type]
    data = load_data(recipe.data, 0, None)
    population = make_population(recipe, data)
    return functools.partial(make_job, recipe, recipe.model.spec(data)), population


def test_device_ids_are_stable_and_carry_the_client() -> None:
    assert device_id("phones", 7) == device_id("phones", 7)
    assert device_id("phones", 7) != device_id("tablets", 7)
    assert len(device_id("phones", 7)) == 16
    assert client_of("phones", device_id("phones", 12345).hex()) == 12345
    assert client_of("tablets", device_id("phones", 12345).hex()) == -1


def test_the_door_takes_devices_with_the_secret_only() -> None:
    good = Enrolment(device_id("p", 3).hex(), "127.0.0.1:1", 5, 2**40)

    async def visit(endpoint: str, secret: str, *lines: bytes) -> None:
        host, _, port = endpoint.partition("/")[0].rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(secret.encode() + b"\n" + b"".join(line + b"\n" for line in lines))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def scenario() -> None:
        fleet = Fleet(["127.0.0.1:1"], "p", POPULATION)
        endpoint = await fleet.start("127.0.0.1")
        secret = endpoint.partition("/")[2]
        line = json.dumps(asdict(good)).encode()
        await visit(endpoint, "guess", line)
        for bad in (b"\xff\x00", b"[]", b"{}", b'{"device": 3}', b"x" * 10_000):
            await visit(endpoint, secret, bad)
        await visit(endpoint, secret, line, b"nonsense", line)
        async with asyncio.timeout(5):
            found: list[Enrolment] = []
            while not found:
                await asyncio.sleep(0.01)
                found = fleet.arrived()
        assert found == [good]  # what follows the nonsense is not read
        await fleet.close()
        await fleet.close()

    asyncio.run(scenario())


def test_strategies_that_choose_their_devices_and_central_privacy_are_refused() -> None:
    cases = (
        {"asynchronous": AsyncConfig(concurrency=8)},
        {"privacy": PrivacyConfig(noise_multiplier=1.0)},
    )
    for changes in cases:
        build, population = make(**changes)  # type: ignore[misc]
        with pytest.raises(ConfigError, match="venn"):
            with_venn(build, VennConfig(), population)


@pytest.mark.parametrize("field", ["scheduler", "gateways", "job_id"])
def test_settings_are_checked(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        VennConfig(**{field: ""})


def test_too_few_devices_and_a_round_left_open_by_an_earlier_life(tmp_path: Path) -> None:
    async def serve() -> tuple[SchedulerServer, GatewayServer, VennConfig]:
        scheduler = SchedulerServer(str(tmp_path), "127.0.0.1:0")
        address = f"127.0.0.1:{await scheduler.start()}"
        gateway = GatewayServer("g", address)
        port = await gateway.start()
        async with JobClient(address, "rare") as job:  # an earlier life
            await job.register({"cpu": 1000.0}, rounds=0)
            await job.open_round(3, 3600)
        config = VennConfig(
            scheduler=address,
            gateways=f"127.0.0.1:{port}",
            job_id="rare",
            requirement={"cpu": 1000.0},
            deadline_s=0.5,
        )
        return scheduler, gateway, config

    async def scenario() -> None:
        scheduler, gateway, config = await serve()
        build, population = make()  # type: ignore[misc]
        job = with_venn(build, config, population)
        with pytest.raises(InfeasibleError, match="4 devices for rare"):
            await asyncio.to_thread(job.open_round)
        known = scheduler.core.state.jobs["rare"]
        assert known.open is None
        assert known.rounds_aborted == 2
        report = await asyncio.to_thread(finish_job, config)
        assert report == {"rounds": 0, "assigned": 0, "failed": 0}
        with pytest.raises(RemoteError, match="not registered"):
            await asyncio.to_thread(finish_job, config)
        with pytest.raises(RemoteError, match="not registered"):
            await asyncio.to_thread(job.strategy.leave)  # type: ignore[attr-defined]
        await gateway.close()
        await scheduler.close()

    asyncio.run(scenario())
