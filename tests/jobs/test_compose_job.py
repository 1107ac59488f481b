"""raysys compose NAME: end to end on the shared cluster, resumed, listed, and its bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.session import Session
from jobs import launcher
from jobs.compose.__main__ import COMPOSITIONS, command_line, listing
from jobs.compose.composition import Measure, means_of
from raysys.config import config_from_dict
from raysys.errors import ConfigError
from raysys.runs import RunDirectory

KGT = [
    "kgt_in_clients", "--set", "rounds=9", "--set", "hidden=[16, 16]", "--set", "clients=20",
    "--set", "per_round=5", "--set", "freeze.every=1", "--set", "freeze.lag=1",
    "--set", "freeze.window=2", "--set", "freeze.coef=1000",
]  # fmt: skip


@pytest.fixture
def shared_ray(ray_session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.JobContext, "ray", lambda self, **changes: ray_session)


def test_a_composition_writes_rows_result_and_page_and_goes_on(
    shared_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--run-dir", str(tmp_path / "run")]
    assert command_line([*KGT, *where]) == 0
    assert "KGT | " in capsys.readouterr().out
    run = RunDirectory.open(str(tmp_path / "run"))
    rows = run.read_table("rows").to_pylist()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [row["seed"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert result["seeds"] == [0, 1]
    assert result["config"]["freeze"]["window"] == 2
    # A criterion this loose freezes at once, so KGT must send less than plain averaging.
    means = result["means"]
    assert means["KGT"]["uploaded_mb"] < means["all layers trained"]["uploaded_mb"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "raysys compose kgt_in_clients" in page

    (lost,) = [p for p in (tmp_path / "run" / "pieces").iterdir() if p.name.startswith("frozen-1")]
    lost.unlink()
    (kept,) = (tmp_path / "run" / "pieces").iterdir()
    before = kept.stat().st_mtime_ns
    assert command_line(["kgt_in_clients", *where, "--resume"]) == 0
    assert lost.exists()
    assert kept.stat().st_mtime_ns == before
    again = json.loads((tmp_path / "run" / "result.json").read_text())
    for old, new in zip(result["rows"], again["rows"], strict=True):
        assert old["accuracy"] == new["accuracy"]
    assert len(run.read_table("rows")) == 6


def test_the_other_compositions_give_rows_of_every_arm(shared_ray: None, tmp_path: Path) -> None:
    small = {
        "ccs_in_lte_tuning": [
            "blocks=32", "keeps=[0.5]", "tuning.base_epochs=1", "tuning.model.hidden=16",
            "tuning.model.neurons=32", "tuning.model.layers=1", "tuning.model.heads=2",
            "tuning.model.expert_size=8", "tuning.model.length=16", "tuning.model.held_out=4",
        ],
        "cohorts_in_ensemble": [
            "planted.clients=40", "rounds=2", "per_round=10", "k=2", "scored=5", "labelled=5",
        ],
    }  # fmt: skip
    arms = {
        "ccs_in_lte_tuning": {"whole", "0.5 ccs", "0.5 random", "0.5 hardest"},
        "cohorts_in_ensemble": {"one model", "Fed-ensemble", "Auxo alone", "cohort ensemble"},
    }
    for name, fields in small.items():
        words = [word for field in fields for word in ("--set", field)]
        run = tmp_path / name
        assert command_line([name, *words, "--run-dir", str(run)]) == 0
        means = json.loads((run / "result.json").read_text())["means"]
        assert arms[name] <= set(means)
        assert "<svg" in (run / "report.html").read_text()


def test_the_list_names_what_is_here_and_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"raysys compose {found.name} " in shown for found in COMPOSITIONS)
    assert "raysys lte serve" in shown
    assert command_line(["nothing"]) == 2
    assert "shared_fleet" in capsys.readouterr().err
    assert len(listing()) > len(COMPOSITIONS)


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("shared_fleet", {"policies": ("fair",)}, "policies"),
        ("shared_fleet", {"participants": 5}, "participants"),
        ("kgt_in_clients", {"per_round": 200}, "per_round"),
        ("kgt_in_clients", {"hidden": ()}, "hidden"),
        ("ccs_in_lte_tuning", {"blocks": 30}, "multiple of the batch"),
        ("ccs_in_lte_tuning", {"keeps": (1.0,)}, "keeps"),
        ("ccs_in_lte_tuning", {"beta": 0.9}, "beta"),
        ("cohorts_in_ensemble", {"per_round": 5}, "per_round"),
    ],
)
def test_bad_input_is_refused(name: str, values: dict[str, object], text: str) -> None:
    (config,) = [found.config for found in COMPOSITIONS if found.name == name]
    with pytest.raises(ConfigError, match=text):
        config_from_dict(config, values)


def test_means_are_over_the_seeds_of_an_arm() -> None:
    rows = [
        {"arm": arm, "seed": seed, "x": value}
        for arm, seed, value in (("a", 0, 1.0), ("b", 0, 5.0), ("a", 1, 2.0), ("b", 1, 6.0))
    ]
    assert means_of(rows, [Measure(name="x", heading="x")]) == {"a": {"x": 1.5}, "b": {"x": 5.5}}
