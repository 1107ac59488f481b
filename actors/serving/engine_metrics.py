"""Ray metrics of an engine, from its scheduler's status; by tenant where that has a meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODES = ("full", "admission_only", "fcfs")


class EngineMetrics:
    """Turns statuses, which hold totals, into counters and gauges.

    An engine that was replaced starts from zero; a total that falls counts from zero too.

    Args:
        instruments: by name, objects with ``inc(value, tags)`` or ``set(value, tags)``; None
            makes Ray's.
    """

    def __init__(self, instruments: Mapping[str, Any] | None = None) -> None:
        self._instruments = _make_instruments() if instruments is None else instruments
        self._totals: dict[tuple[str, str], float] = {}

    def update(self, status: Mapping[str, Any]) -> None:
        """Record one status."""
        for tenant, totals in status["tenants"].items():
            tags = {"tenant": tenant}
            self._add("preemptions", tenant, totals["preemptions"], tags)
            self._add("plan_seconds", tenant, totals["plan_s"], tags)
            self._instruments["live"].set(totals["live"], tags)
        self._add("starved", "", status["starved"], {})
        self._add("restore_seconds", "", status["restore_s"], {})
        for quantile in ("p50", "p99"):
            value = status[f"plan_ms_{quantile}"]
            self._instruments["plan_ms"].set(value, {"quantile": quantile})
        self._instruments["kv_use"].set(status["kv_use"], {})
        self._instruments["mode"].set(MODES.index(status["mode"]), {})

    def _add(self, name: str, key: str, total: float, tags: dict[str, str]) -> None:
        known = self._totals.get((name, key), 0.0)
        grown = total - known if total >= known else total
        self._totals[name, key] = total
        if grown > 0:
            self._instruments[name].inc(grown, tags)


def _make_instruments() -> dict[str, Any]:
    from ray.util.metrics import Counter, Gauge

    tenant = ("tenant",)
    return {
        "preemptions": Counter("raysys_preemptions", "Requests that lost their KV", tenant),
        "plan_seconds": Counter("raysys_plan_seconds", "Planning time, by live requests", tenant),
        "live": Gauge("raysys_live", "Requests in the engine", tenant),
        "starved": Counter("raysys_starved", "Requests that the starvation guard put first"),
        "restore_seconds": Counter("raysys_restore_seconds", "Step time spent on restores"),
        "plan_ms": Gauge("raysys_plan_ms", "Duration of recent plans", ("quantile",)),
        "kv_use": Gauge("raysys_kv_use", "Share of the KV room in use"),
        "mode": Gauge("raysys_mode", "0 full, 1 admission only, 2 order of arrival"),
    }
