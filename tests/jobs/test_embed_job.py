"""`raysys embed`: train, resume, export, score; sharded training with two trainers on Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.fiited.scoring import ClickModel, ScoringEndpoint
from jobs.bench.inputs import write_clicks
from jobs.embed.__main__ import command_line
from jobs.embed.config import TrainConfig
from jobs.embed.report import read_windows, recovery
from jobs.embed.train import make_trainer
from raysys import machine
from raysys.errors import ConfigError, DataError, InterruptedRunError
from raysys.runs import RunDirectory
from raysys.training.fiited.trainer import StreamTrainer

SMALL = ["--set", "batch=128", "--set", "window=5", "--set", "rows=500", "--set", "save_every=2"]


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6,000 rows whose label depends on two ids and a dense feature."""
    path = tmp_path_factory.mktemp("clicks") / "clicks.parquet"
    write_clicks(path, 6000, 400)
    return path


def train(clicks: Path, run: Path, *extra: str) -> dict[str, float]:
    given = ["train", "--data", str(clicks), "--run-dir", str(run), *SMALL, *extra]
    assert command_line(given) == 0
    return dict(RunDirectory.open(str(run)).read_json("result.json"))


@pytest.fixture(scope="module")
def trained(clicks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "whole"
    result = train(clicks, run)
    assert result["auc_late"] > 0.7
    assert result["rho"] > 0.4
    page = (run / "report.html").read_text()
    assert all(title in page for title in ("Row lengths by popularity", "Quality, predicted"))
    return run


def test_an_interrupted_run_goes_on_to_the_same_result(
    clicks: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = StreamTrainer.step, []

    def stop(self: StreamTrainer, *args: object) -> object:
        calls.append(1)
        if len(calls) == 33:
            raise InterruptedRunError("SIGTERM")
        return real(self, *args)  # type: ignore[arg-type]

    run = tmp_path / "cut"
    monkeypatch.setattr(StreamTrainer, "step", stop)
    given = ["train", "--data", str(clicks), "--run-dir", str(run), *SMALL]
    assert command_line(given) != 0
    monkeypatch.setattr(StreamTrainer, "step", real)
    assert command_line(["train", "--run-dir", str(run), "--resume"]) == 0
    ours = RunDirectory.open(str(run)).read_json("result.json")
    whole = RunDirectory.open(str(trained)).read_json("result.json")
    assert ours["steps"] == whole["steps"]
    assert ours["rows"] == whole["rows"]
    assert ours["alive"] == whole["alive"]
    names = ("step", "auc", "rho", "rows", "alive", "grown", "evicted", "hit_rate", "samples")
    found = [
        [{name: row[name] for name in names} for row in read_windows(RunDirectory.open(str(r)))]
        for r in (run, trained)
    ]
    assert found[0] == found[1]
    assert ours["rho"] == whole["rho"]
    assert found[0][-1]["evicted"] > 0


@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_the_exported_model_scores_like_the_trained_one(
    clicks: Path, trained: Path, tmp_path: Path, values: str
) -> None:
    out = tmp_path / "model"
    given = ["export", "--run", str(trained), "--out", str(out), "--set", f"values={values}"]
    assert command_line([*given, "--run-dir", str(tmp_path / "run")]) == 0
    model = ClickModel(str(out))
    rows = pq.read_table(clicks).drop_columns("label").slice(0, 50).to_pylist()
    scores = np.array(model.score(rows))
    assert scores.shape == (50,)
    assert scores.std() > 0.05
    endpoint = ScoringEndpoint(str(out))
    status, answer = endpoint.answer(json.dumps({"rows": rows}).encode())
    assert status == 200
    np.testing.assert_allclose(answer["scores"], scores, rtol=1e-5)
    for body in (b"{", b'{"rows": 5}', b'{"rows": [{"who": 1}]}', b'{"rows": [{"user": 1.5}]}'):
        assert endpoint.answer(body)[0] == 400
    assert endpoint.answer(b'{"rows": [{}]}')[0] == 200  # everything missing is a valid row
    (out / "model.json").write_text("{")
    with pytest.raises(DataError):
        ClickModel(str(out))


def test_what_a_drift_cost_is_read_from_the_windows() -> None:
    aucs = [0.7, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8, 0.6, 0.65, 0.7, 0.75, 0.77, 0.79, 0.8]
    windows = [{"step": 10 * i, "auc": a, "drift": float(i == 8)} for i, a in enumerate(aucs)]
    found = recovery(windows, 80)
    assert found["lowest_at"] == 70
    assert found["before"] == pytest.approx((0.7 + 0.7 + 0.8) / 3)
    assert found["back_at"] == 100  # 0.7333 - 0.1 * 0.1333 = 0.72
    assert recovery(windows[:10], 80)["back_at"] is None
    assert recovery(windows[8:9], 80)["before"] == 0.65


def test_ramp_and_guard_move_the_budget(clicks: Path, tmp_path: Path) -> None:
    train(clicks, tmp_path / "r", "--set", "ramp=0.5", "--set", "guard_tol=0.0005")
    rows = RunDirectory.open(str(tmp_path / "r")).read_table("windows").to_pylist()
    assert rows[0]["budget_slots"] > rows[-1]["budget_slots"]


def test_wrong_options_are_refused(clicks: Path) -> None:
    for fields in (
        {"model": "wide"},
        {"workers": 2},
        {"shards": 1, "ramp": 0.5},
        {"budget_mb": 1.0, "guard_tol": 0.1},
        {"chunk": 5},
    ):
        with pytest.raises(ConfigError):
            TrainConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        TrainConfig().log()
    trainer = make_trainer(
        TrainConfig(data=str(clicks), model="deepfm"), TrainConfig(data=str(clicks)).log()
    )
    assert trainer.guard is None
    assert command_line(["fly"]) == 2


@pytest.mark.cluster
def test_two_trainers_over_two_shards(
    clicks: Path, trained: Path, tmp_path: Path, isolated_environment: dict[str, str]
) -> None:
    """In a process of its own: the job starts a private Ray, and this process may be in one."""
    run = tmp_path / "sharded"
    words = [
        "train", "--data", str(clicks), "--run-dir", str(run), *SMALL, "--shards", "2",
        "--workers", "2", "--set", "interval=10", "--set", "save_every=3",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "jobs.embed", *words],
        env=isolated_environment, cwd=machine.app_root(), capture_output=True, text=True,
        check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = RunDirectory.open(str(run)).read_json("result.json")
    assert result["auc_late"] > 0.68
    assert len(list((run / "shards").glob("step-*/shard-0001/manifest.json"))) >= 1
    out = tmp_path / "model"
    given = ["export", "--run", str(run), "--out", str(out), "--run-dir", str(tmp_path / "x")]
    assert command_line(given) == 0
    assert ClickModel(str(out)).tables.manifest["rows"] == result["rows"]
