"""Metrics: one call, two places."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

from actors import metrics as metrics_module
from actors.metrics import MetricsRecorder
from actors.session import Session
from raysys.errors import ConfigError
from raysys.runs import RunDirectory


class FakeGauge:
    """Remembers what was set."""

    made: list[FakeGauge] = []  # noqa: RUF012 - reset by every test through the fixture

    def __init__(self, name: str, keys: tuple[str, ...]) -> None:
        self.name = name
        self.keys = keys
        self.values: list[tuple[float, dict[str, str] | None]] = []
        self.made.append(self)

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values.append((value, tags))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    FakeGauge.made = []
    return RunDirectory.create(str(tmp_path), job="x", config={}, seeds=[], now="2026-01-01")


def test_one_call_reaches_both(run: RunDirectory) -> None:
    recorder = MetricsRecorder(run, gauges=FakeGauge, clock=lambda: 7.0)
    recorder.record("qoe", 0.5, step=1, tags={"tenant": "a"})
    recorder.record("qoe", 0.75, step=2, tags={"tenant": "b"})
    recorder.flush()
    (gauge,) = FakeGauge.made
    assert gauge.values == [(0.5, {"tenant": "a"}), (0.75, {"tenant": "b"})]
    rows = run.read_table("metrics").to_pylist()
    assert rows[1] == {"time": 7.0, "name": "qoe", "value": 0.75, "step": 2, "tags": "tenant=b"}


def test_label_names_are_fixed(run: RunDirectory) -> None:
    recorder = MetricsRecorder(run, gauges=FakeGauge)
    recorder.record("qoe", 1, tags={"tenant": "a"})
    with pytest.raises(ConfigError, match="metric qoe"):
        recorder.record("qoe", 1, tags={"user": "a"})


def test_flushes_by_count_and_by_time(run: RunDirectory) -> None:
    now = [0.0]
    recorder = MetricsRecorder(run, clock=lambda: now[0])
    for step in range(metrics_module.FLUSH_ROWS):
        recorder.record("x", step)
    assert run.read_table("metrics").num_rows == metrics_module.FLUSH_ROWS
    recorder.record("x", 1)
    now[0] = metrics_module.FLUSH_S
    recorder.record("x", 2)
    assert run.read_table("metrics").num_rows == metrics_module.FLUSH_ROWS + 2


def test_events_are_kept(run: RunDirectory) -> None:
    recorder = MetricsRecorder(run, clock=lambda: 1.0)
    recorder.event("split", leaf=3)
    recorder.flush()
    assert run.read_table("events").to_pylist() == [
        {"time": 1.0, "kind": "split", "detail": '{"leaf": 3}'}
    ]


def test_ray_gauge_accepts_what_the_recorder_gives(run: RunDirectory, ray_session: Session) -> None:
    recorder = MetricsRecorder(run, gauges=metrics_module.ray_gauge)
    recorder.record("test_seconds", 1.5, tags={"stage": "a"})
    recorder.record("test_plain", 2)
    recorder.flush()
    assert run.read_table("metrics").column("name").to_pylist() == ["test_seconds", "test_plain"]


def test_a_page_shows_what_is_recorded(run: RunDirectory) -> None:
    page = metrics_module.MetricsPage("127.0.0.1:0")
    recorder = MetricsRecorder(run, metrics_module.each_of([page.gauge, FakeGauge]))
    recorder.record("qoe", 0.5, tags={"tenant": "a"})
    recorder.record("plain", 2)
    again = MetricsRecorder(run, metrics_module.each_of([page.gauge]))  # after Ray was started
    again.record("plain", 3)
    with urllib.request.urlopen(f"http://127.0.0.1:{page.port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    page.close()
    assert 'raysys_qoe{tenant="a"} 0.5' in lines
    assert "raysys_plain 3.0" in lines
    assert [gauge.values[0][0] for gauge in FakeGauge.made] == [0.5, 2.0]
    assert metrics_module.each_of([]) is None
