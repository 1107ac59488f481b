"""The federate job with a growing family: report, explanation, serving a member."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.federated.endpoint import EnsembleEndpoint
from actors.session import Session
from jobs import federate, launcher, predict
from raysys.errors import ConfigError
from raysys.federated.fedtrans.network import net_from_json
from raysys.runs import RunDirectory

SMALL = [
    "workers=1", "worker_cpus=0", "evaluate_every=5", "checkpoint_every=2",
    "recipe.clients_per_round=20", "recipe.model.hidden=[4]", "recipe.local.steps=3",
    "family.growth.delta=2", "family.growth.gamma=2", "family.growth.smooth=1",
    "family.growth.beta=10.0", "family.growth.max_models=3", "family.spread=8",
]  # fmt: skip


def flags(*more: str) -> list[str]:
    return [flag for setting in (*SMALL, *more) for flag in ("--set", setting)]


def test_a_family_is_trained_explained_and_served(
    ray_session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launcher.JobContext, "ray", lambda self, **changes: ray_session)
    folder = str(tmp_path / "run")
    assert federate.command_line(["--run-dir", folder, *flags("rounds=11")]) == 0
    run = RunDirectory.open(folder)
    facts = run.read_json("explain.json")
    assert [member["parent"] for member in facts["family"]] == [None, 0, 1]
    assert "Genealogy of models" in (tmp_path / "run" / "report.html").read_text()
    capsys.readouterr()
    assert federate.command_line(["explain", folder, "7"]) == 0
    out = capsys.readouterr().out
    assert f"client 7: M{facts['clients']['7']}" in out
    assert federate.command_line(["explain", folder, "100"]) == 2
    assert "after round 11" in out
    assert "M2 from M1: a cell behind cell 0" in out
    served = predict.load_endpoint(predict.PredictConfig(run=folder))
    spec, members = served[:2]
    assert spec == net_from_json(facts["family"][2]["net"]).spec()  # the largest
    assert members.shape == (1, facts["family"][2]["params"])
    answer = EnsembleEndpoint(*served).answer({"inputs": [[[[0.5] * 8] * 8]]})
    assert sum(answer["probabilities"][0]) == pytest.approx(1)
    small = predict.load_endpoint(predict.PredictConfig(run=folder, model="weights.model0"))
    assert small[1].shape == (1, facts["family"][0]["params"])
    with pytest.raises(ConfigError, match="model1"):
        predict.load_endpoint(predict.PredictConfig(run=folder, model="weights.model9"))


def test_an_ensemble_of_families_is_refused(tmp_path: Path) -> None:
    both = ["--run-dir", str(tmp_path / "run"), *flags("ensemble.k=2")]
    assert federate.command_line(both) == 2
