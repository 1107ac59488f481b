"""The state machine: bootstrapping, freezing, releasing, cosine schedules, resume."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from raysys.errors import ConfigError, DataError
from raysys.training.kgt.config import KGTConfig, automatic_interval, resolve
from raysys.training.kgt.controller import FreezeController
from raysys.training.kgt.savings import ModuleCost, Savings
from raysys.training.kgt.unfreeze import POLICIES, UnfreezeState

QUICK = KGTConfig(window=2, every=1, bootstrap_window=1, bootstrap_rate=10.0, min_bootstrap_share=0)


def guided(config: KGTConfig = QUICK, modules: int = 4, **options: Any) -> FreezeController:
    controller = FreezeController(config, modules, 1000, **options)
    for step in range(3):
        controller.observe(step, 1.0, 0.1)
    assert controller.stage == "guided"
    return controller


def settle(
    controller: FreezeController, upto: int, step: int = 10, rate: float = 0.1, epoch: int = 0
) -> int:
    """Feed identical readings until ``upto`` modules are frozen; returns the next step."""
    while controller.frozen_upto < upto:
        controller.read(step, dict.fromkeys(controller.wants(step), 1.0), rate, epoch)
        controller.observe(step, 1.0, rate, epoch)
        step += 1
        assert step < 500
    return step


def test_interval_of_the_paper_s_example() -> None:
    # ResNet-56: 78,000 iterations, W 10, 7 modules, two drops: about 300.
    assert automatic_interval(78_000, 10, 7, 2) == pytest.approx(318, abs=1)
    assert automatic_interval(100, 10, 7, 2) == 5


def test_short_runs_get_the_small_window() -> None:
    assert resolve(KGTConfig(), 4_999, 7).window == 5
    assert resolve(KGTConfig(), 5_000, 7).window == 10
    assert resolve(KGTConfig(window=4, every=9), 100, 7).every == 9
    with pytest.raises(ConfigError, match="total_steps"):
        resolve(KGTConfig(), 0, 7)


def test_reading_all_modules_at_once_takes_five_windows_in_each_phase_of_the_rate() -> None:
    config = KGTConfig(scope="all", window=8)
    assert resolve(config, 736, 8).every == 6
    assert resolve(config, 1_860, 3).every == 16
    assert resolve(config, 64, 8).every == 2  # four windows at least fit into any run
    assert resolve(dataclasses.replace(config, expected_drops=0), 1_860, 8).every == 46


def test_bootstrapping_ends_when_the_loss_flattens_and_not_before_its_share() -> None:
    config = dataclasses.replace(QUICK, bootstrap_rate=0.1, bootstrap_window=2)
    controller = FreezeController(config, 3, 1000)
    for step, loss in enumerate([8, 8, 4, 4, 2, 2, 1.95]):
        controller.observe(step, loss, 0.1)
    assert controller.stage == "bootstrap"
    controller.observe(7, 1.95, 0.1)
    assert controller.stage == "guided"
    slow = FreezeController(dataclasses.replace(config, min_bootstrap_share=0.05), 3, 1000)
    for step in range(48):
        slow.observe(step, 1.0, 0.1)
    assert slow.stage == "bootstrap"
    for step in range(48, 51):
        slow.observe(step, 1.0, 0.1)
    assert slow.stage == "guided"


def test_a_nan_loss_keeps_bootstrapping() -> None:
    controller = FreezeController(QUICK, 3, 1000)
    for step in range(20):
        controller.observe(step, float("nan") if step % 2 else 1.0, 0.1)
    assert controller.stage == "bootstrap"


def test_only_the_frontmost_module_is_read_and_the_head_never_freezes() -> None:
    controller = guided(modules=3)
    assert controller.wants(10) == (0,)
    settle(controller, 1)
    assert controller.wants(20) == (1,)
    settle(controller, 2, step=30)
    assert controller.wants(60) == ()
    assert controller.frozen_upto == 2


def test_readings_come_every_n_steps() -> None:
    controller = guided(dataclasses.replace(QUICK, every=5))
    assert [step for step in range(20) if controller.wants(step)] == [0, 5, 10, 15]


def test_scope_all_freezes_several_at_once() -> None:
    controller = guided(dataclasses.replace(QUICK, scope="all"))
    assert controller.wants(10) == (0, 1, 2)
    settle(controller, 1)
    assert controller.frozen_upto == 3
    assert controller.decision.version == 1


def test_the_tenfold_drop_releases_everything_and_halves_the_window() -> None:
    events: list[Any] = []
    controller = guided(dataclasses.replace(QUICK, window=6), log=events.append)
    step = settle(controller, 2)
    controller.observe(step, 1.0, 0.1 * 0.1 + 1e-12)
    assert controller.frozen_upto == 0
    assert controller.window == 3
    assert controller.reference_wanted
    controller.observe(step + 1, 1.0, 0.001)
    assert controller.decision.version == 3
    assert [event["event"] for event in events].count("release") == 1


def test_the_window_never_falls_below_two() -> None:
    controller = guided()
    step = settle(controller, 1)
    controller.observe(step, 1.0, 0.01)
    assert controller.window == 2


def test_settled_keeps_what_was_flat_and_releases_the_rest() -> None:
    config = dataclasses.replace(QUICK, unfreeze="settled", settled_below=0.5, window=2)
    controller = guided(config)
    step = 10
    for value in (8.0, 6.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        if controller.frozen_upto == 0:
            controller.read(step, {0: value}, 0.1)
            step += 1
    assert controller.frozen_upto == 1
    step = settle(controller, 2, step)  # flat from the start: not settled relative to its start
    assert controller.settled[0] < 0.5 < controller.settled[1]
    controller.observe(step, 1.0, 0.01)
    assert controller.frozen_upto == 1
    # The kept prefix has its own rate now: only another tenfold drop releases it again.
    controller.observe(step + 1, 1.0, 0.005)
    assert controller.frozen_upto == 1


def test_kept_thresholds_refreeze_sooner() -> None:
    counts = {}
    for keep in (False, True):
        controller = guided(dataclasses.replace(QUICK, keep_thresholds=keep, window=4))
        step = settle(controller, 1)
        controller.observe(step, 1.0, 0.01)
        after = settle(controller, 1, step + 1, rate=0.01)
        counts[keep] = after - step
    assert counts[True] < counts[False]


def test_nothing_freezes_before_its_epoch_and_what_is_flat_freezes_then() -> None:
    controller = guided(dataclasses.replace(QUICK, min_epochs=3))
    for step in range(10, 40):
        controller.read(step, dict.fromkeys(controller.wants(step), 1.0), 0.1, epoch=step // 10)
        assert (controller.frozen_upto > 0) == (step >= 30)


@pytest.mark.parametrize(("unfreeze", "window"), [("settled", 3), ("tenfold", 6)])
def test_a_drop_that_finds_nothing_frozen_begins_a_new_phase(unfreeze: str, window: int) -> None:
    config = dataclasses.replace(
        QUICK, window=6, unfreeze=unfreeze, keep_thresholds=True, min_epochs=1
    )
    controller = guided(config)
    for step in range(10, 30):  # long converged, but held back
        controller.read(step, {0: 1.0}, 0.1, epoch=0)
        controller.observe(step, 1.0, 0.1)
    threshold = controller.tracks[0].threshold
    controller.observe(30, 1.0, 0.1 * 0.1 + 1e-12)
    controller.observe(31, 1.0, 0.01)  # the same rate is no second drop
    assert controller.window == window
    controller.read(32, {0: 1.0}, 0.01, epoch=1)
    # Flat readings at the high rate do not count as a standstill at the low one.
    assert controller.frozen_upto == (0 if unfreeze == "settled" else 1)
    if unfreeze == "settled":
        assert controller.tracks[0].threshold == threshold
        assert settle(controller, 1, 33, rate=0.01, epoch=1) < 33 + 6


def test_rate_normalisation_undoes_a_decaying_rate() -> None:
    config = dataclasses.replace(QUICK, rate_normalised=True)
    events: list[Any] = []
    controller = guided(config, log=events.append)
    for step, rate in enumerate((0.1, 0.05, 0.02)):
        controller.read(10 + step, {0: 4.0 * rate}, rate)
    values = [event["plasticity"] for event in events if event["event"] == "reading"]
    assert values == pytest.approx([0.4, 0.4, 0.4])
    controller.read(20, {0: 1.0}, 0.0)
    assert controller.skipped == 1


def test_skipped_readings_are_counted_and_do_not_move_the_criterion() -> None:
    controller = guided()
    controller.read(10, {0: None}, 0.1)
    assert controller.skipped == 1
    assert controller.tracks == {}


def test_a_late_reading_of_a_frozen_module_is_ignored() -> None:
    controller = guided()
    settle(controller, 1)
    controller.read(30, {0: 5.0}, 0.1)
    assert 0 not in controller.tracks


def test_freezes_that_pay_nothing_are_left_out() -> None:
    costs = [ModuleCost(forward_s=0.0, backward_s=0.0), ModuleCost(forward_s=1.0, backward_s=2.0)]
    savings = Savings([*costs, costs[1]])
    config = dataclasses.replace(QUICK, min_saving=0.05)
    events: list[Any] = []
    controller = guided(config, 3, savings=savings, log=events.append)
    for step in range(10, 30):
        controller.read(step, {0: 1.0}, 0.1)
    assert controller.frozen_upto == 0
    assert any(event["event"] == "not_worth_it" for event in events)


def test_savings_by_hand() -> None:
    savings = Savings([ModuleCost(forward_s=1.0, backward_s=2.0)] * 3)
    assert savings.step_s(0) == 9.0
    assert savings.step_s(1) == 7.0
    cached = Savings(savings.costs, cached=True, read_s=0.1)
    assert cached.step_s(2) == pytest.approx(3.1)
    assert savings.share(0, 1, 0.5) == pytest.approx(2 / 9)
    assert savings.share(0, 1, 0.0) == 0.0


def state(**changes: Any) -> UnfreezeState:
    base: dict[str, Any] = {
        "step": 10, "rate": 0.1, "rate_at_freeze": 0.1, "lowest_rate": 0.1, "epoch": 3,
        "epoch_at_freeze": 1, "factor": 0.1, "every_epochs": 3,
    }  # fmt: skip
    return UnfreezeState(**{**base, **changes})


@pytest.mark.parametrize(
    ("policy", "changes", "expected"),
    [
        ("tenfold", {"rate": 0.011}, False),
        ("tenfold", {"rate": 0.1 * 0.1}, True),
        ("tenfold", {"rate": 0.0, "rate_at_freeze": 0.0}, False),
        ("tenfold", {"rate_at_freeze": None}, False),
        ("tenfold", {"rate": 0.2}, False),
        ("cycle_restart", {"rate": 0.1, "lowest_rate": 0.01}, True),
        ("cycle_restart", {"rate": 0.1, "lowest_rate": 0.02}, False),
        ("every_k_epochs", {"epoch": 3}, False),
        ("every_k_epochs", {"epoch": 4}, True),
        ("never", {"rate": 1e-9}, False),
    ],
)
def test_policies(policy: str, changes: dict[str, Any], expected: bool) -> None:
    assert POLICIES[policy](state(**changes)) is expected


def test_warm_up_counts_the_rate_at_the_freeze() -> None:
    controller = guided()
    step = settle(controller, 1, rate=0.01)  # frozen during warm-up
    controller.observe(step, 1.0, 0.1)
    controller.observe(step + 1, 1.0, 0.02)
    assert controller.frozen_upto == 1
    controller.observe(step + 2, 1.0, 0.001)
    assert controller.frozen_upto == 0


@pytest.mark.parametrize("stop", [4, 13, 18, 25])
def test_resume_equals_no_interruption(stop: int) -> None:
    def play(controller: FreezeController, steps: range) -> list[Any]:
        found = []
        for step in steps:
            rate = 0.1 if step < 22 else 0.01
            controller.observe(step, 1.0 / (1 + step), rate)
            wanted = controller.wants(step)
            controller.read(step, {m: 1.0 + m / (1 + step) ** 2 for m in wanted}, rate)
            found.append((controller.decision, controller.window, controller.reference_wanted))
        return found

    whole = play(FreezeController(QUICK, 4, 1000), range(40))
    first = FreezeController(QUICK, 4, 1000)
    play(first, range(stop))
    second = FreezeController(QUICK, 4, 1000)
    second.load_state_dict(first.state_dict())
    assert play(second, range(stop, 40)) == whole[stop:]


def test_a_state_of_another_model_is_refused() -> None:
    with pytest.raises(DataError, match="4 layer modules, this model has 3"):
        FreezeController(QUICK, 3, 10).load_state_dict(FreezeController(QUICK, 4, 10).state_dict())


@pytest.mark.parametrize(
    "changes",
    [{"window": 1}, {"coef": 0.0}, {"unfreeze": "often"}, {"reference": "int4"}, {"modules": 1},
     {"unfreeze_factor": 1.0}, {"min_epochs": -1}, {"gram_rows": 1}, {"scope": "some"}],
)  # fmt: skip
def test_bad_options_name_the_field(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        KGTConfig(**changes)
