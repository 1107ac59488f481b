"""Other freezing schedules, ranks that switch together, the event log, small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raysys.errors import ConfigError, DataError, StorageError
from raysys.training.kgt import models
from raysys.training.kgt.baselines import (
    GradientCriterion,
    LinearSchedule,
    Replay,
    StaticFreezing,
    schedule_of,
)
from raysys.training.kgt.distributed import DistributedControl
from raysys.training.kgt.events import EventLog, frozen_share, read_events, timeline


def play(control: Any, epochs: int, per_epoch: int = 10) -> list[int]:
    found = []
    for step in range(epochs * per_epoch):
        control.observe(step, 1.0, 0.1, step // per_epoch)
        if (step + 1) % per_epoch == 0:
            found.append(control.latest().frozen_upto)
    return found


def test_linear_schedule_grows_from_its_start_and_spares_the_head() -> None:
    upto = play(LinearSchedule(0.5, 1.0, 6, 100), 10)
    assert upto[:6] == [0] * 6
    assert upto == sorted(upto)
    assert upto[-1] == 4  # seen at the end of the ninth epoch: share 0.82 of six
    assert max(play(LinearSchedule(0.0, 1.0, 6, 50), 10)) == 5


def test_static_and_replay() -> None:
    assert play(StaticFreezing(25, 2), 4) == [0, 0, 2, 2]
    assert play(Replay([(5, 1), (12, 3), (30, 0)]), 4) == [1, 3, 0, 0]
    with pytest.raises(ConfigError, match="ascending"):
        Replay([(5, 1), (3, 2)])
    assert schedule_of([{"event": "applied", "step": 4, "upto": 1}, {"event": "guided"}]) == [
        (4, 1)
    ]


def test_gradient_criterion_freezes_up_to_the_first_that_still_changes() -> None:
    control = GradientCriterion(1, 4)
    modules = [[nn.Parameter(torch.zeros(1))] for _ in range(4)]
    for step, norms in enumerate(([8.0, 8.0, 8.0, 8.0], [7.9, 7.8, 4.0, 2.0])):
        for (parameter,), norm in zip(modules, norms):
            parameter.grad = torch.tensor([norm])
        control.gradients(step, modules)
    # Changes .0125, .025, .5, .75: the median is .2625, so modules 0 and 1 freeze.
    assert control.latest().frozen_upto == 2
    other = GradientCriterion(1, 4)
    other.load_state_dict(control.state_dict())
    assert other.latest() == control.latest()


class Scripted(LinearSchedule):
    """Freezes one module from step 4 on."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0, 3, 10)

    def observe(self, step: int, loss: float, rate: float, epoch: int) -> None:
        if step == 4:
            self.decide(1, step, "script")


def test_all_ranks_switch_at_the_same_step() -> None:
    box: list[Tensor] = []

    def send(value: Tensor) -> None:
        box.append(value.clone())

    def receive(value: Tensor) -> None:
        value.copy_(box[-1])

    zero = DistributedControl(Scripted(), 0, every=3, broadcast=send)
    one = DistributedControl(None, 1, every=3, broadcast=receive)
    seen = []
    for step in range(9):
        for control in (zero, one):
            control.observe(step, 1.0, 0.1, 0)
        seen.append((zero.latest().frozen_upto, one.latest().frozen_upto))
        assert zero.latest().effective_step == one.latest().effective_step
    assert seen == [(0, 0)] * 5 + [(1, 1)] * 4
    assert one.latest().effective_step == 6


def test_ranks_out_of_step_abort_the_switch_and_not_the_job() -> None:
    one = DistributedControl(
        None, 1, every=1, broadcast=lambda value: value.copy_(torch.tensor([1, 2, 7]))
    )
    one.observe(6, 1.0, 0.1, 0)
    assert one.latest().frozen_upto == 0
    assert one.aborted == 1
    one.observe(7, 1.0, 0.1, 0)
    assert one.latest().frozen_upto == 2
    with pytest.raises(ConfigError, match="rank 0"):
        DistributedControl(None, 0)


def test_event_log_survives_a_torn_line_and_resumes_without_doubles(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for step in range(4):
        log({"event": "reading", "step": step})
    with path.open("a") as file:
        file.write('{"event": "rea')
    assert [row["step"] for row in read_events(path)] == [0, 1, 2, 3]
    again = EventLog(path)
    again.resume(2)
    assert [row["step"] for row in read_events(path)] == [0, 1]
    path.write_text('x\n{"event": "a"}\n')
    with pytest.raises(DataError, match="line 1"):
        read_events(path)
    with pytest.raises(StorageError):
        read_events(tmp_path / "none")


def test_timeline_and_frozen_share() -> None:
    events = [
        {"event": "applied", "step": 25, "upto": 2},
        {"event": "applied", "step": 75, "upto": 0},
    ]
    assert frozen_share(events, 3, 100) == [0.5, 0.5, 0.0]
    lines = list(timeline(events, 3, 100))
    assert lines[0].count("#") == 30
    assert lines[2].count("#") == 0


def test_models_reject_bad_shapes() -> None:
    with pytest.raises(ConfigError, match="dimensions"):
        models.ResNet(2, dimensions=3)
    with pytest.raises(ConfigError, match="heads"):
        models.EncoderBlock(10, 4, 0.0)
    with pytest.raises(ConfigError, match="widths"):
        models.ResNet(2, widths=())
