"""Models, do-no-harm controller, request table, and the engine-side scheduler."""

import math
import pickle

import numpy as np
import pytest

from raysys.errors import ConfigError
from raysys.serving.andes.controller import ControllerConfig, HarmController
from raysys.serving.andes.models import (
    LatencyModel,
    RestoreModel,
    StepTime,
    fit_step_time,
    non_negative_fit,
)
from raysys.serving.andes.options import PlannerConfig
from raysys.serving.andes.qoe import QoESpec, QoETracker
from raysys.serving.andes.scheduler import AndesConfig, AndesScheduler
from raysys.serving.andes.table import RequestTable

TRUE = StepTime(
    base_s=0.03, per_sequence_s=0.001, per_prefill_token_s=2e-4, per_context_token_s=1e-6
)


def step_log(count, rng, noise=0.0):
    batch = rng.integers(1, 60, count)
    prefill = rng.integers(0, 500, count) * (rng.random(count) < 0.3)
    context = batch * 400 + rng.integers(0, 4000, count)
    seconds = TRUE.predict(batch, prefill, context) * (1 + noise * rng.standard_normal(count))
    return batch, prefill, context, seconds


def test_fit_recovers_the_coefficients():
    fitted, residual = fit_step_time(*step_log(500, np.random.default_rng(1)))
    assert residual < 1e-4
    assert fitted.base_s == pytest.approx(TRUE.base_s, rel=1e-3)
    assert fitted.per_context_token_s == pytest.approx(1e-6, rel=1e-2)


def test_fit_is_never_negative_and_tells_its_error():
    rng = np.random.default_rng(2)
    batch = rng.integers(1, 50, 200)
    seconds = 0.2 - 0.002 * batch  # falls with the batch: no non-negative slope fits
    fitted, residual = fit_step_time(batch, np.zeros(200), np.zeros(200), seconds)
    assert fitted.per_sequence_s == 0.0
    assert 0.05 < residual < 0.5
    with pytest.raises(ConfigError, match="8 steps"):
        fit_step_time([1], [1], [1], [0.1])
    with pytest.raises(ConfigError, match="as many"):
        fit_step_time([1, 2], [1], [1], [0.1])


def test_non_negative_fit_equals_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(3)
    for _ in range(20):
        rows, target = rng.random((30, 4)), rng.standard_normal(30)
        ours, _ = non_negative_fit(rows.T @ rows, rows.T @ target, float(target @ target))
        reference, _ = optimize.nnls(rows, target)
        assert ours == pytest.approx(reference, abs=1e-5)


def test_online_model_learns_forgets_and_survives_nonsense():
    rng = np.random.default_rng(4)
    model = LatencyModel(StepTime(base_s=9.0), half_life=300)
    for row in zip(*step_log(600, rng, noise=0.05)):
        model.observe(*map(float, row))
    model.observe(1, 0, 0, math.nan)
    model.observe(1, 0, 0, -1.0)
    assert model.observed == 600
    assert model.predict(30, 0, 12_000) == pytest.approx(
        float(TRUE.predict(30, 0, 12_000)), rel=0.1
    )
    assert model.error < 0.2
    good = model.step_time
    for k in range(3000):
        model.observe(10, 0, 100, 0.001 if k % 2 else 1000.0)
    assert model.rejected_fits > 0
    assert np.isfinite(model.step_time.predict(10, 0, 100))
    assert good.base_s > 0


def test_restore_model_takes_the_cheaper_way():
    recompute = RestoreModel(per_token_s=1e-3, fixed_s=0.01)
    assert recompute.cost([0, 100]).tolist() == pytest.approx([0.0, 0.11])
    assert RestoreModel(per_token_s=1e-3, swap_per_token_s=1e-4).cost(100) == pytest.approx(0.01)
    assert RestoreModel(per_token_s=1e-5, swap_per_token_s=1e-4).cost(100) == pytest.approx(0.001)
    with pytest.raises(ConfigError, match="per_token_s"):
        RestoreModel(per_token_s=-1.0)


def test_controller_steps_down_and_up_with_hysteresis():
    controller = HarmController(ControllerConfig(time_constant_s=10.0, hold_s=5.0))
    for _ in range(100):
        controller.on_step(0.1, 0.05)
    assert controller.mode == "admission_only"
    for _ in range(60):
        controller.on_step(0.1, 0.005)
    assert controller.mode == "admission_only"
    for _ in range(600):
        controller.on_step(0.1, 0.0)
    assert controller.mode == "full"
    assert controller.changes == 2


def test_controller_falls_back_to_fcfs_on_faults_and_dear_plans():
    controller = HarmController(ControllerConfig(max_faults=2, time_constant_s=5.0, hold_s=1.0))
    controller.on_fault()
    assert controller.mode == "full"
    controller.on_fault()
    assert controller.mode == "fcfs"
    for _ in range(200):
        controller.on_step(0.1, 0.0)
    assert controller.mode == "full"
    controller.on_plan(10.0)
    controller.on_step(0.1, 0.0)
    assert controller.mode == "fcfs"
    off = HarmController(ControllerConfig(enabled=False))
    off.on_step(1.0, 1.0)
    for _ in range(9):
        off.on_fault()
    assert off.mode == "full"
    with pytest.raises(ConfigError, match="resume_waste"):
        ControllerConfig(max_waste=0.1, resume_waste=0.2)


def test_table_agrees_with_trackers_and_reuses_slots():
    table = RequestTable(room=2)
    rng = np.random.default_rng(5)
    trackers, slots = [], []
    for index in range(5):
        spec = QoESpec(ttft_s=1.0, tds=3.0 + index)
        trackers.append(QoETracker(spec, submitted_s=10.0 + index))
        slots.append(table.add(spec, 10.0 + index, 50))
    now = 16.0
    for _ in range(30):
        now += float(rng.exponential(0.5))
        table.deliver(np.array(slots), now)
        table.deliver_chunk(slots[0], now, 2)
        for tracker in trackers:
            tracker.on_token(now)
        trackers[0].on_token(now, 2)
    view = table.snapshot(now, table.live_slots(), capacity_tokens=1e4, free_tokens=1e4,
                          max_batch=8, step_tokens=512)  # fmt: skip
    view.validate()
    assert view.tokens.tolist() == [t.tokens for t in trackers]
    assert view.lag_s == pytest.approx([t.lag_s for t in trackers])
    assert view.delay_sum_s == pytest.approx([t.delay_sum_s for t in trackers])
    assert view.unserved_s == pytest.approx(view.elapsed_s)
    table.deliver_chunk(slots[0], now, 0)
    table.remove(slots[2])
    assert len(table) == 4
    assert table.add(QoESpec(), now, 7) == slots[2]
    assert table.tokens[slots[2]] == 0.0
    with pytest.raises(ConfigError, match="slot"):
        table.remove(99)
    with pytest.raises(ConfigError, match="room"):
        RequestTable(0)


def crowded():
    table = RequestTable()
    for index in range(6):
        table.add(QoESpec(), float(-index), 300)
    slots = table.live_slots()
    table.running[slots[:3]] = table.pausable[slots[:3]] = True
    table.missing_tokens[slots[:3]] = 0.0
    return table.snapshot(1.0, slots, capacity_tokens=1000.0, free_tokens=100.0, max_batch=8,
                          step_tokens=512)  # fmt: skip


def test_scheduler_plans_at_events_and_every_so_often():
    scheduler = AndesScheduler(AndesConfig(planner=PlannerConfig(plan_every=4)))
    assert scheduler.due()
    scheduler.plan(crowded())
    assert not scheduler.due()
    for _ in range(4):
        scheduler.on_step(3, 0, 900, 0.05)
    assert scheduler.due()
    scheduler.plan(crowded())
    scheduler.on_finish(300.0)
    assert scheduler.due()
    assert (scheduler.counters.plans, scheduler.counters.triggered) == (2, 2)


def test_a_planning_bug_falls_back_to_arrival_order_and_is_reported():
    seen = []
    scheduler = AndesScheduler(on_error=seen.append)
    broken = crowded()
    object.__setattr__(broken, "tau_s", None)
    plan = scheduler.plan(broken)
    assert plan.mode == "fcfs"
    assert plan.admit.tolist() == [5, 4, 3]
    assert len(seen) == scheduler.counters.faults == 1
    for _ in range(2):
        scheduler.plan(broken)
    assert scheduler.mode == "fcfs"


def test_policy_fcfs_switches_planning_off():
    scheduler = AndesScheduler(AndesConfig(policy="fcfs"))
    plan = scheduler.plan(crowded())
    assert plan.mode == "fcfs"
    assert plan.pause.size == 0
    with pytest.raises(ConfigError, match="policy"):
        AndesConfig(policy="random")


def test_restores_are_counted_and_configs_survive_pickling():
    scheduler = AndesScheduler(AndesConfig(swap_per_token_s=1e-5, learn=False))
    scheduler.on_step(4, 500, 2000, 0.1, restored_tokens=400.0)
    assert scheduler.counters.restore_s == pytest.approx(0.004)
    assert scheduler.controller.waste > 0
    scheduler.on_plan_time(0.001)
    assert scheduler.controller.plan_share > 0
    assert pickle.loads(pickle.dumps(scheduler.config)) == scheduler.config
