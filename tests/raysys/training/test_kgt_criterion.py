"""Smoothing, slope, threshold and staleness, checked by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.training.kgt.criterion import ModuleTrack, slope_of


def test_slope_is_least_squares_over_the_evaluation_index() -> None:
    assert slope_of([1.0, 3.0]) == pytest.approx(2.0)
    # By hand: x - 1.5 = -1.5 -.5 .5 1.5, y - 2.5 = -1.5 .5 -.5 1.5 -> 4 / 5
    assert slope_of([1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)


def test_first_readings_by_hand() -> None:
    track = ModuleTrack(0, window=3, coef=0.2)
    rows = [track.add(value) for value in (4.0, 2.0, 3.0, 3.0, 3.0)]
    assert [row.smoothed for row in rows] == pytest.approx([4.0, 3.0, 3.0, 8 / 3, 3.0])
    assert rows[0].slope is None
    # Slopes over the last three smoothed values: (4,3), (4,3,3), (3,3,8/3).
    assert rows[1].slope == pytest.approx(-1.0)
    assert rows[2].slope == pytest.approx(-0.5)
    assert rows[3].slope == pytest.approx(-1 / 6)
    assert rows[2].threshold is None
    assert rows[3].threshold == pytest.approx(0.2)
    assert rows[3].stale == 1


def test_a_falling_curve_does_not_freeze_because_its_slope_is_negative() -> None:
    # The published pseudo-code compares the signed slope: every falling curve would freeze here.
    track = ModuleTrack(0, window=3, coef=0.2)
    rows = [track.add(100.0 - step) for step in range(30)]
    assert all(row.slope is not None and row.slope < 0 for row in rows[1:])
    assert not any(row.converged for row in rows)


def test_a_curve_that_flattens_freezes_after_a_window_of_flat_slopes() -> None:
    track = ModuleTrack(0, window=4, coef=0.2)
    rows = [track.add(math.exp(-step)) for step in range(40)]
    first = next(index for index, row in enumerate(rows) if row.converged)
    assert rows[first].stale == 4
    assert [row.stale for row in rows[first - 3 : first + 1]] == [1, 2, 3, 4]
    assert first >= 4 + 3


def test_no_decision_before_four_readings_even_if_all_is_constant() -> None:
    track = ModuleTrack(0, window=2, coef=0.2)
    assert [track.add(1.0).converged for _ in range(5)] == [False, False, False, False, True]


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_identical_readings_have_a_floor_and_can_freeze(value: float) -> None:
    track = ModuleTrack(0, window=3, coef=0.2)
    rows = [track.add(value) for _ in range(8)]
    assert rows[-1].threshold is not None
    assert rows[-1].threshold > 0
    assert rows[-1].converged


def test_a_steep_slope_starts_the_count_again() -> None:
    track = ModuleTrack(0, window=3, coef=0.2)
    for value in (3.0, 2.0, 1.0, 0.5, 0.4, 0.38):
        track.add(value)
    before = track.stale
    assert track.add(9.0).stale == 0
    assert before >= 0


def test_a_kept_threshold_is_used_from_the_second_reading() -> None:
    track = ModuleTrack(0, window=2, coef=0.2, threshold=0.5)
    assert [track.add(1.0).stale for _ in range(3)] == [0, 1, 2]


@given(st.lists(st.floats(0, 10, allow_nan=False), min_size=1, max_size=40))
def test_state_round_trip_continues_identically(values: list[float]) -> None:
    one = ModuleTrack(2, window=3, coef=0.2)
    for value in values[: len(values) // 2]:
        one.add(value)
    two = ModuleTrack.from_state(one.state_dict())
    for value in values[len(values) // 2 :]:
        assert one.add(value) == two.add(value)
