"""Coverage against brute force, the noise estimate on made-up margins, and the beta search."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.errors import ConfigError, InfeasibleError
from raysys.training.ccs.auto_beta import (
    AutoBetaConfig,
    BetaPlan,
    BetaTrial,
    choose_beta,
    plan_beta_trials,
)
from raysys.training.ccs.coverage import coverage, nearest_distances
from raysys.training.ccs.noise import combine, estimate_noise, relabel, threshold_halves
from raysys.training.ccs.table import ScoreTable


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_distances_match_brute_force_in_double(offset: float) -> None:
    """Far from the origin the expanded square alone would lose all its digits."""
    rng = np.random.default_rng(0)
    kept = (rng.normal(size=(700, 16)) + offset).astype(np.float32)
    targets = (rng.normal(size=(333, 16)) + offset).astype(np.float32)
    full = np.linalg.norm(targets[:, None].astype(float) - kept[None].astype(float), axis=2)
    found = nearest_distances(kept, targets, block_bytes=4 * 256 * 256)
    np.testing.assert_allclose(found, full.min(1), rtol=1e-4)


def test_coverage_by_hand_and_of_itself() -> None:
    kept = np.asarray([[0.0], [10.0]], np.float32)
    targets = np.asarray([[1.0], [2.0], [9.0], [14.0]], np.float32)
    found = coverage(kept, targets)
    assert found.auc_pr == pytest.approx(2.0)
    assert found.radius[1.0] == pytest.approx(4.0)
    assert found.radius[0.5] == pytest.approx(2.0)
    assert coverage(kept, kept).auc_pr == 0
    with pytest.raises(ConfigError, match="not empty"):
        coverage(kept[:0], targets)
    with pytest.raises(ConfigError, match="not empty"):
        coverage(kept, np.zeros((3, 2), np.float32))


def test_auc_pr_is_the_area_under_the_p_r_curve() -> None:
    rng = np.random.default_rng(1)
    kept, targets = rng.normal(size=(2, 400, 3)).astype(np.float32)
    distances = np.sort(nearest_distances(kept, targets))
    area = float(np.sum(distances) / len(distances))  # r(p) is a step of height r_i, width 1/n
    assert coverage(kept, targets).auc_pr == pytest.approx(area)


def test_noise_estimate_finds_planted_labels() -> None:
    rng = np.random.default_rng(0)
    ids = np.arange(5000)
    wrong = rng.random(5000) < 0.2
    halves = threshold_halves(ids, classes=10)
    assert len(np.intersect1d(*halves)) == 0
    estimates = []
    for fake in halves:
        bad = wrong | np.isin(ids, fake)  # no network learns either
        aum = np.where(bad, rng.normal(-0.5, 0.1, 5000), rng.normal(0.6, 0.2, 5000))
        estimates.append(estimate_noise(ids, aum, fake))
    both = combine(*estimates)
    assert both.rate == pytest.approx(0.2, abs=0.03)
    found = np.isin(ids, both.suspects)
    assert found[wrong].mean() > 0.95
    assert found[~wrong].mean() < 0.03


def test_noise_estimate_edges() -> None:
    ids = np.arange(6)
    np.testing.assert_array_equal(
        relabel(ids, np.zeros(6, int), np.asarray([2, 4]), 3), [0, 0, 3, 0, 3, 0]
    )
    with pytest.raises(ConfigError, match="at least 7"):
        threshold_halves(ids, classes=6)
    with pytest.raises(ConfigError, match="percentile"):
        estimate_noise(ids, np.zeros(6), ids[:2], percentile=0)
    with pytest.raises(ConfigError, match="some of"):
        estimate_noise(ids, np.zeros(6), ids)


def make_table(rows: int = 1000) -> ScoreTable:
    return ScoreTable(np.arange(rows), {"aum": np.random.default_rng(0).normal(size=rows)})


def test_trials_never_see_what_they_are_judged_on() -> None:
    plan = plan_beta_trials(make_table(), 200, AutoBetaConfig(min_holdout=0, seed=3))
    assert len(plan.holdout_ids) == 50
    for trial in plan.trials:
        assert len(trial.ids) == 200
        assert not np.isin(trial.ids, plan.holdout_ids).any()
    assert {trial.beta for trial in plan.trials} == {0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4}
    assert len(AutoBetaConfig().betas) * 2 == len(plan.trials)


def test_infeasible_candidates_are_passed_over() -> None:
    config = AutoBetaConfig(betas=(0.0, 0.4), min_holdout=0)
    plan = plan_beta_trials(make_table(), 700, config)
    assert {trial.beta for trial in plan.trials} == {0.0}
    with pytest.raises(InfeasibleError, match="held out"):
        plan_beta_trials(make_table(), 960, config)


def plan_of(betas: list[float], repeats: int) -> BetaPlan:
    trials = [BetaTrial(beta, r, np.arange(3)) for beta in betas for r in range(repeats)]
    return BetaPlan(tuple(trials), np.arange(100))


def test_the_middle_of_the_plateau_wins() -> None:
    plan = plan_of([0.0, 0.1, 0.2, 0.3, 0.4], 2)
    runs = [0.50, 0.51, 0.80, 0.82, 0.81, 0.81, 0.79, 0.82, 0.60, 0.61]
    choice = choose_beta(plan, runs)
    assert choice.plateau == (0.1, 0.2, 0.3)
    assert choice.beta == 0.2
    assert choice.accuracy[0.2] == pytest.approx(0.81)


def test_a_clear_winner_wins_and_a_single_repeat_takes_the_best() -> None:
    plan = plan_of([0.0, 0.1, 0.2], 2)
    assert choose_beta(plan, [0.1, 0.11, 0.2, 0.21, 0.9, 0.91]).beta == 0.2
    assert choose_beta(plan_of([0.0, 0.1], 1), [0.5, 0.5]).beta == 0.0
    with pytest.raises(ConfigError, match="one per trial"):
        choose_beta(plan, [0.1])
    with pytest.raises(ConfigError, match="finite"):
        choose_beta(plan, [0.1, 0.2, 0.3, 0.4, 0.5, float("nan")])


@pytest.mark.parametrize(
    "bad", [{"betas": ()}, {"betas": (0.2, 0.1)}, {"betas": (1.0,)}, {"holdout": 0}, {"repeats": 0}]
)
def test_bad_searches(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        AutoBetaConfig(**bad)  # type: ignore[arg-type]
