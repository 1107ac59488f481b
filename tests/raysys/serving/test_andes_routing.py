"""Routing over replicas, scaling by QoE, and the reading speed that nobody exceeds."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError
from raysys.serving.andes.gain import buffer_s
from raysys.serving.andes.load import replica_load
from raysys.serving.andes.models import StepTime
from raysys.serving.andes.routing import (
    ReplicaLoad,
    RoutingConfig,
    SentRequests,
    added_loss,
    expected_loss,
    load_from_dict,
    load_to_dict,
    rank_replicas,
)
from raysys.serving.andes.scaling import ReplicaReading, ScalingConfig, desired_replicas
from raysys.serving.andes.snapshot import limit_speed
from raysys.serving.andes.spec import QoESpec
from raysys.serving.andes.table import RequestTable

FAST = StepTime(base_s=0.05, per_sequence_s=0.0005, per_prefill_token_s=1 / 8000)
SLOW = StepTime(base_s=0.20, per_sequence_s=0.002, per_prefill_token_s=1 / 2000)
SPEC = QoESpec(ttft_s=1.0, tds=4.0)
CONFIG = RoutingConfig()


def load(readers: int = 0, step_time: StepTime = FAST, **more: float) -> ReplicaLoad:
    """A replica with room for ten contexts of 100 tokens."""
    values = {
        "capacity_tokens": 1000.0, "max_batch": 64, "readers": readers,
        "demand_tds": 4.0 * readers, "context_tokens": 100.0 * readers, **more,
    }  # fmt: skip
    return ReplicaLoad(step_time=step_time, **values)


def test_speed_is_that_of_the_batch_that_fits() -> None:
    # Room for 10 sequences of 100 tokens: 10 / (0.05 + 10 * 0.0005) = 181.8 tokens/s.
    assert load(40).speed() == pytest.approx(10 / 0.055)
    assert load(40).utilisation == pytest.approx(160 * 0.055 / 10)
    assert load(40, max_batch=4).speed() == pytest.approx(4 / 0.052)


def test_loss_of_a_shortage_is_the_closed_form() -> None:
    # 90 readers take 360 tokens/s of 181.8: a share of 0.505, QoE 1 / (2 - 0.505) each.
    share = (10 / 0.055) / 360.0
    expected = 90 * (1 - 1 / (2 - share))
    assert expected_loss(load(90), 30.0) == pytest.approx(expected)
    assert expected_loss(load(10), 30.0) == 0.0
    # Unread text bridges the shortage.
    assert expected_loss(load(90, unread_tokens=30.0 * 180.0), 30.0) == pytest.approx(0.0, abs=0.1)


def test_where_nobody_loses_the_least_used_replica_gets_it() -> None:
    assert rank_replicas([load(3), load(1)], SPEC, 100.0, CONFIG) == [1, 0]
    # Three readers on the fast one are a lower utilisation than one on a machine four times slower.
    assert rank_replicas([load(1, SLOW), load(2)], SPEC, 100.0, CONFIG) == [1, 0]


def test_readers_on_a_crowded_replica_are_spared() -> None:
    assert rank_replicas([load(80), load(30)], SPEC, 100.0, CONFIG) == [1, 0]
    waiting = load(30, missing_tokens=40_000.0)  # five seconds of prompts before the first token
    assert rank_replicas([waiting, load(35)], SPEC, 100.0, CONFIG) == [1, 0]


@settings(max_examples=40)
@given(st.floats(0.5, 100.0), st.floats(1.0, 500.0), st.floats(1.0, 20.0))
def test_of_two_idle_replicas_the_slower_never_loses_less(
    tds: float, prompt: float, factor: float
) -> None:
    spec = QoESpec(ttft_s=1.0, tds=tds)
    slower = StepTime(
        base_s=factor * FAST.base_s,
        per_sequence_s=factor * FAST.per_sequence_s,
        per_prefill_token_s=factor * FAST.per_prefill_token_s,
    )
    fast = added_loss(load(0), spec, prompt, CONFIG)
    slow = added_loss(load(0, slower), spec, prompt, CONFIG)
    assert 0.0 <= fast <= slow + 1e-9
    assert np.isfinite(slow)


def test_what_was_sent_counts_until_the_statistics_know_it() -> None:
    now = [10.0]
    sent = SentRequests(lambda: now[0], memory_s=5.0)
    old = load(2, time_s=9.0)
    sent.note("a", SPEC, 50.0)
    sent.note("a", SPEC, 70.0)
    known = sent.known_load("a", old)
    assert (known.readers, known.context_tokens, known.demand_tds) == (4, 320.0, 16.0)
    assert known.missing_tokens == 120.0
    assert sent.known_load("b", old) is old
    assert sent.known_load("a", load(4, time_s=10.0)).readers == 4  # reported by now
    sent.note("a", SPEC, 50.0)
    now[0] = 16.0
    assert sent.known_load("a", old).readers == 2  # forgotten: the report will not come
    sent.keep_only([])
    assert sent.known_load("a", old) is old


def test_a_burst_is_spread_although_the_statistics_stand_still() -> None:
    now = [0.0]
    sent = SentRequests(lambda: now[0])
    loads = [load(0), load(0, SLOW)]
    counts = [0, 0]
    for _ in range(40):
        now[0] += 0.01
        known = [sent.known_load(str(i), one) for i, one in enumerate(loads)]
        best = rank_replicas(known, SPEC, 100.0, CONFIG)[0]
        sent.note(str(best), SPEC, 100.0)
        counts[best] += 1
    assert counts[0] == pytest.approx(32, abs=4)  # four fifths, as the speeds are


def test_a_load_travels_as_json() -> None:
    one = load(3, time_s=1.5, below_target=2)
    assert load_from_dict(json.loads(json.dumps(load_to_dict(one)))) == one
    assert load_from_dict({}) is None
    assert load_from_dict({**load_to_dict(one), "step_time": {"unknown": 1}}) is None


def reading(demand: float, late: float = 0.0, readers: float = 10.0) -> ReplicaReading:
    return ReplicaReading(demand_tds=demand, speed_tds=100.0, readers=readers, below_target=late)


def test_scaling_follows_the_demand() -> None:
    config = ScalingConfig()
    assert desired_replicas(config, [reading(60.0)], 1, 0.0)[0] == 1
    assert desired_replicas(config, [reading(170.0)], 1, 0.0)[0] == 3
    assert desired_replicas(config, [], 2, 0.0)[0] == 2  # nobody reported
    assert desired_replicas(config, [reading(5.0)] * 3, 3, 0.0)[0] == 2  # one at a time
    assert desired_replicas(config, [reading(30.0)] * 2, 2, 0.0)[0] == 2  # one would be at 0.6


def test_scaling_answers_bad_experience_at_once() -> None:
    config = ScalingConfig()
    assert desired_replicas(config, [reading(60.0, late=3.0)], 1, 0.0)[0] == 2
    # But not again while the replica that was asked for has not reported yet.
    assert desired_replicas(config, [reading(60.0, late=3.0)], 2, 0.0)[0] == 2


def test_scaling_looks_ahead_by_the_cold_start() -> None:
    config = ScalingConfig(cold_start_s=60.0)
    state: dict[str, object] = {}
    wanted = []
    for second in range(40):
        demand = 20.0 + 1.0 * second  # in a minute it will be 60 more than now
        number, state = desired_replicas(config, [reading(demand)], 1, float(second), state)
        wanted.append(number)
    assert wanted[:25] == [1] * 25  # what was seen for seconds is not continued for a minute
    assert wanted[-1] == 2
    assert json.loads(json.dumps(state))["history"]


def test_the_trend_covers_its_time_however_often_it_is_asked() -> None:
    config = ScalingConfig(trend_s=60.0)
    state: dict[str, object] = {}
    for tick in range(900):  # Ray Serve's ten times a second
        demand = 40.0 if tick < 850 else 50.0  # a step within the noise: no reason to scale
        number, state = desired_replicas(config, [reading(demand)], 1, 0.1 * tick, state)
        assert number == 1, tick
    history: Any = state["history"]
    assert 59.0 < history[-1][0] - history[0][0] <= 60.0
    assert len(history) <= 121


def test_the_first_reader_after_a_start_is_not_a_flood() -> None:
    config = ScalingConfig()
    state: dict[str, object] = {}
    for tick in range(300):
        # One reader comes after three seconds and stays: a tenth of what the engine can do.
        demand = min(10.0, max(0.0, 2.0 * (0.1 * tick - 3.0)))
        number, state = desired_replicas(config, [reading(demand)], 1, 0.1 * tick, state)
        assert number == 1, tick


@pytest.mark.parametrize(
    ("field", "value"),
    [("target_utilisation", 0.0), ("low_utilisation", 0.9), ("late_share", 2.0),
     ("cold_start_s", -1.0)],
)  # fmt: skip
def test_scaling_options_are_checked(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        ScalingConfig(**{field: value})


def test_nobody_is_planned_with_more_than_the_limit() -> None:
    table = RequestTable()
    greedy = table.add(QoESpec(ttft_s=1.0, tds=1000.0), 0.0, 10)
    honest = table.add(QoESpec(ttft_s=1.0, tds=4.0), 0.0, 10)
    slots = table.live_slots()
    for second in range(2, 12):  # ten tokens/s for both
        for _ in range(10):
            table.deliver_chunk(greedy, float(second), 1)
            table.deliver_chunk(honest, float(second), 1)
    snapshot = table.snapshot(
        11.0, slots, capacity_tokens=100.0, free_tokens=50.0, max_batch=8, step_tokens=64
    )
    limited = limit_speed(snapshot, 5.0)
    limited.validate()
    assert limited.tau_s.tolist() == [0.2, 0.25]
    assert limited.lag_s[1] == snapshot.lag_s[1]
    before, after = buffer_s(snapshot), buffer_s(limited)
    assert before[0] < 0.01  # behind for ever
    # At 5 tokens/s, 100 tokens last 20 s from D on at the earliest: now there is unread text.
    assert 5.0 < after[0] <= 1.0 + 100 * 0.2 - 11.0 + 1.0
    assert limit_speed(snapshot, 1000.0) is snapshot


def test_a_load_counts_demand_unread_text_and_those_behind() -> None:
    table = RequestTable()
    rich = table.add(SPEC, 0.0, 100)
    table.add(SPEC, 0.0, 50)  # waits since long
    table.deliver_chunk(rich, 1.0, 40)
    table.context_tokens[rich] = 140.0
    table.missing_tokens[rich] = 0.0
    snapshot = table.snapshot(
        6.0, table.live_slots(), capacity_tokens=500.0, free_tokens=360.0, max_batch=8,
        step_tokens=64,
    )  # fmt: skip
    seen = replica_load(snapshot, FAST)
    assert (seen.readers, seen.demand_tds) == (2, 8.0)
    assert seen.unread_tokens == pytest.approx(40 - 5 * 4.0)  # five seconds were read
    assert (seen.context_tokens, seen.missing_tokens) == (190.0, 50.0)
    assert seen.below_target == 1
