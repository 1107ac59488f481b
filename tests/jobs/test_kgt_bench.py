"""The KGT benchmark on a task of seconds: pieces go on, sides do not mix; no figure is judged."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.bench import kgt as bench
from jobs.bench.kgt import figures, runs, tasks
from jobs.bench.pieces import Piece, measure_pieces
from raysys.bench import Profile
from raysys.errors import DataError
from raysys.training import datasets
from raysys.training.kgt.loop import Recipe
from raysys.training.kgt.models import ResNet

SHOULD_HAVE = {
    "frozen_stage1_cached", "frozen_stage2_cached", "end_to_end", "against_baselines", "overhead",
    "stopped_controller", "resume_equal", "kgt_on_coreset",
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> tasks.Task:
    split = datasets.digits()
    some = np.arange(384)
    task = tasks.Task(
        "digits-step",
        datasets.Split("digits", split.train.take(some), split.test.take(some[:64])),
        functools.partial(ResNet, 10, widths=(4, 4, 8)),
        Recipe(epochs=2, batch_size=64),
    )
    monkeypatch.setattr(runs, "all_tasks", lambda profile: [task])
    monkeypatch.setattr(tasks, "mnist1d", lambda profile, schedule: task)
    monkeypatch.setattr(runs, "seeds", lambda profile: [1, 2])
    monkeypatch.setattr(runs, "STATIC_DEPTHS", (2,))
    return task


def test_claims_have_the_promised_names() -> None:
    assert set(bench.CLAIMS) >= SHOULD_HAVE


@pytest.mark.usefixtures("tiny")
def test_end_to_end_goes_on_from_kept_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = Profile(partial=str(tmp_path))
    first: Any = bench.end_to_end(profile)
    assert len(list(tmp_path.glob("digits-step-*.json"))) == 2
    row = first.samples[0]
    by_seed = [r for r in row["runs"] if r["method"] == "vanilla"]
    assert [r["seed"] for r in by_seed] == [1, 2]
    assert row["vanilla_points"] == pytest.approx(50 * sum(r["accuracy"] for r in by_seed))

    def trained(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(tasks, "side_by_side", trained)
    assert bench.end_to_end(profile).value == first.value
    assert figures.main([str(tmp_path), str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Accuracy against CPU time" in page
    assert "digits-step" in page
    assert figures.main([str(tmp_path / "none"), "page.html"]) != 0


def test_rivals_train_beside_ours_and_stay_as_they_were_tuned(
    tiny: tasks.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = Profile(partial=str(tmp_path))
    claim: Any = bench.against_baselines(profile)
    (row,) = claim.samples
    monkeypatch.setattr(tasks, "start_for", lambda *arguments: 0.9)  # costs measured differently
    assert runs.tuned_rivals(tiny, profile)[1] == row["tuning"]
    assert row["tuning"]["to"]["static_2"]["options"]["start"] < 0.9
    assert set(row["margins"]) == {"linear", "static_2", "gradient"}
    points = row["points"]
    assert row["margins"]["linear"] == pytest.approx(points["kgt_cached"] - points["linear"])


def test_rivals_are_tuned_to_the_time_of_ours_on_the_measured_seeds(
    tiny: tasks.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = functools.partial(
        tasks.Outcome, accuracy=0.5, evaluation_s=0.0, schedule=[], hit_rate=0.0, cache_bytes=0,
        steps=1, curve=[],
    )  # fmt: skip

    def trained(task: Any, methods: Any, seed: int, **options: Any) -> dict[str, tasks.Outcome]:
        spent = {"vanilla": 10.0, "kgt_cached": 4.0 + seed, "gradient_6": 5.0}
        return {m: outcome(method=m, seed=seed, cpu_s=spent.get(m, 8.0)) for m in methods}

    aimed: list[tuple[str, float]] = []

    def start_for(task: Any, target: float, kind: str, upto: int = 0) -> float:
        aimed.append((kind, target))
        return 0.5

    monkeypatch.setattr(tasks, "side_by_side", trained)
    monkeypatch.setattr(tasks, "start_for", start_for)
    rivals, found = runs.tuned_rivals(tiny, Profile(name="full"))
    # Seeds 1 and 2 take 0.5 and 0.6 of vanilla; the schedules took 0.8 where 0.55 was predicted.
    assert found["target_cpu_ratio"] == 0.55
    again = pytest.approx(0.55 * 0.55 / 0.8)
    assert aimed == [("linear", 0.55), ("static", 0.55), ("linear", again), ("static", again)]
    assert rivals["gradient"].options == {"interval": tiny.steps // 6}


def test_a_staircase_shows_what_was_frozen_until_when() -> None:
    rows = [
        {"method": "kgt", "seed": 1, "schedule": [[4, 2], [8, 0]], "steps": 10, "accuracy": 0.5,
         "cpu_s": 2.0, "cpu_ratio": None, "curve": [[1.0, 0.4], [2.0, 0.5]]},
    ]  # fmt: skip
    (line,) = figures.schedule_plot({"kgt": rows}).figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [0, 4, 4, 8, 8, 10]
    assert list(line.get_ydata()) == [0, 0, 2, 2, 0, 0]
    curve, dot = figures.accuracy_plot(rows).figure.axes[0].get_lines()
    assert list(curve.get_ydata()) == [40.0, 50.0]
    assert list(dot.get_xdata()) == [2.0]


def test_pieces_are_shared_reclaimed_and_checked(tmp_path: Path) -> None:
    counts = {"a": 0, "b": 0}

    def piece(name: str) -> Piece:
        def measure() -> int:
            counts[name] += 1
            return counts[name]

        return Piece(name, {"name": name}, measure)

    both = [piece("a"), piece("b")]
    busy = (tmp_path / both[0].file).with_suffix(".busy")
    busy.write_text("999999999")  # what a process left that was killed
    assert measure_pieces(str(tmp_path), both) == [1, 1]
    assert measure_pieces(str(tmp_path), both) == [1, 1]
    assert measure_pieces("", both) == [2, 2]
    assert not list(tmp_path.glob("*.busy"))
    (tmp_path / both[0].file).write_text("{")
    with pytest.raises(DataError, match="not a kept piece"):
        measure_pieces(str(tmp_path), both)
    assert both[0].file != Piece("a", {"name": "other"}, os.getpid).file
