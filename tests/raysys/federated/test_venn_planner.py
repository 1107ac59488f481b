"""The planner: the paper's toy example, properties, the traps of the public program."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError
from raysys.federated.venn import baselines
from raysys.federated.venn.columns import RequestColumns
from raysys.federated.venn.fairness import elapsed_s, time_alone_s
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.requests import Policy, Request
from raysys.federated.venn.supply import SupplyView


def request(job: int, group: int, remaining: int, **more: float) -> Request:
    return Request(job=job, group=group, demand=remaining, remaining=remaining, **more)  # type: ignore[arg-type]


def completion_times(
    policy: Policy, requests: list[Request], arrivals: list[int], view: SupplyView
) -> dict[int, int]:
    """Arrival n (counted from 1) at time n; the plan is made anew whenever a job is done."""
    done: dict[int, int] = {}
    plan = policy.plan(requests, view, 0.0)
    for time, atom in enumerate(arrivals, start=1):
        taker = next((item for item in plan.ranking(atom) if item.remaining > 0), None)
        if taker is None:
            continue
        taker.remaining -= 1
        if taker.remaining == 0:
            done[taker.job] = time
            plan = policy.plan([item for item in requests if item.remaining], view, float(time))
    return done


# Atom 0: eligible for every job (odd arrivals); atom 1: only for Keyboard (group 0).
TOY_VIEW = SupplyView.build((0b11, 0b01), (0.5, 0.5), 2)
TOY_ARRIVALS = [0, 1] * 12


def toy() -> list[Request]:
    return [request(0, 0, 3), request(1, 1, 4), request(2, 1, 4)]


def test_toy_example_irs_reaches_the_optimum() -> None:
    done = completion_times(IRS(), toy(), TOY_ARRIVALS, TOY_VIEW)
    assert done == {0: 6, 1: 7, 2: 15}


def test_toy_example_srsf() -> None:
    done = completion_times(baselines.srsf(), toy(), TOY_ARRIVALS, TOY_VIEW)
    assert done == {0: 3, 1: 11, 2: 19}


def test_toy_example_optimum_by_brute_force() -> None:
    best = min(
        sum(completion_times(_Fixed(order), toy(), TOY_ARRIVALS, TOY_VIEW).values())
        for order in itertools.product(range(3), itertools.permutations(range(3)))
    )
    assert best == 28


class _Fixed:
    """Keyboard takes shared devices only after ``order[0]`` Emoji jobs; jobs in fixed order."""

    def __init__(self, order: tuple[int, tuple[int, ...]]) -> None:
        self.rank = {job: place for place, job in enumerate(order[1])}

    def plan(self, requests: list[Request], supply: SupplyView, now_s: float):  # type: ignore[no-untyped-def]
        return baselines.OrderedPlan(
            sorted(requests, key=lambda item: self.rank[item.job]), supply.masks
        )


def random_case(seed: int, jobs: int = 20) -> tuple[list[Request], SupplyView, list[int]]:
    """Two nested groups: every device serves group 0, half of them also group 1."""
    generator = np.random.default_rng(seed)
    requests = [
        request(job, int(generator.integers(2)), int(generator.integers(1, 21)))
        for job in range(jobs)
    ]
    arrivals = [int(atom) for atom in generator.integers(0, 2, 1500)]
    return requests, TOY_VIEW, arrivals


def test_irs_beats_srsf_on_nested_groups_on_average() -> None:
    ratios = []
    for seed in range(200):
        requests, view, arrivals = random_case(seed)
        ours = completion_times(IRS(), requests, arrivals, view)
        requests, view, arrivals = random_case(seed)
        theirs = completion_times(baselines.srsf(), requests, arrivals, view)
        ratios.append(sum(ours.values()) / sum(theirs.values()))
    assert np.mean(ratios) < 0.98


def test_one_group_equals_srsf() -> None:
    view = SupplyView.build((1,), (1.0,), 1)
    requests = [request(job, 0, 3 + job * 7 % 5) for job in range(9)]
    ours = [item.job for item in IRS().plan(requests, view, 0).ranking(0)]
    theirs = [item.job for item in baselines.srsf().plan(requests, view, 0).ranking(0)]
    assert ours == theirs


def test_exchange_moves_only_atoms_the_taker_is_eligible_for() -> None:
    # Group 1 (scarce) owns atoms 1 and 2; group 0 is not eligible for atom 2.
    view = SupplyView.build((0b01, 0b11, 0b10), (8.0, 2.0, 3.0), 2)
    requests = [request(job, 0, 50) for job in range(40)] + [request(99, 1, 500)]
    plan = IRS().plan(requests, view, 0)
    assert plan.owner == [0, 0, 1]


def test_exchange_stops_at_the_first_refusal() -> None:
    # 0 is the most abundant; 1 next; 2 the scarcest. 1 has more pressure than 0: refuse at once.
    view = SupplyView.build((0b001, 0b011, 0b101), (6.0, 3.0, 1.0), 3)
    requests = [request(0, 0, 5), *(request(job, 1, 9) for job in range(1, 6)), request(9, 2, 900)]
    plan = IRS().plan(requests, view, 0)
    assert plan.owner == [0, 1, 2]


def test_filled_requests_leave_the_plan() -> None:
    requests = toy()
    requests[0].remaining = 0
    plan = IRS().plan(requests, TOY_VIEW, 0)
    assert plan.owner == [1, -1]
    assert list(plan.ranking(1)) == []


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Request], SupplyView]:
    groups = draw(st.integers(1, 6))
    atoms = draw(st.lists(st.integers(0, 2**groups - 1), min_size=1, max_size=12, unique=True))
    rates = draw(st.lists(st.floats(0, 100), min_size=len(atoms), max_size=len(atoms)))
    size = st.tuples(st.integers(0, groups - 1), st.integers(0, 50), st.floats(0, 1000))
    raw = draw(st.lists(size, max_size=25))
    requests = [
        request(job, group, remaining, opened_s=opened_s, priority=opened_s / 1000, rounds=3)
        for job, (group, remaining, opened_s) in enumerate(raw)
    ]
    return requests, SupplyView.build(atoms, rates, groups)


CONFIGS = [
    IRSConfig(),
    IRSConfig(demand_scope="total"),
    IRSConfig(demand_scope="blend"),
    IRSConfig(eps=2),
    IRSConfig(affected="length"),
]


@settings(max_examples=150, deadline=None)
@given(problem=problems(), config=st.sampled_from(CONFIGS), seed=st.integers(0, 99))
def test_plan_properties(
    problem: tuple[list[Request], SupplyView], config: IRSConfig, seed: int
) -> None:
    requests, view = problem
    plan = IRS(config).plan(requests, view, 0)
    shuffled = list(requests)
    np.random.default_rng(seed).shuffle(shuffled)  # type: ignore[arg-type]
    again = IRS(config).plan(shuffled, view, 0)
    for atom, mask in enumerate(view.masks):
        ranked = [item.job for item in plan.ranking(atom)]
        eligible = {item.job for item in requests if item.remaining and mask >> item.group & 1}
        assert set(ranked) == eligible  # nobody eligible is left out, nobody else is let in
        assert len(ranked) == len(eligible)
        assert ranked == [item.job for item in again.ranking(atom)]
        assert plan.owner[atom] == -1 or mask >> plan.owner[atom] & 1


def test_numpy_order_equals_python_order() -> None:
    generator = np.random.default_rng(0)
    requests = [
        request(
            job,
            int(generator.integers(3)),
            int(generator.integers(1, 9)),
            opened_s=float(generator.integers(4)),
        )
        for job in range(600)
    ]
    view = SupplyView.build((1, 3, 7), (1.0, 1.0, 1.0), 3)
    plan = IRS().plan(requests, view, 0)
    for group, order in plan.order.items():
        mine = [item for item in requests if item.group == group]
        assert order == sorted(mine, key=lambda item: (item.remaining, item.opened_s, item.job))


def test_large_eps_puts_the_latest_against_its_fair_share_first() -> None:
    requests = [request(job, 0, 1 + job, rounds=10) for job in range(4)]
    for item, registered_s in zip(requests, (900.0, 700.0, 0.0, 100.0)):
        item.registered_s = registered_s
    view = SupplyView.build((1,), (1.0,), 1)
    late = {item.job: elapsed_s(item, view, 1000) / time_alone_s(item, view) for item in requests}
    plan = IRS(IRSConfig(eps=50)).plan(requests, view, 1000)
    order = [item.job for item in plan.ranking(0)]
    assert order == sorted(late, key=lambda job: -late[job])
    assert order != [item.job for item in IRS().plan(requests, view, 1000).ranking(0)]
    extreme = IRS(IRSConfig(eps=100)).plan(requests, view, 1e12)  # equal waits: the smallest
    assert next(extreme.ranking(0)).job == 0


@pytest.mark.parametrize("eps", [0.5, 1.0, 2.0, 4.0])
def test_a_late_group_gains_queue(eps: float) -> None:
    view = SupplyView.build((0b01, 0b11), (1.0, 1.0), 2)
    young = [request(job, 1, 10, rounds=10) for job in range(3)]
    late = [request(job, 0, 10, rounds=10) for job in range(3, 6)]
    for item in young:
        item.registered_s = 5000.0
    pure = IRS(IRSConfig()).plan([*young, *late], view, 10_000)
    fair = IRS(IRSConfig(eps=eps)).plan([*young, *late], view, 10_000)
    assert pure.owner == [0, 1]
    assert fair.owner == [0, 0]


def test_least_attained_and_round_robin_and_fifo_orders() -> None:
    requests = [request(job, 0, demand) for job, demand in enumerate((9, 1, 4))]
    requests[0].rounds_done, requests[1].rounds_done, requests[2].rounds_done = 1, 2, 0
    requests[0].registered_s, requests[1].registered_s, requests[2].registered_s = 5.0, 2.0, 3.0
    view = SupplyView.build((1,), (1.0,), 1)

    def order(policy: Policy) -> list[int]:
        return [item.job for item in policy.plan(requests, view, 0).ranking(0)]

    assert order(baselines.least_attained()) == [2, 1, 0]
    assert order(baselines.round_robin()) == [2, 0, 1]
    assert order(baselines.fifo()) == [1, 2, 0]


def test_config_is_checked() -> None:
    with pytest.raises(ConfigError, match="demand_scope"):
        IRSConfig(demand_scope="week")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="eps"):
        IRSConfig(eps=float("nan"))


@settings(max_examples=60, deadline=None)
@given(problem=problems(), scope=st.sampled_from(["round", "total", "blend"]))
def test_planning_over_columns_is_the_same_plan(
    problem: tuple[list[Request], SupplyView], scope: str
) -> None:
    requests, view = problem
    planner = IRS(IRSConfig(demand_scope=scope))  # type: ignore[arg-type]
    plan = planner.plan(requests, view, 0)
    columns = planner.plan_columns(RequestColumns.of(requests), view)
    assert columns.owner == plan.owner
    assert columns.scarcity == plan.scarcity
    for group, (low, high) in columns.spans.items():
        assert [requests[row] for row in columns.rows[low:high]] == plan.order[group]
    with pytest.raises(ConfigError, match="eps"):
        IRS(IRSConfig(eps=1)).plan_columns(RequestColumns.of(requests), view)
