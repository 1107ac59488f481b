"""The vectorised simulator against the event-by-event one, and semantics by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError, DataError, InfeasibleError
from raysys.federated.venn import baselines
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.requests import Policy
from raysys.federated.venn.simulator import (
    SimConfig,
    SimJob,
    SimResult,
    Trace,
    simulate,
    simulate_by_event,
)
from raysys.federated.venn.tiers import TieredPolicy

PERIOD_S = 2000.0


def small_trace(seed: int, rows: int = 300, classes: int = 1) -> Trace:
    generator = np.random.default_rng(seed)
    trace = Trace(
        start=np.sort(generator.integers(0, int(PERIOD_S), rows)).astype(float),
        online=generator.exponential(300, rows) + 20,
        compute=generator.choice([0.3, 1.0, 2.0], rows),
        comm=generator.exponential(1.0, rows) + 0.1,
        atom=generator.integers(0, 4, rows),
        masks=(0b001, 0b011, 0b101, 0b111),
        period_s=PERIOD_S,
    )
    return trace if classes == 1 else trace.with_speed_classes(classes)


def small_jobs(seed: int, buffered: bool = False) -> list[SimJob]:
    generator = np.random.default_rng(seed + 1000)
    return [
        SimJob(
            group=int(generator.integers(0, 3)),
            participants=int(generator.integers(1, 12)),
            rounds=int(generator.integers(1, 6)),
            arrival_s=float(generator.integers(0, 500)),
            deadline_s=float(generator.integers(100, 500)),
            kind="buffered" if buffered and index % 2 else "sync",
            buffer=3,
        )
        for index in range(6)
    ]


def outcome(result: SimResult) -> list[dict[str, object]]:
    return [dataclasses.asdict(job) for job in result.jobs]


POLICIES = {
    "random": baselines.random_per_request,
    "fifo": baselines.fifo,
    "fifo by request": baselines.fifo_by_request,
    "srsf": baselines.srsf,
    "srsf total": baselines.srsf_total,
    "least attained": baselines.least_attained,
    "round robin": baselines.round_robin,
    "irs": IRS,
    "irs total": lambda: IRS(IRSConfig(demand_scope="total")),
    "irs fair": lambda: IRS(IRSConfig(eps=2.0)),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("delay_s", [0.0, 2.0])
def test_vectorised_agrees_with_reference_to_the_device(name: str, delay_s: float) -> None:
    for seed in range(5):
        config = SimConfig(repeats=40, delay_s=delay_s, seed=seed, supply_refresh_s=300)
        arguments = (small_trace(seed), small_jobs(seed))
        fast = simulate(*arguments, POLICIES[name](), config)
        slow = simulate_by_event(*arguments, POLICIES[name](), config)
        assert outcome(fast) == outcome(slow)
        assert fast.finished


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_both_agree_with_tier_matching(classes: int) -> None:
    for seed in range(4):
        trace = small_trace(seed, classes=12)
        config = SimConfig(repeats=40, seed=seed)

        def policy(seed: int = seed) -> Policy:
            return TieredPolicy.of(IRS(), tiers=classes, classes=12, seed=seed)

        fast = simulate(trace, small_jobs(seed), policy(), config)
        slow = simulate_by_event(trace, small_jobs(seed), policy(), config)
        assert outcome(fast) == outcome(slow)


@pytest.mark.parametrize("rule", ["target", "released"])
def test_both_agree_on_buffered_jobs_and_success_rules(rule: str) -> None:
    for seed in range(6):
        config = SimConfig(repeats=40, seed=seed, success_rule=rule)  # type: ignore[arg-type]
        arguments = (small_trace(seed), small_jobs(seed, buffered=True))
        fast = simulate(*arguments, baselines.srsf(), config)
        slow = simulate_by_event(*arguments, baselines.srsf(), config)
        assert outcome(fast) == outcome(slow)
        assert all(job.rounds_done > 0 for job in fast.jobs)


def test_both_agree_on_a_static_partition() -> None:
    trace = small_trace(3).with_random_classes(3, seed=1)
    policy = baselines.StaticPartition(3)
    config = SimConfig(repeats=60)
    fast = simulate(trace, small_jobs(3), policy, config)
    slow = simulate_by_event(trace, small_jobs(3), policy, config)
    assert outcome(fast) == outcome(slow)


def one_stream(times: list[float], online_s: float = 1e6) -> Trace:
    count = len(times)
    ones = np.ones(count)
    zeros = np.zeros(count, dtype=np.int64)
    return Trace(np.asarray(times), online_s * ones, ones, ones, zeros, (1,), period_s=1000.0)


def test_one_round_by_hand() -> None:
    job = SimJob(group=0, participants=4, rounds=1, arrival_s=10, work_s=30, comm_s=10)
    result = simulate(
        one_stream([5, 12, 20, 33, 41, 60]), [job], baselines.fifo(), SimConfig(delay_s=0)
    )
    # Devices at 12, 20, 33, 41; ceil(0.8 * 4) = 4 answers, the last at 41 + 30 + 2 * 10.
    assert result.jobs[0].finish_s == 91
    assert result.jobs[0].queueing_s == 31
    assert result.jobs[0].response_s == 50
    assert (result.jobs[0].assigned, result.jobs[0].answered) == (4, 4)


def test_abort_and_restart_by_hand() -> None:
    job = SimJob(group=0, participants=2, rounds=1, deadline_s=120)
    result = simulate(
        one_stream([10, 150, 160, 170]), [job], baselines.fifo(), SimConfig(delay_s=0)
    )
    # The first attempt ends at 120 with one device, the second takes 150 and 160.
    assert result.jobs[0].aborted == 1
    assert result.jobs[0].finish_s == 160 + 50


def test_devices_that_go_offline_do_not_answer() -> None:
    trace = one_stream([10, 20], online_s=40.0)
    result = simulate(
        trace, [SimJob(group=0, participants=2, rounds=1)], baselines.fifo(), SimConfig(repeats=3)
    )
    assert not result.finished
    assert result.jobs[0].failed == result.jobs[0].assigned > 0
    with pytest.raises(InfeasibleError, match="did not finish"):
        result.mean_jct_s()


def test_per_device_random_needs_the_reference() -> None:
    with pytest.raises(ConfigError, match="policy"):
        simulate(small_trace(0), small_jobs(0), baselines.RandomPerDevice())
    result = simulate_by_event(
        small_trace(0), small_jobs(0), baselines.RandomPerDevice(), SimConfig(repeats=60)
    )
    assert result.finished


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="deadline_s"):
        SimJob(group=0, participants=1, rounds=1, deadline_s=49)
    with pytest.raises(ConfigError, match="participants"):
        SimJob(group=0, participants=0, rounds=1)
    with pytest.raises(ConfigError, match="fraction"):
        SimConfig(fraction=1.1)
    with pytest.raises(InfeasibleError, match="no device"):
        simulate(small_trace(0), [SimJob(group=9, participants=1, rounds=1)], baselines.fifo())
    with pytest.raises(DataError, match="not sorted"):
        one_stream([3, 2])
    with pytest.raises(DataError, match="no check-ins"):
        one_stream([])
    with pytest.raises(ConfigError, match="period_s"):
        one_stream([2000])
    with pytest.raises(ConfigError, match="jobs"):
        simulate(small_trace(0), [], baselines.fifo())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(POLICIES)))
def test_never_more_devices_than_asked_for(seed: int, name: str) -> None:
    jobs = small_jobs(seed)
    result = simulate(small_trace(seed), jobs, POLICIES[name](), SimConfig(repeats=20, seed=seed))
    for job, spec in zip(result.jobs, jobs):
        attempts = job.rounds_done + job.aborted + 1
        assert job.assigned <= spec.participants * attempts
        assert job.answered + job.failed + job.late <= job.assigned


def test_same_seed_same_result_and_repetition_is_seamless() -> None:
    trace, jobs = small_trace(7), small_jobs(7)
    first = simulate(trace, jobs, IRS(), SimConfig(repeats=40, seed=5))
    again = simulate(small_trace(7), jobs, IRS(), SimConfig(repeats=40, seed=5))
    assert outcome(first) == outcome(again)
    tripled = Trace(
        start=np.concatenate([trace.start + PERIOD_S * k for k in range(3)]),
        online=np.tile(trace.online, 3),
        compute=np.tile(trace.compute, 3),
        comm=np.tile(trace.comm, 3),
        atom=np.tile(trace.atom, 3),
        masks=trace.masks,
        period_s=3 * PERIOD_S,
    )
    unrolled = simulate(tripled, jobs, IRS(), SimConfig(repeats=14, seed=5))
    assert outcome(first) == outcome(unrolled)
