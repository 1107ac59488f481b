"""One call records a metric for Prometheus and in the run's Parquet tables.

Prometheus reads Ray's page on every node, or the job's own (:class:`MetricsPage`) where a job runs
without Ray. The Parquet side stays with the run. Rows are buffered and written in parts, so a run
that is killed loses at most one buffer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from actors.listeners import host_of, is_loopback
from raysys.errors import ConfigError
from raysys.runs import RunDirectory

FLUSH_ROWS = 1000
FLUSH_S = 10.0
METRIC_PREFIX = "raysys_"


class Gauge(Protocol):
    """What the recorder needs of ``ray.util.metrics.Gauge``."""

    def set(self, value: float, tags: dict[str, str] | None = None) -> None: ...


GaugeFactory = Callable[[str, tuple[str, ...]], Gauge]


def ray_gauge(name: str, tag_keys: tuple[str, ...]) -> Gauge:
    """Make a gauge that Ray exports as ``ray_raysys_<name>``."""
    from ray.util.metrics import Gauge as RayGauge

    gauge: Gauge = RayGauge(METRIC_PREFIX + name, description=name, tag_keys=tag_keys)
    return gauge


class MetricsPage:
    """Serves a job's metrics to Prometheus at ``http://ADDRESS/metrics``, as ``raysys_<name>``.

    The page has no password, so it listens on loopback only: Prometheus's agent runs on the host.

    Args:
        address: ``host:port``; port 0 takes a free one.

    Raises:
        ConfigError: not a loopback address, or its port is taken.
    """

    def __init__(self, address: str) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        host, port = host_of(address), address.rpartition(":")[2]
        if not is_loopback(host) or not port.isdecimal():
            raise ConfigError("--metrics", address, "a loopback address such as 127.0.0.1:9464")
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        try:
            self._server, self._thread = start_http_server(
                int(port), addr=host.strip("[]"), registry=self._registry
            )
        except (OSError, OverflowError) as error:
            raise ConfigError("--metrics", address, "a free port", str(error)) from None
        self.port = int(self._server.server_port)

    def gauge(self, name: str, tag_keys: tuple[str, ...]) -> Gauge:
        """The gauge of this name; made on the first call."""
        if name not in self._gauges:
            self._gauges[name] = _PageGauge(name, tag_keys, self._registry)
        return self._gauges[name]

    def close(self) -> None:
        """Stop listening; may be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class _PageGauge:
    def __init__(self, name: str, tag_keys: tuple[str, ...], registry: Any) -> None:
        from prometheus_client import Gauge as PageGauge

        self._keys = tag_keys
        self._gauge = PageGauge(METRIC_PREFIX + name, name, tag_keys, registry=registry)

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        (self._gauge.labels(**(tags or {})) if self._keys else self._gauge).set(value)


def each_of(factories: Sequence[GaugeFactory]) -> GaugeFactory | None:
    """One factory whose gauges set those of all; None without any."""
    if not factories:
        return None
    return lambda name, keys: _Several([make(name, keys) for make in factories])


class _Several:
    def __init__(self, gauges: Sequence[Gauge]) -> None:
        self._gauges = gauges

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        for gauge in self._gauges:
            gauge.set(value, tags)


class MetricsRecorder:
    """Records metrics and events of one run; safe to call from several threads.

    Args:
        run: where the Parquet parts go.
        gauges: makes a gauge for Prometheus; None leaves it out.
        clock: wall clock in seconds since the epoch.
    """

    def __init__(
        self,
        run: RunDirectory,
        gauges: GaugeFactory | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._run = run
        self._make_gauge = gauges
        self._clock = clock
        self._gauges: dict[str, tuple[tuple[str, ...], Gauge]] = {}
        self._rows: dict[str, list[dict[str, Any]]] = {"metrics": [], "events": []}
        self._flushed_at = clock()
        self._lock = threading.Lock()

    def record(
        self,
        name: str,
        value: float,
        *,
        step: int | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Record one value.

        Args:
            name: lower-case name with a unit where one is needed, such as ``"plan_ms"``.
            value: the value.
            step: position in the run (round, step, request number).
            tags: labels; a metric has the same label names on every call.

        Raises:
            ConfigError: the label names differ from an earlier call's.
        """
        labels = dict(tags or {})
        keys = tuple(sorted(labels))
        with self._lock:
            if self._make_gauge is not None:
                self._gauge(name, keys).set(float(value), labels)
            row = {"time": self._clock(), "name": name, "value": float(value), "step": step}
            self._append("metrics", row | {"tags": _tag_text(labels)})

    def event(self, kind: str, **fields: Any) -> None:
        """Record that something happened; ``fields`` are JSON-ready and become one text column."""
        import json

        with self._lock:
            detail = json.dumps(fields, sort_keys=True)
            self._append("events", {"time": self._clock(), "kind": kind, "detail": detail})

    def flush(self) -> None:
        """Write what is buffered."""
        with self._lock:
            self._flush()

    def _gauge(self, name: str, keys: tuple[str, ...]) -> Gauge:
        known = self._gauges.get(name)
        if known is None:
            assert self._make_gauge is not None
            known = (keys, self._make_gauge(name, keys))
            self._gauges[name] = known
        if known[0] != keys:
            raise ConfigError(f"metric {name}", keys, f"the labels {known[0]} on every call")
        return known[1]

    def _append(self, table: str, row: dict[str, Any]) -> None:
        self._rows[table].append(row)
        full = sum(map(len, self._rows.values())) >= FLUSH_ROWS
        if full or self._clock() - self._flushed_at >= FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        for table, rows in self._rows.items():
            if rows:
                self._run.append_rows(table, rows)
                rows.clear()
        self._flushed_at = self._clock()


def _tag_text(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={labels[key]}" for key in sorted(labels))
