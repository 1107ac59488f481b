"""The QoE metric: the specification's closed forms and edge cases, and batch against tracker."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.errors import ConfigError
from raysys.serving.andes.qoe import (
    QoESpec,
    QoETracker,
    final_qoe,
    qoe_of_deliveries,
    summarize,
)
from raysys.serving.andes.spec import READING_CLASSES, spec_from_fields, unknown_fields

SPEC = QoESpec(ttft_s=1.0, tds=4.8)
TAU = 1 / 4.8


def tracked(times, spec=SPEC, submitted=0.0):
    tracker = QoETracker(spec, submitted)
    for time in times:
        tracker.on_token(submitted + time)
    return tracker


def ideal(n, start=1.0):
    return [start + k * TAU for k in range(n)]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (ideal(200, 6.0), 0.8065),
        (ideal(200, 31.0), 0.4098),
        ([1.0 + 2 * TAU * k for k in range(200)], 0.6672),
        ([60.0] * 200, 0.2610),
        ([0.5 + k / 20 for k in range(100)] + [15.45 + k / 20 for k in range(100)], 1.0),
        ([0.5 + k / 20 for k in range(100)] + [45.45 + k / 20 for k in range(100)], 0.7341),
        ([2.0], 0.0943),
        ([6.0 + k * TAU for k in range(5)], 0.0943),
    ],
)
def test_published_values(times, expected):
    assert tracked(times).qoe() == pytest.approx(expected, abs=6e-4)
    assert qoe_of_deliveries([times], [SPEC])[0] == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("delta", [0.5, 5.0, 60.0])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_constant_lateness_closed_form(n, delta):
    length = n * TAU
    expected = length / (length + 2 * delta)
    assert tracked(ideal(n, 1.0 + delta)).qoe() == pytest.approx(expected)
    burst = QoETracker(SPEC)
    burst.on_token(1.0 + delta, n)
    assert burst.qoe() == pytest.approx(expected)


@pytest.mark.parametrize("rho", [0.25, 0.5, 0.9])
def test_slow_stream_tends_to_closed_form(rho):
    times = [1.0 + k * TAU / rho for k in range(20_000)]
    assert qoe_of_deliveries([times], [SPEC])[0] == pytest.approx(1 / (2 - rho), abs=1e-3)


gaps = st.lists(st.floats(0, 20, allow_nan=False), min_size=1, max_size=60)
specs = st.builds(QoESpec, ttft_s=st.floats(0, 30), tds=st.floats(0.1, 50), weight=st.just(1.0))


@given(gaps, specs)
def test_tracker_equals_definition_and_batch(steps, spec):
    times = list(np.cumsum(steps))
    consumed = []
    for time in times:
        consumed.append(max(time, consumed[-1] + spec.tau_s if consumed else spec.ttft_s))
    ideal_line = [spec.ttft_s + k * spec.tau_s for k in range(len(times))]
    end = consumed[-1] + spec.tau_s / 2
    expected = sum(end - c for c in consumed) / sum(end - i for i in ideal_line)
    tracker = tracked(times, spec, submitted=100.0)
    assert tracker.qoe() == pytest.approx(expected, abs=1e-6)
    assert qoe_of_deliveries([times], [spec])[0] == pytest.approx(expected, abs=1e-6)
    state = final_qoe([tracker.tokens], [tracker.lag_s], [tracker.delay_sum_s], [spec.tau_s])
    assert state[0] == pytest.approx(expected, abs=1e-6)


@given(gaps, specs, st.floats(0, 200))
def test_live_equals_definition(steps, spec, later):
    times = list(np.cumsum(steps))
    horizon = times[-1] + later
    consumed = []
    for time in times:
        consumed.append(max(time, consumed[-1] + spec.tau_s if consumed else spec.ttft_s))
    numerator = sum(max(0.0, horizon - c) for c in consumed)
    count = max(0, math.ceil((horizon - spec.ttft_s) / spec.tau_s)) + 1
    denominator = sum(max(0.0, horizon - spec.ttft_s - k * spec.tau_s) for k in range(count))
    expected = 1.0 if denominator <= 1e-9 else min(1.0, numerator / denominator)
    assert tracked(times, spec).live(horizon) == pytest.approx(expected, abs=1e-5)


@given(gaps, specs, st.integers(0, 59), st.floats(0.01, 5), st.floats(0, 100))
def test_earlier_tokens_never_score_lower_at_a_common_horizon(steps, spec, index, advance, later):
    late = np.cumsum(steps)
    early = late.copy()
    index %= len(early)
    early[index] = max(early[index - 1] if index else 0.0, early[index] - advance)
    horizon = late[-1] + later
    assert tracked(early, spec).live(horizon) >= tracked(late, spec).live(horizon) - 1e-6


def test_waiting_lowers_live_score_and_buffer():
    tracker = QoETracker(SPEC, submitted_s=50.0)
    assert tracker.live(50.9) == 1.0
    assert tracker.live(55.0) == 0.0
    tracker.on_token(50.5, 10)
    assert tracker.buffer_s(50.5) == pytest.approx(0.5 + 10 * TAU)
    assert tracker.live(52.0) == 1.0
    assert tracker.live(60.0) > tracker.live(80.0) > 0.0


def test_finish_rules():
    assert QoETracker(SPEC).finish(5.0, "error").qoe == 0.0
    assert QoETracker(SPEC).finish(5.0, "rejected").counted
    assert not QoETracker(SPEC).finish(0.5, "cancelled").counted
    impatient = QoETracker(SPEC).finish(2.0, "cancelled")
    assert impatient.counted
    assert impatient.qoe == 0.0
    assert QoETracker(SPEC).finish(2.0, "stop").qoe == pytest.approx(TAU / (TAU + 2.0))
    assert QoETracker(SPEC).finish(0.2, "stop").qoe == 1.0


def test_cancel_in_mid_stream_scores_what_was_consumed():
    tracker = QoETracker(SPEC)
    tracker.on_token(3.0, 100)
    outcome = tracker.finish(3.0 + 9.5 * TAU, "cancelled")
    reference = QoETracker(SPEC)
    reference.on_token(3.0, 10)
    assert outcome.truncated
    assert outcome.qoe == pytest.approx(reference.qoe())
    assert tracker.finish(99.0, "stop") is outcome


def test_failure_in_mid_stream_is_the_live_score():
    tracker = tracked(ideal(10))
    expected = tracker.live(30.0)
    outcome = tracker.finish(30.0, "error")
    assert outcome.qoe == pytest.approx(expected)
    assert outcome.qoe < 0.6


def test_times_out_of_order_are_clamped_and_counted():
    tracker = tracked([2.0, 1.0, 3.0])
    assert tracker.clamped == 1
    assert tracker.qoe() == pytest.approx(qoe_of_deliveries([[2.0, 2.0, 3.0]], [SPEC])[0])


def test_hidden_tokens_and_empty_chunks_do_not_count():
    tracker = QoETracker(SPEC)
    tracker.on_hidden(0.5, 30)
    tracker.on_token(0.6, 0)
    tracker.on_token(4.0)
    outcome = tracker.finish(4.0)
    assert (outcome.tokens, outcome.hidden_tokens, outcome.ttft_s) == (1, 30, 4.0)
    assert outcome.hidden_s == pytest.approx(0.5)


def test_a_million_tokens_do_not_drift():
    tracker = QoETracker(SPEC)
    for k in range(1_000_000):
        tracker.on_token(3.0 + k * TAU)
    length = 1_000_000 * TAU
    assert tracker.qoe() == pytest.approx(length / (length + 4.0), rel=1e-9)
    assert tracker.buffer_s(3.0) == pytest.approx(length, rel=1e-9)


def test_variants_keep_their_own_names():
    tracker = tracked([2.0])
    assert tracker.soft_qoe(0.0) == tracker.qoe()
    assert tracker.soft_qoe(10.0) > tracker.qoe()
    assert tracker.ttft_emphasis(0.9) == pytest.approx(0.9)
    assert tracked([0.2]).ttft_emphasis(0.9) == 1.0


def test_summary_leaves_out_the_uncounted():
    outcomes = [tracked([1.0]).finish(1.0), QoETracker(SPEC).finish(9.0, "error")]
    summary = summarize([*outcomes, QoETracker(SPEC).finish(0.1, "cancelled")])
    assert (summary.count, summary.mean, summary.excluded) == (2, 0.5, 1)
    assert summary.share_perfect == 0.5
    assert summarize([]).count == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tds", 0), ("tds", -1.0), ("tds", math.nan), ("tds", math.inf), ("tds", 1001),
        ("tds", True), ("tds", "4"), ("ttft_s", -0.1), ("ttft_s", math.nan), ("ttft_s", 3601),
        ("weight", 0), ("weight", 101), ("tenant", ""), ("tenant", 3), ("kind", "singing"),
    ],
)  # fmt: skip
def test_bad_targets_name_the_field(field, value):
    with pytest.raises(ConfigError) as caught:
        QoESpec(**{field: value})
    assert caught.value.field == field


def test_fields_of_a_request():
    spec = spec_from_fields({"qoe_tds": "10", "other": 1}, SPEC, allow_text=True)
    assert (spec.tds, spec.ttft_s) == (10.0, 1.0)
    with pytest.raises(ConfigError, match="qoe_tds"):
        spec_from_fields({"qoe_tds": "10"}, SPEC)
    with pytest.raises(ConfigError, match="qoe_speed"):
        spec_from_fields({"qoe_speed": 3}, SPEC)
    assert spec_from_fields({"qoe_speed": 3}, SPEC, strict=False) == SPEC
    assert unknown_fields({"qoe_speed": 3, "x": 1}) == ["qoe_speed"]


def test_bad_calls():
    with pytest.raises(ConfigError):
        QoETracker(SPEC).on_token(math.nan)
    with pytest.raises(ConfigError):
        QoETracker(SPEC).on_token(1.0, -1)
    with pytest.raises(ConfigError):
        QoETracker(SPEC).finish(1.0, "bored")
    with pytest.raises(ConfigError):
        qoe_of_deliveries([[2.0, 1.0]], [SPEC])
    with pytest.raises(ConfigError):
        qoe_of_deliveries([[1.0]], [])


def test_class_table_is_a_distribution():
    assert sum(row.share for row in READING_CLASSES) == pytest.approx(1.0)
