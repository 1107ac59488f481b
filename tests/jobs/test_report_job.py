"""``raysys report``: a page for any run."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import report
from raysys.runs import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    created = RunDirectory.create(
        str(tmp_path / "run"), job="demo", config={"lr": 0.1}, seeds=[1], now="2026-01-01"
    )
    rows = [
        {"time": 1.0 + step, "name": name, "value": step * 0.5, "step": step, "tags": tags}
        for step in range(3)
        for name, tags in (("accuracy", ""), ("qoe", "tenant=a"))
    ]
    created.append_rows("metrics", rows)
    created.append_rows("events", [{"time": 1.0, "kind": "split", "detail": "{}"}])
    return created


def test_builds_a_page_from_metrics_and_events(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([run.uri]) == 0
    where = capsys.readouterr().out.strip()
    text = Path(where).read_text()
    assert text.count("<svg") == 2
    assert "config lr" in text
    assert "split" in text


def test_keeps_a_report_that_the_job_wrote(run: RunDirectory, tmp_path: Path) -> None:
    run.storage.write("report.html", b"own page")
    assert report.main([run.uri, "--out", str(tmp_path / "copy.html")]) == 0
    assert (tmp_path / "copy.html").read_text() == "own page"


def test_missing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 6
    assert "holds no run" in capsys.readouterr().err
