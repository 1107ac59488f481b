"""Requirements, supply, credits, leases, assignment, pacing, tiers: by hand and by property."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError
from raysys.federated.venn.assignment import assign
from raysys.federated.venn.atoms import merge_rare
from raysys.federated.venn.credits import Grant, apportion
from raysys.federated.venn.explain import why
from raysys.federated.venn.irs import IRS
from raysys.federated.venn.leases import LeaseTable
from raysys.federated.venn.pacing import jittered, retry_after_s
from raysys.federated.venn.requests import Request
from raysys.federated.venn.requirements import Requirement, RequirementCompiler, Schema
from raysys.federated.venn.supply import SupplyConfig, SupplyEstimator, SupplyView
from raysys.federated.venn.tiers import (
    TieredPolicy,
    TierMatcher,
    TierProfile,
    meets_deadline,
    should_restrict,
)

bounds = st.dictionaries(st.sampled_from(["cpu", "mem", "os"]), st.integers(-3, 3), max_size=3)


@settings(max_examples=100, deadline=None)
@given(
    requirements=st.lists(bounds, min_size=1, max_size=80),
    devices=st.lists(st.tuples(*[st.integers(-4, 4)] * 3), min_size=1, max_size=30),
)
def test_masks_equal_the_definition(
    requirements: list[dict[str, int]], devices: list[tuple[int, int, int]]
) -> None:
    compiler = RequirementCompiler(Schema())
    bits = [compiler.add(Requirement.from_mapping(item)) for item in requirements]
    masks, index = compiler.masks(np.asarray(devices, dtype=np.float32).T)
    for device, place in zip(devices, index):
        have = dict(zip(("cpu", "mem", "os"), device))
        for requirement, bit in zip(requirements, bits):
            fits = all(have[name] >= bound for name, bound in requirement.items())
            assert (masks[place] >> bit & 1) == fits


def test_equal_requirements_are_one_group_and_5000_groups_work() -> None:
    compiler = RequirementCompiler(Schema())
    assert compiler.add(Requirement.of(cpu=1, mem=2)) == compiler.add(Requirement.of(mem=2, cpu=1))
    many = RequirementCompiler(Schema(attributes=("cpu",)))
    many._bits = {Requirement.of(cpu=value): value for value in range(4999)}
    many.add(Requirement.of(cpu=4999))
    masks, index = many.masks([[-1.0, 10.5, 9e9]])
    assert [masks[i].bit_count() for i in index] == [0, 11, 5000]


def test_requirement_errors_name_the_attribute() -> None:
    compiler = RequirementCompiler(Schema())
    with pytest.raises(ConfigError, match=r"requirement\.gpu"):
        compiler.add(Requirement.of(gpu=1))
    with pytest.raises(ConfigError, match=r"requirement\.cpu"):
        Requirement.of(cpu=float("nan"))
    for columns, field in [
        ([[1], [1]], "columns"),
        ([[1], [1, 2], [1]], r"columns\.mem"),
        ([[1], [np.inf], [1]], r"columns\.mem"),
    ]:
        with pytest.raises(ConfigError, match=field):
            compiler.masks(columns)
    with pytest.raises(ConfigError, match=r"schema\.attributes"):
        Schema(attributes=("a", "a"))


@given(
    masks=st.lists(st.integers(0, 255), min_size=1, max_size=40, unique=True),
    limit=st.integers(1, 20),
)
def test_merged_atoms_only_hide_eligibility(masks: list[int], limit: int) -> None:
    rates = [1.0 + index for index in range(len(masks))]
    kept, merged, folded = merge_rare(masks, rates, limit)
    assert len(kept) <= limit + 1
    assert sum(merged) == pytest.approx(sum(rates))
    assert folded == max(len(masks) - limit, 0)
    for bit in range(8):
        before = sum(rate for mask, rate in zip(masks, rates) if mask >> bit & 1)
        after = sum(rate for mask, rate in zip(kept, merged) if mask >> bit & 1)
        assert after <= before + 1e-9


def test_supply_window_forgets_and_decay_fades() -> None:
    window = SupplyEstimator(SupplyConfig(window_s=3600, min_samples=0))
    decay = SupplyEstimator(SupplyConfig(estimator="decay", window_s=3600, min_samples=0))
    for estimator in (window, decay):
        for minute in range(120):
            estimator.observe({1: 6, 3: 12}, 60.0 * minute)
        assert estimator.rates([1, 3], 7200.0) == pytest.approx([0.1, 0.2], rel=0.05)
        assert estimator.rates([7], 7200.0) == [0.0]
    assert window.rates([1], 7200.0 + 3700.0) == [0.0]
    assert 0 < decay.rates([1], 7200.0 + 3600.0)[0] < 0.1 / 2


def test_supply_of_last_checkins_follows_fast() -> None:
    estimator = SupplyEstimator(SupplyConfig(estimator="last_n", last_n=100, min_samples=0))
    for second in range(1000):
        estimator.observe({1 if second < 500 else 2: 1}, float(second))
    assert estimator.rates([1, 2], 1000.0) == pytest.approx([0.0, 1.0], rel=0.02)


def test_cold_start_prior_gives_every_known_atom_supply() -> None:
    estimator = SupplyEstimator()
    assert estimator.rates([1, 2], 0.0) == pytest.approx([0.5, 0.5])
    estimator.observe({1: 50}, 0.0)
    rates = estimator.rates([1, 2], 100.0)
    assert sum(rates) == pytest.approx(0.5)
    assert rates[0] == pytest.approx(3 * rates[1])
    with pytest.raises(ConfigError, match="counts"):
        estimator.observe({1: -1}, 1.0)


@given(
    total=st.integers(0, 10_000),
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=40),
)
def test_apportion_sums_and_stays_within_one(total: int, weights: list[float]) -> None:
    parts = apportion(total, weights)
    assert sum(parts) == total
    mass = sum(weights)
    if mass > 1e-300:
        for part, weight in zip(parts, weights):
            assert abs(part - total * weight / mass) <= 1 + 1e-6


def test_apportion_refuses_nonsense() -> None:
    assert apportion(0, []) == []
    for total, weights in [(-1, [1.0]), (1, []), (1, [-1.0])]:
        with pytest.raises(ConfigError):
            apportion(total, weights)


def test_grant_ceiling_falls_only_when_confirmed() -> None:
    grant = Grant()
    grant.set_limit(10)
    grant.set_limit(4)
    assert (grant.limit, grant.ceiling) == (4, 10)
    grant.confirm(6, 0, 0, 10, grant.version - 1)  # it had not seen the lower limit yet
    assert grant.ceiling == 10
    grant.confirm(7, 1, 2, 7, grant.version)
    assert (grant.limit, grant.ceiling, grant.spent) == (7, 7, 7)
    for bad in [(6, 1, 2), (8, 1, 2), (7, 6, 2), (7, 0, 2)]:
        with pytest.raises(ConfigError, match="usage"):
            grant.confirm(*bad, 7, grant.version)


def device(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_leases_expire_renew_and_release() -> None:
    table = LeaseTable()
    counters = table.issue([device(1), device(2)], [1, 2], 100.0, 10.0, [1000.0, 105.5])
    rows = table.rows(counters, 100.0)
    assert table.expires_s[rows].tolist() == [110.0, 105.5]
    for again in ([device(1)], [device(3), device(3)]):
        with pytest.raises(ConfigError, match="device"):
            table.issue(again, 1, 101.0, 10.0, 1000.0)
    assert table.expire(105.2).tolist() == []
    assert table.expire(105.9).tolist() == [2]
    assert table.rows(counters, 106.0).tolist() == [rows[0], -1]
    assert table.rows_of([device(1), device(2)], 106.0).tolist() == [rows[0], -1]
    assert table.prolong(rows[:1], 109.0, 10.0).tolist() == [119.0]
    assert table.prolong(rows[:1], 109.0, 5.0).tolist() == [119.0]  # never shorter
    assert table.expire(115.0).tolist() == []
    table.drop(table.rows(counters[:1], 118.0))
    assert len(table) == 0
    assert table.rows(counters, 118.0).tolist() == [-1, -1]
    assert table.expire(10_000.0).tolist() == []


def test_lease_rows_are_used_again_and_counters_never() -> None:
    table, seen = LeaseTable(), set()
    for step in range(5):
        devices = [device(1500 * step + i) for i in range(1500)]
        counters = table.issue(devices, step, float(step), 0.5, 1e9)
        assert seen.isdisjoint(counters.tolist())
        seen.update(counters.tolist())
        assert table.expire(step + 0.75).tolist() == [step] * 1500
    assert len(table.live) == 2048
    foreign = np.asarray([2**63 + 5, 2**32 - 1], dtype=np.uint64)
    assert table.rows(foreign, 0.0).tolist() == [-1, -1]


@settings(max_examples=60)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["issue", "renew", "tick"]), st.floats(0.01, 30)), max_size=60
    )
)
def test_lease_heap_equals_a_plain_list(steps: list[tuple[str, float]]) -> None:
    table, truth, now_s = LeaseTable(), {}, 5.0
    for number, (action, amount) in enumerate(steps):
        if action == "issue":
            table.issue([device(number)], number, now_s, amount, 1e9)
            truth[number] = now_s + amount
        elif action == "renew" and truth:
            oldest = min(truth)
            row = table.rows_of([device(oldest)], now_s)
            if row[0] >= 0:
                table.prolong(row, now_s, amount)
                truth[oldest] = max(truth[oldest], now_s + amount)
        else:
            now_s += amount
            due = {number for number, end_s in truth.items() if end_s <= now_s}
            assert set(table.expire(now_s).tolist()) == due
            truth = {key: end_s for key, end_s in truth.items() if key not in due}


@given(
    keys=st.lists(st.integers(0, 4), min_size=1, max_size=200),
    credits=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_batch_assignment_equals_one_at_a_time(
    keys: list[int], credits: list[int], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    order = {key: generator.permutation(len(credits)).tolist() for key in range(5)}
    left = dict(enumerate(credits))
    chosen = assign(np.asarray(keys), lambda key: order[key], left)
    for job, count in enumerate(credits):
        assert (chosen == job).sum() == count - left[job]
        assert left[job] >= 0
    for key in range(5):
        mine = [place for place, value in enumerate(keys) if value == key]
        taken = [chosen[place] >= 0 for place in mine]
        assert taken == sorted(taken, reverse=True)  # earlier arrivals first
        if not all(taken):
            assert not any(left.values())


def test_pacing_is_bounded_and_jittered() -> None:
    assert retry_after_s(0, 10) == 900
    assert retry_after_s(1e9, 1) == 60
    assert 60 < retry_after_s(5000, 10) < 900
    delays = jittered(100.0, 1000, np.random.default_rng(0))
    assert delays.min() >= 80
    assert delays.max() <= 120
    assert len(np.unique(delays)) > 900


def test_tier_rule_edges() -> None:
    assert should_restrict(2, 0.44, 190.0, 100.0)
    assert not should_restrict(2, 0.44, 170.0, 100.0)  # needs c > (V-1)/(1-g) = 1.79
    assert not should_restrict(1, 0.1, 1e9, 1.0)
    assert not should_restrict(3, 1.0, 1e9, 1.0)
    assert should_restrict(2, 0.9, 50.0, 0.0)  # no wait at all: restricting costs nothing
    assert not should_restrict(2, 0.5, 0.0, 100.0)
    assert meets_deadline(2, 10.0, 30.0, 51.0)
    assert not meets_deadline(2, 10.0, 30.0, 50.0)


def test_tiers_are_learned_and_the_fast_one_gains() -> None:
    profile = TierProfile()
    generator = np.random.default_rng(0)
    classes = generator.integers(0, 12, 400)
    profile.observe(100.0, classes, 10.0 + 20.0 * classes, 2, None)
    fast, slow = profile.tier(0, 2, 12), profile.tier(1, 2, 12)
    assert fast is not None
    assert slow is not None
    assert fast[0] & slow[0] == 0
    assert fast[0] | slow[0] == (1 << 12) - 1
    assert fast[1] < 0.7
    assert slow[1] == pytest.approx(1.0)
    same = TierProfile()
    same.observe(100.0, classes, np.full(400, 50.0), 2, None)
    assert all(
        not should_restrict(2, same.tier(tier, 2, 12)[1], 1e6, 1.0)  # type: ignore[index]
        for tier in (0, 1)
    )


def test_restricted_rounds_do_not_feed_on_themselves() -> None:
    profile = TierProfile()
    profile.observe(100.0, np.zeros(50, np.int64), np.full(50, 80.0), 2, None)
    profile.observe(200.0, np.zeros(50, np.int64), np.full(50, 40.0), 2, 0.5)
    assert profile.scheduling_s == pytest.approx(100.0)
    assert profile.response_s == pytest.approx(80.0)


def test_only_heads_are_restricted_and_one_tier_changes_nothing() -> None:
    view = SupplyView.build((1,), (1.0,), 1)
    policy = TieredPolicy.of(tiers=2, classes=12, seed=1)
    requests = [Request(job, 0, 10, 10, attempt=1) for job in range(3)]
    classes = np.arange(120) % 12
    for request in requests:
        policy.round_closed(request, 0.0, classes, 10.0 + 20.0 * classes)
    restricted = set()
    for attempt in range(1, 30):
        for request in requests:
            request.attempt = attempt
        policy.plan(requests, view, 0.0)
        assert requests[1].classes == requests[2].classes == -1
        restricted.add(requests[0].classes)
    assert (1 << 6) - 1 in restricted
    matcher = TierMatcher(tiers=1)
    matcher.decide(requests[0], 1.0)
    assert requests[0].classes == -1
    with pytest.raises(ConfigError, match="classes"):
        TierMatcher(tiers=5, classes=3)


def test_explain_tells_position_pressure_and_owners() -> None:
    view = SupplyView.build((0b11, 0b01), (0.5, 0.5), 2)
    requests = [Request(0, 0, 3, 3), Request(1, 1, 4, 4), Request(2, 1, 4, 4)]
    plan = IRS().plan(requests, view, 0)
    report = why(plan, requests[2], view)
    assert (report.position, report.ahead, report.group) == (1, 4, 1)
    assert report.pressure == 4.0
    assert report.expected_fill_s == 16.0
    assert [(atom.mask, atom.owner) for atom in report.atoms] == [(0b11, 1)]
