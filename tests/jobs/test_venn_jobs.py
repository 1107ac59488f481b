"""Venn's programs: processes under SIGKILL, load, live view, tour stage, on Ray, from the shell."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.federated.driver import FederatedRun
from actors.session import Session
from actors.venn.chaos import Chaos, ChaosConfig
from actors.venn.client import DeviceClient, JobClient
from actors.venn.cluster import ClusterConfig, VennCluster
from actors.venn.cohorts import VennConfig, finish_job, with_venn
from actors.venn.load import ATOM_SHARES, ATOM_VALUES
from actors.venn.log import Replica
from actors.venn.processes import ProcessDeployment, deployment
from actors.venn.twin import Twin
from jobs import launcher
from jobs.bench import venn as bench
from jobs.tour.stage import StageContext
from jobs.tour.stages.venn import STAGE
from jobs.venn.__main__ import command_line as venn
from raysys.bench import Profile
from raysys.federated.core.datasets import load_digits_data
from raysys.federated.core.partition import PartitionConfig
from raysys.federated.core.recipe import FederatedConfig, make_job, make_population
from raysys.federated.core.runner import run_rounds
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.scheduler import SchedulerCore
from raysys.federated.venn.simulator import SimConfig, SimJob, simulate
from raysys.federated.venn.simulator.loaders import generated_trace
from raysys.runs import RunDirectory


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessDeployment]:
    with deployment(tmp_path_factory.mktemp("venn"), gateways=2) as running:
        yield running


def test_kills_under_load_never_over_assign_and_the_log_replays(
    service: ProcessDeployment,
) -> None:
    config = ChaosConfig(kills=3, jobs=40, open_rounds=10, demand=40, lease_s=1.0, seed=3)
    report = asyncio.run(Chaos(service, config).run())
    assert report.kills.total() == 3
    assert report.over_assigned == 0
    assert 0 < report.most_live <= config.demand
    assert report.assigned > config.demand
    assert report.least_refilled > 0.8  # no lease is lost for good
    assert report.jobs_after == config.jobs
    folder = Path(service.schedulers[0].config["folder"])
    first, second = Replica(folder, SchedulerCore()), Replica(folder, SchedulerCore())
    while first.catch_up():
        pass
    while second.applied < first.applied:
        assert second.catch_up() > 0
    assert first.core.state.epoch > 1
    if first.applied == second.applied:
        assert first.core.dump() == second.core.dump()


def test_load_and_top_from_the_command_line(
    service: ProcessDeployment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "scheduler": service.scheduler_address,
        "gateways": ",".join(service.gateway_addresses),
        "load.duration_s": 2,
        "load.processes": 2,
        "load.batch": 200,
        "load.rate_per_s": 10_000,
        "load.jobs": 4,
        "load.demand": 50,
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    assert venn(["load", *words, "--run-dir", str(tmp_path / "load")]) == 0
    result = json.loads((tmp_path / "load" / "load.json").read_text(encoding="utf-8"))
    assert result["over_assigned"] == result["ineligible"] == result["duplicates"] == 0
    assert result["rounds"] > 0
    watch = ["--set", f"scheduler={service.scheduler_address}", "--set", "updates=2"]
    pace = ["--set", "interval_s=0.05", "--run-dir", str(tmp_path / "top")]
    assert venn(["top", *watch, *pace]) == 0
    assert "waiting for devices" in capsys.readouterr().out


def test_live_rounds_take_no_less_than_simulated(service: ProcessDeployment) -> None:
    trace = generated_trace(60_000, seed=2)
    jobs = [SimJob(group=i % 4, participants=4, rounds=3, arrival_s=60.0 * i) for i in range(4)]
    config = SimConfig(repeats=2)
    policy = IRS(IRSConfig(demand_scope="total", yield_factor=2.0))
    expected = simulate(trace, jobs, policy, config).mean_jct_s()
    gateway = service.gateway_addresses[0]
    twin = Twin(trace, jobs, config, service.scheduler_address, gateway, speed=60.0)
    live = asyncio.run(twin.run(limit_s=200))
    assert np.isfinite(live).all()
    assert twin.over_assigned == 0
    assert twin.assigned >= sum(job.participants * job.rounds for job in jobs)
    # Only a lower bound: a busy machine stretches compressed time, and never shortens it.
    assert np.mean(live) > 0.5 * expected


def federated_job(name: str, requirement: dict[str, float], service: ProcessDeployment) -> Any:
    data = load_digits_data(0)
    recipe = FederatedConfig(clients_per_round=6, partition=PartitionConfig(clients=120))
    spec = recipe.model.spec(data)
    venn = VennConfig(
        scheduler=service.scheduler_address,
        gateways=",".join(service.gateway_addresses),
        job_id=name,
        requirement=requirement,
        deadline_s=60,
        rounds=2,
        batch=40,
    )
    make = functools.partial(make_job, recipe, spec)
    return with_venn(make, venn, make_population(recipe, data)), data.samples()


def test_federated_jobs_share_devices_through_the_job_plane(service: ProcessDeployment) -> None:
    jobs = {
        "any-phone": federated_job("any-phone", {}, service),
        "fast-phone": federated_job("fast-phone", {"cpu": 7.0}, service),
    }
    digest = hashlib.blake2b(b"clients", digest_size=8).digest()
    kinds = np.random.default_rng(int.from_bytes(digest, "big")).choice(
        len(ATOM_VALUES), 120, p=ATOM_SHARES
    )
    with ThreadPoolExecutor(2) as pool:
        runs = {
            name: pool.submit(run_rounds, job, samples, 2) for name, (job, samples) in jobs.items()
        }
        reports = {name: future.result(120) for name, future in runs.items()}
    for rounds in reports.values():
        assert [report.counts["ok"] for report in rounds] == [6, 6]
    for report in reports["fast-phone"]:
        assert all(ATOM_VALUES[kinds[client]][0] >= 7 for client in report.table.clients)
    known = asyncio.run(overview(service.scheduler_address))
    done = {item["job"]: item["rounds_done"] for item in known["jobs"]}
    assert done["any-phone"] == done["fast-phone"] == 2
    for job, _ in jobs.values():
        job.strategy.leave()
        job.strategy.leave()
    left = {item["job"] for item in asyncio.run(overview(service.scheduler_address))["jobs"]}
    assert left.isdisjoint(jobs)


def test_a_federated_run_on_ray_takes_its_devices_from_venn(
    service: ProcessDeployment, ray_session: Session
) -> None:
    data = load_digits_data(0)
    recipe = FederatedConfig(clients_per_round=5, partition=PartitionConfig(clients=60))
    spec = recipe.model.spec(data)
    venn = VennConfig(
        scheduler=service.scheduler_address,
        gateways=",".join(service.gateway_addresses),
        job_id="on-ray",
        requirement={"mem": 1000.0},
        deadline_s=60,
        rounds=2,
    )
    make = functools.partial(with_venn, functools.partial(make_job, recipe, spec), venn)
    population = make_population(recipe, data)
    federated = FederatedRun(recipe, data, population, spec, workers=1, worker_cpus=0, make=make)
    try:
        summaries = list(federated.rounds(2))
    finally:
        federated.close()
    assert [summary.counts["ok"] for summary in summaries] == [5, 5]
    assert finish_job(venn) == {"rounds": 2, "assigned": 10, "failed": 0}


async def overview(address: str) -> Any:
    async with JobClient(address, "test") as client:
        return await client.overview()


def test_wrong_words_and_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert venn([]) == 2
    assert venn(["fly"]) == 2
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 32)
    words = ["--set", f"secret={secret}", "--run-dir", str(tmp_path / "run")]
    assert venn(["token", *words, "--set", "role=job"]) == 0
    assert "revocation" in capsys.readouterr().out
    assert venn(["token", *words[:2], "--set", "role=king"]) == 2


def test_service_on_ray(ray_session: Session, tmp_path: Path) -> None:
    cluster = VennCluster.start(ray_session, tmp_path, ClusterConfig(gateways=1))
    try:

        async def use() -> int:
            async with JobClient(cluster.scheduler_address, "job") as job:
                await job.register({"cpu": 7})
                await job.open_round(3, deadline_s=60)
                async with DeviceClient(cluster.gateway_addresses[0]) as device:
                    given = 0
                    for number in range(200):
                        identities = b"".join(
                            (10 * number + i).to_bytes(16, "big") for i in range(10)
                        )
                        columns = [np.full(10, 9.0, dtype=np.float32)] * 3
                        answer = await device.check_in(identities, columns)
                        given += int((answer.slots >= 0).sum())
                        if given >= 3:
                            break
                        await asyncio.sleep(0.02)
                return given

        assert asyncio.run(use()) == 3
        health = cluster.health()
        assert health["scheduler-a"]["leading"]
        assert not health["scheduler-b"]["leading"]
    finally:
        cluster.close()
        cluster.close()


def test_serve_prints_addresses_and_stops(
    ray_session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launcher.JobContext, "ray", lambda self, **changes: ray_session)
    settings = {
        "folder": tmp_path / "state",
        "duration_s": 1,
        "watch_interval_s": 0.5,
        "cluster.gateways": 1,
        "cluster.standby": "false",
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    assert venn(["serve", *words, "--run-dir", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("scheduler 127.0.0.1:")
    assert lines[1].startswith("gateways 127.0.0.1:")
    assert "looked at 2 times" in lines[2]
    assert list((tmp_path / "state").glob("log-*.jsonl"))


def test_simulate_writes_a_report_and_a_row_per_job(tmp_path: Path) -> None:
    settings = {
        "workloads": '["low", "general"]',
        "policies": '["random", "irs-yield"]',
        "jobs": 4,
        "scale_devices": 100,
        "scale_rounds": 400,
        "devices": 1100,
        "tiers": 2,
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    assert venn(["simulate", *words, "--run-dir", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert set(result) == {"low", "general"}
    assert set(result["low"]) == {"random", "irs-yield"}
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 6
    assert RunDirectory.open(str(tmp_path / "run")).read_table("jobs").num_rows == 16
    assert venn(["simulate", "--set", 'policies=["magic"]']) == 2


def test_tour_stage_at_its_smallest(ray_session: Session, tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path / "run"), job="tour", config={}, seeds=[], now="now")
    seen: list[float] = []
    context = StageContext(
        profile="smoke",
        seed=1,
        session=ray_session,
        run=run,
        progress=lambda done, total, text: seen.append(done / total),
    )
    result = STAGE.run(context)
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert result.rows[-1].ours == 0
    assert len(result.plots) == 3


def test_plan_claim_is_measured() -> None:
    claim = bench.CLAIMS["plan_ms"](Profile(name="quick"))
    assert claim.baseline is not None
    assert 0 < claim.value < 1000
