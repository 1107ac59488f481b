"""The federate job with cohorts: report, explanation, and clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.session import Session
from jobs import federate, launcher
from raysys.federated.auxo.drawing import cohort_section, lines
from raysys.report import render_page
from raysys.runs import RunDirectory

SMALL = [
    "rounds=3", "workers=1", "worker_cpus=0", "evaluate_every=2", "checkpoint_every=1",
    "recipe.clients_per_round=20", "recipe.model.hidden=[8]", "auxo.k_max=3",
]  # fmt: skip


def spread(total: float) -> dict[str, float | None]:
    names = ("total", "total_low", "total_high", "within", "within_low", "within_high")
    return dict.fromkeys(names, total)


FACTS = {
    "kind": "auxo", "records": 90, "wasted_updates": 7, "explored": 3, "frozen": False,
    "models": {"0.0": 4096, "0.1.0": 12288, "0.1.1": 16384},
    "events": [
        {"round": 20, "event": "split", "cohort": 0, "into": [1, 2], "evidence": {
            "stability": {"2": 0.97}, "agreement": 0.9, "coverage": 0.7,
            "dispersion": spread(0.5), "participants": 40.0,
        }},
        {"round": 33, "event": "split", "cohort": 2, "into": [3, 4], "evidence": {
            "stability": {"2": 0.9}, "agreement": 0.9, "coverage": 0.7,
            "dispersion": spread(float("nan")), "participants": 20.0,
        }},
        {"round": 40, "event": "reopened", "cohort": 1, "rejected": 0.4},
        {"round": 41, "event": "blocked", "cohort": 1, "client": 4},
        {"round": 45, "event": "merged", "cohort": 3, "into": 4},
    ],
    "cohorts": [
        {"cohort": n, "name": name, "parent": parent, "born": born, "trains": members is not None,
         "merged_into": None, "members": members, "participants": 9.5,
         "evidence": {"verdict": "no stable number of parts"}}
        for n, name, parent, born, members in (
            (0, "0", -1, 0, None), (1, "0.0", 0, 21, 50.0), (2, "0.1", 0, 21, None),
            (3, "0.1.0", 2, 34, 25.0), (4, "0.1.1", 2, 34, 15.0),
        )
    ],
}  # fmt: skip


@pytest.fixture
def shared_ray(ray_session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.JobContext, "ray", lambda self, **changes: ray_session)


def test_job_with_cohorts_reports_and_explains(
    shared_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    flags = [flag for setting in SMALL for flag in ("--set", setting)]
    assert federate.command_line(["--run-dir", str(folder), *flags]) == 0
    facts = RunDirectory.open(str(folder)).read_json("explain.json")
    assert facts["cohorts"][0]["evidence"]["verdict"] == "no stable number of parts"
    assert "Tree of cohorts" in (folder / "report.html").read_text()
    capsys.readouterr()
    assert federate.command_line(["explain", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "after round 3" in told
    assert "cohort 0 (trains" in told
    assert federate.command_line(["explain", str(tmp_path / "none")]) != 0
    assert federate.command_line(["explain"]) == 2


def test_the_tree_and_its_reasons_are_told() -> None:
    text = "\n".join(lines(FACTS))
    assert "20  0 split into 0.0, 0.1  stability K=2: 0.97" in text
    assert "1.00 of the whole is left inside" in text
    assert "dispersion too small to judge" in text
    assert "    cohort 0.1.1 (trains, 15 members): no stable number of parts" in text
    assert "1 blocked" in text
    page = render_page("t", "s", [cohort_section(FACTS)])
    assert "<svg" in page
    assert "0.1.0 merged into 0.1.1" in page
