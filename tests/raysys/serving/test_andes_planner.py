"""The planner: packing, gains, decisions on hand-made snapshots, and invariants on random ones."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError
from raysys.serving.andes.gain import buffer_s, outlook, served_area
from raysys.serving.andes.models import RestoreModel, StepTime
from raysys.serving.andes.options import OBJECTIVES, PlannerConfig
from raysys.serving.andes.packing import exact_pack, greedy_order, greedy_pack, pack
from raysys.serving.andes.planner import Planner
from raysys.serving.andes.qoe import QoESpec, QoETracker
from raysys.serving.andes.snapshot import Snapshot
from raysys.serving.andes.valuation import Valuation

STEP = StepTime()
RESTORE = RestoreModel()
CHEAP = RestoreModel(swap_per_token_s=1e-6)


def snapshot(requests, *, capacity=1000.0, max_batch=256):
    """Build a snapshot from dicts; unknown keys fail."""
    base = {
        "running": False, "pausable": None, "elapsed_s": 0.0, "tokens": 0.0, "lag_s": 0.0,
        "delay_sum_s": 0.0, "ttft_s": 1.0, "tau_s": 0.25, "weight": 1.0, "context_tokens": 100.0,
        "missing_tokens": None, "unserved_s": None, "preemptions": 0,
    }  # fmt: skip
    rows = []
    for request in requests:
        assert set(request) <= set(base)
        row = {**base, **request}
        if row["pausable"] is None:
            row["pausable"] = row["running"]
        if row["missing_tokens"] is None:
            row["missing_tokens"] = 0.0 if row["running"] else row["context_tokens"]
        if row["unserved_s"] is None:
            row["unserved_s"] = 0.0 if row["running"] else row["elapsed_s"]
        rows.append(row)
    kinds = {"running": np.bool_, "pausable": np.bool_, "preemptions": np.int64}
    columns = {
        name: np.array([row[name] for row in rows], dtype=kinds.get(name, np.float64))
        for name in base
    }
    used = sum(row["context_tokens"] for row in rows if row["running"])
    return Snapshot(
        now_s=0.0, capacity_tokens=capacity, free_tokens=capacity - used,
        max_batch=max_batch, step_tokens=2048, **columns,
    )  # fmt: skip


def reader(buffer, context=400.0, **more):
    """A running request whose reader holds ``buffer`` seconds of unread text."""
    tokens = 200.0
    elapsed = 1.0 + tokens * 0.25 - buffer
    return {"running": True, "tokens": tokens, "elapsed_s": elapsed, "context_tokens": context,
            **more}  # fmt: skip


def plan(requests, config=None, restore=CHEAP, mode="full", capacity=1000.0, **options):
    view = snapshot(requests, capacity=capacity)
    view.validate()
    return Planner(config or PlannerConfig()).plan(view, STEP, restore, mode, **options)


def test_empty_and_idle_engines():
    empty = plan([])
    assert empty.admit.size == empty.pause.size == 0
    assert not empty.triggered
    two = plan([{"elapsed_s": 1.0}, {"elapsed_s": 5.0}])
    assert two.admit.tolist() == [1, 0]
    assert not two.triggered


def test_a_full_reader_gives_way_to_a_newcomer():
    decided = plan([reader(40.0), reader(1.0), {"context_tokens": 350.0, "elapsed_s": 0.5}])
    assert decided.triggered
    assert decided.pause.tolist() == [0]
    assert decided.admit.tolist() == [2]
    assert decided.gain > decided.loss >= 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "admission_only"},
        {"config": PlannerConfig(max_preemptions=0)},
        {"config": PlannerConfig(guard_s=50.0)},
        {"restore": RestoreModel(per_token_s=0.5)},
        {"config": PlannerConfig(guard_room_factor=0, guard_restore_factor=0),
         "restore": RestoreModel(per_token_s=0.2)},
    ],
    ids=["mode", "limit", "guard", "gate of a dear restore", "refiner"],
)  # fmt: skip
def test_nothing_is_paused_where_it_must_not_or_does_not_pay(change):
    decided = plan([reader(40.0), reader(1.0), {"context_tokens": 350.0}], **change)
    assert decided.pause.size == 0
    assert decided.admit.size == 0
    assert decided.hold.tolist() == [2]


def test_preemptions_per_request_are_limited():
    requests = [reader(40.0, preemptions=3), reader(1.0), {"context_tokens": 350.0}]
    assert plan(requests).pause.size == 0
    assert plan(requests, PlannerConfig(max_preemptions=4)).pause.tolist() == [0]


def test_a_protected_request_is_never_paused():
    requests = [reader(40.0, pausable=False), reader(1.0), {"context_tokens": 350.0}]
    assert plan(requests).pause.size == 0


def test_shortage_pauses_a_reader_with_text_instead_of_evicting():
    decided = plan([reader(20.0, 500.0), reader(0.0, 495.0)], mode="admission_only")
    assert decided.pause.tolist() == [0]
    assert decided.reason == "shortage"
    shrunk = plan([reader(20.0, 800.0), reader(30.0, 600.0), reader(0.0, 400.0)])
    assert shrunk.pause.size >= 1
    assert 2 not in shrunk.pause


def test_misfits_are_skipped_and_giants_do_not_block():
    requests = [
        reader(0.0, 700.0),
        {"context_tokens": 5000.0, "elapsed_s": 9.0},
        {"context_tokens": 260.0},
        {"context_tokens": 100.0},
    ]
    decided = plan(requests)
    assert 1 not in decided.admit
    assert 3 in decided.admit
    assert 1 in decided.hold


def test_fcfs_mode_keeps_the_order_of_arrival():
    requests = [reader(40.0), reader(1.0), {"elapsed_s": 3.0}, {"elapsed_s": 8.0}]
    decided = plan(requests, mode="fcfs")
    assert decided.admit.tolist() == [3, 2]
    assert not decided.triggered


def test_the_starved_go_first_once_in_a_while():
    old = {"elapsed_s": 200.0, "context_tokens": 300.0}
    young = [{"context_tokens": 300.0, "elapsed_s": 0.5} for _ in range(3)]
    running = [reader(0.0, 600.0)]
    boosted = plan([*running, old, *young])
    assert boosted.admit.tolist() == [1]
    assert boosted.starved == 1
    assert plan([*running, old, *young], boost=False).admit.tolist() != [1]


def test_tenant_weight_decides_between_equals():
    rows = [reader(0.0, 600.0), {"context_tokens": 300.0}, {"context_tokens": 300.0, "weight": 3.0}]
    assert plan(rows).admit.tolist() == [2]


def test_short_contexts_come_before_long_ones():
    rows = [reader(0.0, 500.0), {"context_tokens": 400.0}, {"context_tokens": 150.0}]
    assert plan(rows).admit[0] == 2


def test_a_draining_queue_makes_swaps_worthless():
    requests = [reader(40.0), reader(1.0), {"context_tokens": 350.0, "elapsed_s": 0.5}]
    assert plan(requests).pause.tolist() == [0]
    assert plan(requests, restore=RestoreModel(per_token_s=1e-4),
                drain_tokens_per_s=1e6).pause.size == 0  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_make_valid_plans(objective):
    requests = [reader(40.0), reader(1.0), {"context_tokens": 350.0}, {"elapsed_s": 30.0}]
    decided = plan(requests, PlannerConfig(objective=objective))
    assert set(decided.admit) | set(decided.hold) == {2, 3}


def test_perfect_objective_ignores_the_already_imperfect():
    config = PlannerConfig(objective="perfect")
    view = snapshot([reader(0.0, 600.0), {"elapsed_s": 30.0}, {"elapsed_s": 0.5}])
    value = Valuation(config, view, STEP, CHEAP, "full").best_batch()[1]
    assert value[1] == 0.0
    assert value[2] > 0.0


def test_compute_bound_engine_still_plans():
    slow = StepTime(base_s=2.0)
    view = snapshot([reader(0.0, 600.0), {"context_tokens": 300.0}, {"context_tokens": 300.0}])
    decided = Planner().plan(view, slow, CHEAP)
    assert decided.triggered
    assert decided.admit.size == 1


def test_gain_matches_a_token_by_token_prediction():
    """Serving from now on at latency L equals feeding the tracker those tokens."""
    spec = QoESpec(1.0, 4.0)
    tracker = QoETracker(spec)
    for time in (2.0, 2.1, 2.2, 6.0):
        tracker.on_token(time)
    now, latency, horizon = 7.0, 0.1, 20.0
    view = snapshot([{
        "running": True, "elapsed_s": now, "tokens": 4.0, "lag_s": tracker.lag_s,
        "delay_sum_s": tracker.delay_sum_s,
    }])  # fmt: skip
    ahead = outlook(view, horizon)
    assert ahead.wait[0] == pytest.approx(tracker.live(now + horizon))
    area = served_area(view, ahead, np.array([[latency]]), np.zeros((1, 1)))
    served = (ahead.consumed + area[0]) / ahead.ideal
    for step in itertools.count(1):
        if now + step * latency > now + horizon:
            break
        tracker.on_token(now + step * latency)
    assert served[0] == pytest.approx(tracker.live(now + horizon), abs=1e-6)
    assert buffer_s(view)[0] == pytest.approx(1.0 + 4 * 0.25 + view.lag_s[0] - now)


items = st.integers(1, 14).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0, 1), min_size=n, max_size=n),
        st.lists(st.integers(1, 30), min_size=n, max_size=n),
        st.integers(1, n),
        st.integers(0, 200),
    )
)


@given(items)
def test_packings_fit_and_the_exact_one_is_best(case):
    values, sizes, batch, room = case
    value, size = np.array(values), np.array(sizes)
    exact = np.flatnonzero(exact_pack(value, size, batch, room))
    greedy = greedy_pack(value, size.astype(float), batch, room)
    stop = pack(
        greedy_order(value, size.astype(float)), value, size.astype(float), batch, room,
        skip_misfits=False,
    )  # fmt: skip
    for chosen in (exact, greedy, stop):
        assert len(set(chosen.tolist())) == chosen.size <= batch
        assert size[chosen].sum() <= room
    assert value[stop].sum() <= value[greedy].sum() + 1e-9
    assert value[greedy].sum() <= value[exact].sum() + 1e-9


def test_exact_pack_on_a_known_instance():
    chosen = exact_pack(np.array([6.0, 5.0, 5.0]), np.array([6, 5, 5]), 2, 10)
    assert np.flatnonzero(chosen).tolist() == [1, 2]
    assert not exact_pack(np.array([1.0]), np.array([1]), 1, -1).any()


@st.composite
def crowds(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    requests = []
    for _ in range(draw(st.integers(0, 25))):
        kind = rng.integers(3)
        context = float(rng.integers(1, 600))
        if kind == 0:
            requests.append(reader(float(rng.uniform(-20, 60)), context))
        else:
            requests.append({
                "elapsed_s": float(rng.uniform(0, 150)), "context_tokens": context,
                "weight": float(rng.uniform(0.1, 5)), "tau_s": float(rng.uniform(0.05, 0.5)),
                "tokens": float(rng.integers(0, 50) * (kind == 1)),
            })  # fmt: skip
    return requests


@settings(max_examples=150)
@given(
    crowds(),
    st.floats(200, 5000),
    st.sampled_from(["full", "admission_only"]),
    st.sampled_from([RESTORE, CHEAP]),
    st.sampled_from(OBJECTIVES),
)
def test_plans_are_sound_and_deterministic(requests, capacity, mode, restore, objective):
    view = snapshot(requests, capacity=capacity)
    planner = Planner(PlannerConfig(objective=objective))
    decided = planner.plan(view, STEP, restore, mode)
    again = planner.plan(view, STEP, restore, mode)
    assert decided.admit.tolist() == again.admit.tolist()
    assert decided.pause.tolist() == again.pause.tolist()
    assert view.running[decided.pause].all()
    assert view.pausable[decided.pause].all()
    waiting = np.concatenate([decided.admit, decided.hold])
    assert sorted(waiting.tolist()) == np.flatnonzero(~view.running).tolist()
    assert decided.batch_cap >= 1
    if decided.triggered:
        gone = view.context_tokens[decided.pause].sum()
        come = view.context_tokens[decided.admit].sum()
        assert come == 0 or come <= view.free_tokens + gone
        assert decided.gain >= decided.loss or decided.starved


def test_exact_solver_agrees_with_greedy_on_an_easy_case():
    requests = [reader(40.0), reader(1.0), {"context_tokens": 350.0, "elapsed_s": 0.5}]
    exact = plan(requests, PlannerConfig(solver="exact"))
    assert exact.pause.tolist() == plan(requests).pause.tolist() == [0]


def test_bad_options_and_snapshots_name_the_field():
    with pytest.raises(ConfigError, match="horizon_s"):
        PlannerConfig(horizon_s=0.0)
    with pytest.raises(ConfigError, match="objective"):
        PlannerConfig(objective="best")
    view = snapshot([{}])
    with pytest.raises(ConfigError, match=r"snapshot\.lag_s"):
        dataclasses.replace(view, lag_s=np.array([np.nan])).validate()
    with pytest.raises(ConfigError, match=r"snapshot\.weight"):
        dataclasses.replace(view, weight=np.ones(3)).validate()
