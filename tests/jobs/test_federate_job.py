"""The federate job on the shared cluster: results on disk, resume, and clear errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.session import Session
from jobs import federate, launcher
from raysys.federated.core.serialize import unpack_arrays
from raysys.runs import RunDirectory

SMALL = [
    "rounds=4", "workers=1", "worker_cpus=0", "evaluate_every=2", "checkpoint_every=2",
    "recipe.clients_per_round=20", "recipe.model.hidden=[8]",
]  # fmt: skip


@pytest.fixture(autouse=True)
def shared_ray(ray_session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs use the cluster of the tests instead of starting their own."""
    monkeypatch.setattr(launcher.JobContext, "ray", lambda self, **changes: ray_session)


def arguments(folder: Path, *settings: str) -> list[str]:
    flags = [flag for setting in settings for flag in ("--set", setting)]
    return ["--run-dir", str(folder), *flags]


def test_job_trains_reports_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert launcher.main(federate.JOB, arguments(folder, *SMALL)) == 0
    assert "clients/s" in capsys.readouterr().out
    run = RunDirectory.open(str(folder))
    result = run.read_json("result.json")
    assert result["updates"] == 80
    assert result["test_accuracy"] > 0.1
    assert "<svg" in (folder / "report.html").read_text()
    assert run.read_table("rounds").num_rows == 4
    weights = unpack_arrays((folder / "model.arrow").read_bytes())["weights"]
    assert np.isfinite(weights).all()
    assert launcher.main(federate.JOB, ["--run-dir", str(folder), "--resume"]) == 0
    again = unpack_arrays((folder / "model.arrow").read_bytes())["weights"]
    assert np.array_equal(weights, again)


@pytest.mark.parametrize(
    ("setting", "code", "word"),
    [
        ("recipe.local.lr=0", 2, "recipe.local.lr"),
        ("recipe.partition.scheme=iidd", 2, "iidd"),
        ("recipe.partition.clients=100000", 4, "samples"),
        ("recipe.clients_per_round=500", 2, "clients_per_round"),
        ("recipe.server.name=adam", 2, "adam"),
        ("recipe.model={kind: factory, factory: 'no.such:thing'}", 2, "importable"),
        ("recipe.data={name: npz, path: /nowhere.npz}", 3, "nowhere"),
        ("rounds=0", 2, "rounds"),
    ],
)
def test_bad_configuration_is_one_line_and_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, code: int, word: str
) -> None:
    assert launcher.main(federate.JOB, arguments(tmp_path / "run", *SMALL, setting)) == code
    error = capsys.readouterr().err
    assert word in error
    assert "Traceback" not in error
