"""Auxo's parts: tree, records, rewards, clustering, placement; worked examples and bad input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from raysys.errors import ConfigError
from raysys.federated.auxo.affinity import AffinityEntry, AffinityRecord, AffinityTable
from raysys.federated.auxo.anchor import AnchorView
from raysys.federated.auxo.clustering import (
    adjusted_rand,
    kmeans,
    leave_one_out,
    split_half_stability,
    unit_rows,
)
from raysys.federated.auxo.cohort import Cohort
from raysys.federated.auxo.config import AuxoConfig, RuleConfig, published
from raysys.federated.auxo.evidence import SignalSpace, dispersion, dispersion_terms
from raysys.federated.auxo.placement import DECLINED, make_quotas
from raysys.federated.auxo.rewards import feedback, updated_rewards
from raysys.federated.auxo.tree import CohortTree

PRINTED = RuleConfig(propagation="printed", scale="mean_std", loss_evidence=False)


def paper_tree() -> tuple[CohortTree, dict[str, int]]:
    """Leaves 0.0.0, 0.0.1 and 0.1 of the paper's example."""
    tree = CohortTree()
    first = tree.split(0, 2, 1)
    tree.split(first[0], 2, 2)
    return tree, {tree.name(leaf): leaf for leaf in tree.leaves}


def blobs(groups: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.standard_normal((32, 32)))[0][:groups]
    labels = np.arange(80) % groups
    return centres[labels] + noise * rng.standard_normal((80, 32)), labels


def test_a_failure_lowers_near_cohorts_more_than_far_ones() -> None:
    tree, name = paper_tree()
    assert set(name) == {"0.0.0", "0.0.1", "0.1"}
    before, reward = np.zeros((1, 5)), np.array([-3.0])
    after = updated_rewards(before, name["0.0.1"], reward, tree, 0.2, PRINTED)[0]
    assert after[name["0.0.0"]] == pytest.approx(-1.5)
    assert after[name["0.1"]] == pytest.approx(-1.0)
    # The printed weights leave the failed cohort in front; ours make the far one the next to try.
    assert after[name["0.0.1"]] > after[name["0.1"]]
    ours = updated_rewards(before, name["0.0.1"], reward, tree, 0.2, RuleConfig())[0]
    order = sorted(name, key=lambda n: -ours[name[n]])
    assert order == ["0.1", "0.0.0", "0.0.1"]


def test_a_success_lifts_no_other_cohort_and_members_are_judged_by_their_own() -> None:
    tree, name = paper_tree()
    before = np.zeros((1, 5))
    lifted = updated_rewards(before, name["0.1"], np.array([0.5]), tree, 0.2, RuleConfig())[0]
    assert lifted[name["0.0.0"]] == 0.0
    before[0, name["0.1"]] = 0.3
    after = updated_rewards(before, name["0.0.0"], np.array([-9.0]), tree, 0.2, RuleConfig())[0]
    assert after[name["0.1"]] == pytest.approx(0.3)


def test_rewards_stay_bounded() -> None:
    tree, name = paper_tree()
    for rules in (RuleConfig(), PRINTED):
        values = np.zeros((2, 5))
        for _ in range(2000):
            values = updated_rewards(values, name["0.1"], np.array([-1e30, 1.0]), tree, 0.2, rules)
        assert values.min() >= -10
        assert values.max() <= 1


@pytest.mark.parametrize("rules", [RuleConfig(), PRINTED])
def test_feedback_prefers_members_and_survives_degenerate_rounds(rules: RuleConfig) -> None:
    rng = np.random.default_rng(0)
    sketch = rng.standard_normal((12, 8)) * 0.1
    sketch[8:] += 5.0
    member = np.arange(12) < 8
    found = feedback(sketch, np.ones(12), member, dataclasses.replace(rules, scale="robust"))
    assert (found.reward[8:] < -1).all()
    assert (found.reward[:8] > 0).mean() > 0.7
    for odd in (np.zeros((5, 4)), np.ones((1, 4)), np.full((3, 4), 1e30)):
        got = feedback(odd, np.full(len(odd), np.nan), np.zeros(len(odd), dtype=bool), rules)
        assert np.isfinite(got.reward).all()


def test_unit_rows_of_equal_or_zero_updates_are_zero() -> None:
    assert not unit_rows(np.ones((4, 3))).any()
    assert not unit_rows(np.zeros((4, 3))).any()
    assert not unit_rows(np.full((4, 3), 1e20)).any()
    rows = unit_rows(np.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]))
    assert np.allclose(np.linalg.norm(rows, axis=1), 1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40))
@settings(max_examples=40, deadline=None)
def test_adjusted_rand_agrees_with_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array(part) for part in zip(*pairs))
    assert adjusted_rand(first, second) == pytest.approx(adjusted_rand_score(first, second))


def test_clusters_are_found_and_stability_chooses_their_number() -> None:
    rng = np.random.default_rng(1)
    points, truth = blobs(4, 0.05)
    assert adjusted_rand(kmeans(unit_rows(points), 4, rng)[0], truth) == 1.0
    stable = {k: split_half_stability(unit_rows(points), k, rng) for k in range(2, 7)}
    assert max(stable, key=lambda k: stable[k]) == 4
    noise = unit_rows(rng.standard_normal((80, 32)))
    assert max(split_half_stability(noise, k, rng) for k in range(2, 7)) < 0.5
    assert split_half_stability(noise[:3], 2, rng) == 0.0


def test_the_own_update_makes_labels_of_noise_look_stable() -> None:
    rng = np.random.default_rng(2)
    kept = {own: [] for own in (False, True)}
    for _ in range(20):
        noise, labels = unit_rows(rng.standard_normal((40, 64))), rng.integers(2, size=40)
        for own, shares in kept.items():
            shares.append((leave_one_out(noise, labels, 2, own) == labels).mean())
    assert np.mean(kept[True]) > 0.85
    assert np.mean(kept[False]) < 0.6


def test_leave_one_out_with_a_lost_cluster_or_no_memory() -> None:
    points, truth = blobs(2, 0.05)
    lost = np.where(truth == 0, 0, -1)
    assert set(leave_one_out(points, lost, 2)) == {0}
    alone = np.full(80, -1)
    alone[3] = 1
    assert set(np.delete(leave_one_out(points, alone, 2), 3)) == {1}
    assert leave_one_out(points, alone, 2)[3] == 1
    assert set(leave_one_out(points, np.full(80, -1), 2)) == {-1}


def test_halves_cancel_sample_noise() -> None:
    rng = np.random.default_rng(3)
    truth = np.arange(200) % 4
    signal = 0.3 * np.linalg.qr(rng.standard_normal((64, 64)))[0][:4][truth]
    first = signal + 0.15 * rng.standard_normal((200, 64))
    second = signal + 0.15 * rng.standard_normal((200, 64))
    total, within = dispersion_terms(first, second, truth)
    found = dispersion(total, within, rng)
    assert found.usable
    assert abs(found.total - 0.09 * 0.75) < 0.05
    assert found.ratio < 0.4
    scattered = dispersion(*dispersion_terms(first, second, rng.integers(4, size=200)), rng)
    assert scattered.ratio > 0.7
    space = SignalSpace(64, 0.5)
    whole = first + second
    space.add(unit_rows(whole), first, whole)
    points = space.project(unit_rows(whole), 4)
    plain = adjusted_rand(kmeans(unit_rows(whole), 4, rng)[0], truth)
    assert adjusted_rand(kmeans(points, 4, rng)[0], truth) > plain


def test_a_dispersion_of_nothing_says_so() -> None:
    rng = np.random.default_rng(0)
    empty = dispersion(*dispersion_terms(np.zeros((1, 4)), np.zeros((1, 4)), np.array([-1])), rng)
    assert not empty.usable
    assert np.isnan(empty.ratio)


@given(
    st.dictionaries(st.integers(1, 9), st.floats(0, 1000), min_size=1, max_size=6),
    st.integers(10, 100),
    st.sampled_from(["sqrt", "equal", "arrivals"]),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_quotas_fill_the_demand_and_never_exceed_it(
    active: dict[int, float], demand: int, budget: str, seed: int
) -> None:
    quotas = make_quotas(active, demand, 10, budget, 10_000)
    if budget != "arrivals" and len(active) > 1:
        assert sum(quotas.places.values()) == demand
        assert min(quotas.places.values()) >= min(10, demand // len(active))
    rng = np.random.default_rng(seed)
    leaves = list(active)
    taken = [
        quotas.take(int(rng.choice(leaves)), int(rng.choice(leaves)), rng.random())
        for _ in range(quotas.offers)
    ]
    placed = [leaf for leaf in taken if leaf != DECLINED]
    assert len(placed) == demand
    assert quotas.take(leaves[0], leaves[0], 0.0) == DECLINED


def test_an_anchor_names_the_nearest_part_and_the_next_within_reach() -> None:
    view = AnchorView(np.zeros(2), np.eye(2), np.eye(2), np.array([0.9, 1.5]))
    updates = np.array([[3.0, 0.1], [1.0, 1.0], [-1.0, -1.0]])
    first, second = view.place(updates)
    assert first.tolist() == [0, 0, -1]
    assert second.tolist() == [1, 1, -1]
    closed = np.array([[True, False], [False, True], [True, True]])
    first, second = view.place(updates, closed)
    assert first.tolist() == [1, 0, -1]
    assert second.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("stability", "parts"),
    [
        ({2: 0.97, 3: 0.90, 4: 0.98, 5: 0.83, 6: 0.69}, 4),  # both two and four are near the best
        ({2: 0.96, 3: 0.64, 4: 0.84, 5: 0.71, 6: 0.57}, 4),  # four stand out, though two are better
        ({2: 1.0, 3: 0.89, 4: 0.83, 5: 0.75, 6: 0.62}, 2),  # ever finer cuts of two groups
        ({2: 0.42, 3: 0.55, 4: 0.93, 5: 0.85, 6: 0.6}, 4),  # not five: that cuts one group in two
        ({2: 0.5, 3: 0.79, 4: 0.4, 5: 0.4, 6: 0.3}, 0),
        ({}, 0),
    ],
)
def test_the_number_of_parts_is_one_that_stands_out(
    stability: dict[int, float], parts: int
) -> None:
    cohort = Cohort(0, None, 0, AuxoConfig(), 0)
    for k, value in stability.items():
        cohort._stability[k].extend([value] * 3)
    assert cohort._most_stable(0) == parts


def ready_to_split(stability: dict[int, float], parts: int) -> Cohort:
    """A cohort that only the size of its parts can keep from splitting."""
    cohort = Cohort(0, None, 0, AuxoConfig(), 0)
    for k, value in stability.items():
        cohort._stability[k].extend([value] * 3)
    cohort.parts = parts
    cohort._agreement.extend([1.0] * 6)
    cohort._coverage.extend([1.0] * 6)
    return cohort


def test_a_part_too_small_does_not_hold_up_the_others() -> None:
    cohort = ready_to_split({3: 0.7, 4: 0.91, 5: 0.95, 6: 0.89}, 5)
    assert cohort._most_stable(80) == 5
    sizes = np.array([90, 90, 90, 90, 20])
    for round_id in range(61, 81):
        assert cohort._most_stable(round_id) == 5
        report = cohort.decide(round_id, sizes, 1, 100.0)
        assert report.verdict == "one part would be too small"
    assert cohort._most_stable(82) == 4
    copy = Cohort(0, None, 0, AuxoConfig(), 0)
    copy.load(cohort.state())
    assert copy._most_stable(82) == 4
    assert cohort._most_stable(120) == 5


def test_a_small_part_waits_where_no_other_number_of_parts_is_stable() -> None:
    cohort = ready_to_split({2: 0.95, 3: 0.5}, 2)
    for round_id in range(60):
        assert not cohort.decide(round_id, np.array([95, 5]), 1, 100.0).go
        assert cohort._most_stable(round_id) == 2


def test_a_long_sketch_gives_the_same_directions_and_forgets_those_of_a_split() -> None:
    rng = np.random.default_rng(5)
    axes = np.linalg.qr(rng.standard_normal((600, 3)))[0].T
    strength = np.array([3.0, 2.0, 1.0]) * rng.standard_normal((200, 3))
    units = unit_rows(strength @ axes + 0.01 * rng.standard_normal((200, 600)))
    space = SignalSpace(600, 0.5)
    space.add(units, None, units)
    whole = np.linalg.eigh(space.cross.astype(np.float64))[1][:, ::-1][:, :3]
    assert np.allclose(np.abs(whole.T @ space.basis(3)), np.eye(3), atol=1e-3)
    rest = space.without(axes[:1])
    assert np.abs(axes[0] @ rest.basis(2)).max() < 1e-3
    assert np.linalg.norm(axes[1:] @ rest.basis(2)) == pytest.approx(2**0.5, rel=0.02)


def test_requests_for_cohorts_that_split_merged_or_never_were() -> None:
    tree, name = paper_tree()
    inner = tree.nodes[name["0.0.0"]].parent
    labels = np.array([0, 1, -1, -1, -1])
    assert tree.resolve(0, labels, 7) == name["0.0.1"]
    assert tree.resolve(inner, labels, 7) == name["0.0.1"]
    assert tree.resolve(999, labels, 7) == name["0.0.1"]
    assert tree.resolve(-5, [], 3) in tree.leaves
    assert tree.resolve(0, np.array([9]), 1) in tree.leaves  # a label that was never given
    tree.merge(name["0.0.1"], name["0.0.0"])
    assert tree.resolve(name["0.0.1"], labels, 0) == name["0.0.0"]
    assert tree.nearest_leaf(name["0.0.0"]) == name["0.1"]
    with pytest.raises(ConfigError, match="leaf"):
        tree.split(0, 2, 5)
    with pytest.raises(ConfigError, match="leaves"):
        tree.merge(0, 0)
    again = CohortTree()
    again.load(tree.state())
    assert again.nodes == tree.nodes


def test_records_from_outside_are_cleaned() -> None:
    table = AffinityTable(10)
    table.add_cohorts(2)
    future = AffinityRecord(entries=(AffinityEntry(cohort=1, reward=0.5),), round_id=99)
    assert not table.accept(3, future, 5)
    assert not table.known(np.array([3]))[0]
    bad = AffinityRecord(
        entries=(
            AffinityEntry(cohort=0, reward=float("nan")),
            AffinityEntry(cohort=7, reward=0.5),
            AffinityEntry(cohort=1, reward=1e9, label=1),
            AffinityEntry(cohort=2, reward=0.1, label=400),
        ),
        round_id=4,
    )
    assert not table.accept(3, bad, 5)
    assert table.rewards(np.array([3]))[0].tolist() == [0.0, 1.0, 0.0]
    assert table.accept(3, table.record(3), 6)
    assert table.record(8) == AffinityRecord()
    table.set_rewards(np.array([4]), np.full((1, 3), np.nan), 6)
    assert table.rewards(np.array([4])).tolist() == [[0.0, 0.0, 0.0]]


def test_records_expire_the_longest_unseen_first_and_survive_a_checkpoint() -> None:
    table = AffinityTable(100, max_records=8)
    for round_id in range(12):
        table.set_rewards(np.array([round_id]), np.array([[round_id / 20]]), round_id)
    assert table.used <= 8
    assert table.known(np.array([11]))[0]
    assert not table.known(np.array([0]))[0]
    assert table.rewards(np.array([11, 0])).tolist() == [[pytest.approx(0.55)], [0.0]]
    table.forget(np.array([11]))
    assert table.rewards(np.array([11])).tolist() == [[0.0]]
    copy = AffinityTable(100, max_records=8)
    copy.load(table.state())
    for name, value in table.state().items():
        assert np.array_equal(value, copy.state()[name]), name


def test_three_strikes_of_four_block() -> None:
    table = AffinityTable(5)
    client = np.array([2])
    blocked = [table.strike(client, np.array([hit]), 0).tolist() for hit in (1, 0, 1, 1, 1)]
    assert blocked == [[], [], [], [2], []]
    assert table.blocked(np.arange(5)).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma": 0.0}, {"gamma": 1.5}, {"gamma": float("nan")}, {"eps_0": -0.1}, {"k_max": 1},
        {"p_min": 1}, {"budget": "lottery"}, {"sketch_dim": 1}, {"max_records": 0},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        AuxoConfig(**changes)


def test_rules_are_checked_and_a_budget_below_one_cohort_refused() -> None:
    for name in ("features", "k_choice", "gate", "scale", "propagation"):
        with pytest.raises(ConfigError, match=name):
            RuleConfig(**{name: "other"})
    with pytest.raises(ConfigError, match="p_min"):
        AuxoConfig().check_budget(5)
    assert published().rules.features == "raw"
