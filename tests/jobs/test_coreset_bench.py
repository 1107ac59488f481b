"""The CCS benchmark and tour stage run, on a task of seconds; no figure is judged here."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest

from actors.session import Session
from jobs.bench import ccs as bench
from jobs.bench.ccs import lab as coreset_lab
from jobs.bench.ccs import systems as ccs_systems
from jobs.bench.ccs.tasks import small_task
from jobs.tour.stage import StageContext
from jobs.tour.stages import ccs as stage
from raysys.bench import Profile
from raysys.runs import RunDirectory

SHOULD_HAVE = {
    "ccs_minus_random", "ccs_minus_hardest", "ccs_minus_cut_random", "auto_beta_regret",
    "noise_20pct", "low_pruning", "select_10m_rows_s", "recorder_overhead",
    "coverage_50k_5k_512_s",
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, ray_session: Session) -> None:
    task = small_task()
    proxy = dataclasses.replace(task.proxy, channels=(2, 4, 4), iterations=8, score_iterations=22)
    task = dataclasses.replace(task, proxy=proxy)
    monkeypatch.setattr(coreset_lab, "session", lambda: ray_session)
    monkeypatch.setattr(ccs_systems, "session", lambda: ray_session)

    @functools.cache
    def lab_of(name: str, noise: float = 0.0, partial: str = "") -> coreset_lab.Lab:
        return coreset_lab.Lab(task, noise, partial)

    monkeypatch.setattr(bench, "lab_of", lab_of)
    monkeypatch.setattr(bench, "_seeds", lambda profile: [1])


def test_claims_have_the_promised_names() -> None:
    assert set(bench.CLAIMS) >= SHOULD_HAVE


@pytest.mark.usefixtures("tiny")
def test_accuracy_claims_run_and_never_mix_sides() -> None:
    profile = Profile(name="quick")
    for name in ("ccs_minus_random", "auto_beta_regret", "noise_20pct", "auc_pr_vs_hardest"):
        claim = bench.CLAIMS[name](profile)
        assert claim.name == name
        assert claim.samples
    margin: Any = bench.ccs_minus_random(profile)  # from what was trained before
    entry = margin.samples["A"]
    assert entry["margins"]["random"] == pytest.approx(
        entry["ccs"]["mean"] - entry["random"]["mean"]
    )
    regret: Any = bench.auto_beta_regret(profile).samples["A"]
    assert regret["regret"] == pytest.approx(
        max(regret["test"].values()) - regret["test"][str(regret["chosen"])]
    )
    assert regret["regret"] >= 0


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_claim_trains_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = Profile(partial=str(tmp_path))
    first: Any = bench.ccs_minus_random(profile)
    kept = (tmp_path / "proxies.jsonl").read_text()
    assert len(kept.splitlines()) == 6  # the beta search, CCS and random, for each task

    def trained(*arguments: Any, **options: Any) -> list[float]:
        raise AssertionError("trained again")

    task = bench.lab_of("A", 0.0, str(tmp_path)).task
    monkeypatch.setattr(coreset_lab, "train_many", trained)
    monkeypatch.setattr(coreset_lab, "auto_beta", trained)
    monkeypatch.setattr(bench, "lab_of", lambda *key: coreset_lab.Lab(task, *key[1:]))
    again: Any = bench.ccs_minus_random(profile)
    assert again.samples == first.samples
    assert (tmp_path / "proxies.jsonl").read_text() == kept


@pytest.mark.usefixtures("tiny")
def test_selection_claim_agrees_over_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ccs_systems, "ROWS", 20_000)
    monkeypatch.setattr(ccs_systems, "PARTITIONS", (8, 1))
    claim: Any = ccs_systems.select_10m_rows_s(Profile())
    assert claim.samples["identical"]
    assert claim.value > 0


def test_tour_stage_shows_three_methods(ray_session: Session, tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path / "run"), job="tour", config={}, seeds=[0], now="now")
    seen: list[str] = []
    context = StageContext(
        profile="smoke", seed=0, session=ray_session, run=run,
        progress=lambda done, total, text: seen.append(text),
    )  # fmt: skip
    result = stage.run(context)
    assert [row.baseline_name for row in result.rows[:2]] == ["random", "hardest by AUM"]
    assert all(0 <= row.ours <= 100 for row in result.rows[:2])
    assert len(result.plots) == 1
    assert seen[-1] == "done"
