"""Ray Serve's hooks without Ray Serve: the router, the scaling policy, and an engine's reports."""

from __future__ import annotations

import asyncio
import json
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.andes.engine_reports import MAX_TENANTS, OTHERS, StepLog, TenantTotals
from actors.andes.engine_settings import AndesEngineConfig, for_replica
from actors.serving.autoscaling import QoEScalingPolicy, replica_readings
from actors.serving.engine_metrics import EngineMetrics
from raysys.serving.andes.models import StepTime
from raysys.serving.andes.routing import ReplicaLoad, load_to_dict

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve's own deprecations are not ours to mend
    from actors.serving.router import QoERequestRouter, request_targets

STEP = StepTime(base_s=0.05, per_sequence_s=0.0005, per_prefill_token_s=1 / 8000)


def replica(name: str, readers: int, age_s: float = 0.0) -> Any:
    """What Ray Serve hands to a router, as far as we look at it."""
    load = ReplicaLoad(
        time_s=time.time() - age_s, capacity_tokens=1000.0, max_batch=8, step_time=STEP,
        readers=readers, demand_tds=4.0 * readers, context_tokens=100.0 * readers,
    )  # fmt: skip
    return SimpleNamespace(replica_id=name, routing_stats={"load": load_to_dict(load)})


def request(**fields: Any) -> Any:
    body = SimpleNamespace(vllm_xargs=fields, messages=[{"role": "user", "content": "x" * 400}])
    return SimpleNamespace(args=(body, None))


@pytest.fixture
def router() -> QoERequestRouter:
    """The router without Ray Serve's machinery around it."""
    made = object.__new__(QoERequestRouter)
    made.initialize_state(routing={"horizon_s": 20.0}, switchable=True)
    return made


def choose(router: QoERequestRouter, replicas: list[Any], pending: Any) -> list[list[str]]:
    ranks = asyncio.run(router.choose_replicas(replicas, pending))
    return [[one.replica_id for one in rank] for rank in ranks]


def test_the_replica_whose_readers_lose_the_least_comes_first(router: QoERequestRouter) -> None:
    replicas = [replica("busy", 80), replica("free", 2), replica("used", 30)]
    assert choose(router, replicas, request(qoe_tds=5.0)) == [["free"], ["used"], ["busy"]]


def test_a_burst_does_not_pile_up_on_one_replica(router: QoERequestRouter) -> None:
    replicas = [replica("a", 4), replica("b", 5)]
    chosen = []
    for _ in range(10):
        pending = request()
        chosen.append(choose(router, replicas, pending)[0][0])
        router.on_request_routed(pending, chosen[-1], None)
    assert 4 <= chosen.count("a") <= 7


@pytest.mark.parametrize("state", ["old", "none", "forced"])
def test_without_statistics_two_queues_are_compared(router: QoERequestRouter, state: str) -> None:
    replicas = [replica("a", 1), replica("b", 1), replica("c", 1)]
    fields = {}
    if state == "old":
        replicas[1] = replica("b", 1, age_s=60.0)
    elif state == "none":
        replicas[2].routing_stats = {}
    else:
        fields["andes_router"] = "power_of_two"
    [rank] = choose(router, replicas, request(**fields))
    assert len(set(rank)) == 2


def test_targets_are_read_and_nonsense_is_not(router: QoERequestRouter) -> None:
    pending = request(qoe_tds=7.0)
    spec, tokens = request_targets(pending, pending.args[0].vllm_xargs)
    assert spec.tds == 7.0
    assert 90 < tokens < 130
    spec, _ = request_targets(pending, {"qoe_tds": -1})
    assert spec.tds == 4.8
    spec, tokens = request_targets(None, {})
    assert tokens == 1.0


def test_the_scaling_policy_reads_what_ray_serve_collected() -> None:
    policy = QoEScalingPolicy(cold_start_s=0.0)
    figures = {
        "qoe_demand_tds": {"a": 200.0, "b": 10.0}, "qoe_speed_tds": {"a": 100.0, "b": 100.0},
        "qoe_readers": {"a": 40.0}, "qoe_below_target": {"a": 9.0},
    }  # fmt: skip
    assert len(replica_readings(figures)) == 1  # b has not reported everything yet
    context = SimpleNamespace(
        aggregated_metrics=figures, target_num_replicas=1, current_time=5.0, policy_state={}
    )
    number, state = policy(context)
    assert number == 3
    context.policy_state, context.aggregated_metrics = state, None
    assert policy(context)[0] == 1


def test_replicas_on_a_node_do_not_share_files() -> None:
    config = AndesEngineConfig(
        status_file="/x/status.json", step_log="/x/steps.jsonl", slowdowns=(1.0, 3.0)
    )
    first, second, third = (for_replica(config, number, "/tmp/y") for number in range(3))
    assert (first.status_file, first.step_log, first.slowdown) == (
        "/x/status.json", "/x/steps.jsonl", 1.0
    )  # fmt: skip
    assert (second.status_file, second.slowdown) == ("/x/status.json.1", 3.0)
    assert third.slowdown == 1.0
    assert for_replica(AndesEngineConfig(), 1, "/tmp/y").status_file == "/tmp/y"


def test_the_step_log_is_what_calibrate_reads(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "steps.jsonl"
    log = StepLog(str(path))
    for number in range(40):
        log.note(number, 0, 10 * number, 0.05)
    assert len(path.read_text().splitlines()) >= 32  # what is lost by a kill is bounded
    log.close()
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[3] == {"batch": 3, "prefill_tokens": 0, "context_tokens": 30, "seconds": 0.05}
    StepLog(None).note(1, 2, 3, 4.0)


def test_totals_by_tenant() -> None:
    totals = TenantTotals()
    for name, live in (("blue", 3), (None, 1)):
        for _ in range(live):
            totals.entered(totals.label(name))
    totals.planned(4.0)
    totals.preempted(["blue", "blue"])
    totals.left("anonymous")
    result = totals.to_dict()
    assert result["blue"] == {"preemptions": 2, "plan_s": 3.0, "live": 3}
    assert result["anonymous"] == {"preemptions": 0, "plan_s": 1.0, "live": 0}
    labels = {totals.label(f"tenant-{number}") for number in range(2 * MAX_TENANTS)}
    assert len(labels) <= MAX_TENANTS + 1
    assert OTHERS in labels


class Instrument:
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def inc(self, value: float, tags: dict[str, str]) -> None:
        key = tags.get("tenant", "")
        self.values[key] = self.values.get(key, 0.0) + value

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tags.get("tenant", tags.get("quantile", ""))] = value


def test_metrics_count_what_grew_also_across_a_new_engine() -> None:
    names = ("preemptions", "plan_seconds", "live", "starved", "restore_seconds", "plan_ms",
             "kv_use", "mode")  # fmt: skip
    made = {name: Instrument() for name in names}
    metrics = EngineMetrics(made)

    def status(preemptions: int) -> dict[str, Any]:
        tenant = {"preemptions": preemptions, "plan_s": 0.5, "live": 2}
        return {
            "tenants": {"blue": tenant}, "starved": 1, "restore_s": 0.1, "plan_ms_p50": 1.0,
            "plan_ms_p99": 2.0, "kv_use": 0.4, "mode": "admission_only",
        }  # fmt: skip

    for preemptions in (3, 5, 5, 2):  # the engine was replaced before the last one
        metrics.update(status(preemptions))
    assert made["preemptions"].values == {"blue": 7.0}
    assert made["plan_seconds"].values == {"blue": 0.5}
    assert made["plan_ms"].values == {"p50": 1.0, "p99": 2.0}
    assert made["mode"].values[""] == 1
