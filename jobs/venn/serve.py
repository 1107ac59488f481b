"""Run Venn's scheduler, its standby and the device gateways on Ray until Ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.metrics import MetricsRecorder
from actors.venn.cluster import ClusterConfig, VennCluster
from jobs.launcher import Job, JobContext, Summary
from raysys.config import check_range
from raysys.errors import RaysysError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """The service.

    Args:
        folder: log and snapshots; keep it to keep the jobs over restarts.
        duration_s: stop after so long; 0 serves until Ctrl-C.
        watch_interval_s: how often the actors' health is looked at.
    """

    folder: str = "runs/venn-state"
    duration_s: float = 0.0
    watch_interval_s: float = 5.0
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        check_range(self, "duration_s", 0)
        check_range(self, "watch_interval_s", 0, low_open=True)


def run(config: ServeConfig, context: JobContext) -> Summary:
    """Start, print the addresses, watch, stop."""
    session = context.ray()
    cluster = VennCluster.start(session, Path(config.folder).absolute(), config.cluster)
    try:
        print(f"scheduler {cluster.scheduler_address}", flush=True)
        print(f"gateways {' '.join(cluster.gateway_addresses)}", flush=True)
        steps = _watch(cluster, config, context)
    finally:
        cluster.close()
    return Summary(lines=[f"served; health looked at {steps} times"])


def _watch(cluster: VennCluster, config: ServeConfig, context: JobContext) -> int:
    pause = threading.Event()
    waited_s, steps = 0.0, 0
    while not config.duration_s or waited_s < config.duration_s:
        left_s = config.duration_s - waited_s if config.duration_s else config.watch_interval_s
        pause.wait(min(config.watch_interval_s, left_s))
        waited_s += config.watch_interval_s
        steps += 1
        try:
            health = cluster.health()
        except RaysysError as error:
            context.console.print(f"an actor is away and being restarted: {error}")
            continue
        _record(context.metrics, steps, list(health.values()))
    return steps


def _record(metrics: MetricsRecorder, step: int, health: Sequence[dict[str, Any]]) -> None:
    """The actors' health for Prometheus; the scheduler's part is that of the leader."""
    gateways = [item for item in health if "checkins" in item]
    values = {"checkins": sum(item["checkins"] for item in gateways)}
    values |= {"leases": sum(item["leases"] for item in gateways), "gateways": len(gateways)}
    for leader in (item for item in health if item.get("leading")):
        values |= {name: leader[name] for name in ("jobs", "waiting_jobs", "wanted_devices")}
        values |= {"longest_wait_s": leader["longest_wait_s"], "epoch": leader["epoch"]}
        values["takeover_s"] = leader["took_over_s"]
    for name, value in values.items():
        metrics.record(f"venn_{name}", float(value), step=step)


JOB = Job(name="venn serve", config=ServeConfig, run=run)
