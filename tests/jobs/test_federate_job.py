"""The federate job on the shared cluster: results on disk, resume, and clear errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.session import Session
from jobs import federate, launcher
from raysys.config import config_from_dict
from raysys.errors import CapabilityError, ConfigError, DataError
from raysys.federated.core.datasets import load_npz_data, read_idx
from raysys.federated.core.recipe import DataConfig, FederatedConfig, load_data
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


def test_your_own_archive(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "own.npz"
    np.savez(
        path, inputs=rng.random((50, 4)), targets=rng.integers(0, 3, 50), client=np.arange(50) % 7
    )
    data = load_npz_data(path)
    assert (len(data.targets), len(data.test_targets), data.classes) == (40, 10, 3)
    assert data.keys is not None
    config = config_from_dict(FederatedConfig, {"data": {"name": "npz", "path": str(path)}})
    assert load_data(config.data, 0, None).name == "own"
    np.savez(tmp_path / "objects.npz", inputs=np.array([{}]), targets=np.zeros(1))
    with pytest.raises(DataError):
        load_npz_data(tmp_path / "objects.npz")
    np.savez(tmp_path / "half.npz", inputs=np.zeros(3))
    with pytest.raises(DataError, match="targets"):
        load_npz_data(tmp_path / "half.npz")


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="data folder"):
        load_data(DataConfig(name="mnist"), 0, None)
    with pytest.raises(CapabilityError, match="does not exist"):
        load_data(DataConfig(name="mnist"), 0, tmp_path)
    (tmp_path / "x.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError):
        read_idx(tmp_path / "x.gz", 2051)
    with pytest.raises(ConfigError, match="path"):
        DataConfig(name="npz")
