"""One replica: Ray Serve LLM's server, which also tells router, autoscaler and metrics how it does.

The scheduler lives in the engine's own process and leaves its status in a small file (see
:mod:`actors.andes.engine_settings`); this class gives each replica a file of its own and reads it
where Ray Serve asks: for routing twice a second, for autoscaling once.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray import serve

from actors.andes.engine_settings import (
    KEY,
    engine_arguments,
    for_replica,
    read_arguments,
    read_status,
)
from actors.serving.engine_metrics import EngineMetrics
from actors.serving.model_server import ModelServer
from raysys import scratch
from raysys.serving.andes.routing import ReplicaLoad, load_from_dict

STALE_S = 10.0


class QoEServer(ModelServer):
    """A replica with a status file, routing statistics, autoscaling statistics and metrics."""

    # Ray Serve awaits a constructor that is a coroutine.
    async def __init__(self, llm_config: Any, **kwargs: Any) -> None:  # type: ignore[misc]
        self._status_file = _own_settings(llm_config)
        self._engine_metrics = EngineMetrics()
        await super().__init__(llm_config, **kwargs)

    def _status(self) -> dict[str, Any] | None:
        """The scheduler's last status; None without one, or where it is too old to act on."""
        if self._status_file is None:
            return None
        status = read_status(self._status_file)
        if status is None or (time.time() - status["time"] > STALE_S and status["running"]):
            return None
        return status

    async def record_routing_stats(self) -> dict[str, Any]:
        """Asked by Ray Serve's controller; what the router sees as ``routing_stats``."""
        stats: dict[str, Any] = dict(await super().record_routing_stats() or {})
        status = self._status()
        if status is not None:
            self._engine_metrics.update(status)
            # An idle engine makes no steps and writes nothing: its last word stays true.
            load = dict(status["load"])
            load["time_s"] = time.time() if not status["running"] else load["time_s"]
            stats["load"] = load
            stats["status"] = _summary(status)
        return stats

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Ray Serve; what the autoscaling policy sees as metrics of its own."""
        status = self._status()
        load = None if status is None else load_from_dict(status["load"])
        return {} if load is None else autoscaling_figures(load)


def autoscaling_figures(load: ReplicaLoad) -> dict[str, float]:
    """A replica's load as the flat figures that Ray Serve collects."""
    return {
        "qoe_demand_tds": load.demand_tds,
        "qoe_speed_tds": load.speed(),
        "qoe_readers": float(load.readers),
        "qoe_below_target": float(load.below_target),
    }


def _own_settings(llm_config: Any) -> Path | None:
    """Give this replica's engine its own files; None where it is stock vLLM's scheduler."""
    additional = llm_config.engine_kwargs.get("additional_config")
    if not additional or KEY not in additional:
        return None
    number = int(serve.get_replica_context().rank.rank)
    default = str(scratch.kept("andes") / "status.json")
    config = for_replica(read_arguments(additional), number, default)
    own = {**additional, KEY: engine_arguments(config)["additional_config"][KEY]}
    llm_config.update_engine_kwargs(additional_config=own)
    return Path(str(config.status_file))


def _summary(status: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a replica."""
    names = ("policy", "mode", "running", "waiting", "kv_use", "pauses", "plan_ms_p50")
    return {name: status[name] for name in names}
