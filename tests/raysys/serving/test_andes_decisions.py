"""The decision log: a plan is made again, to the bit, from what was written."""

from __future__ import annotations

import json

import pytest

from raysys.serving.andes.decisions import plan_to_dict, replay_decision
from raysys.serving.andes.models import StepTime
from raysys.serving.andes.options import PlannerConfig
from raysys.serving.andes.scheduler import AndesConfig, AndesScheduler
from raysys.serving.andes.simulator.engine import EngineConfig
from raysys.serving.andes.simulator.policies import Andes
from raysys.serving.andes.simulator.result import simulate
from raysys.serving.andes.simulator.workload import cyclic_bursts

STEP = StepTime(base_s=0.05, per_sequence_s=0.0005, per_prefill_token_s=1 / 8000)


@pytest.fixture(scope="module")
def log() -> list[str]:
    """A crowded engine's log."""
    lines: list[str] = []
    policy = Andes(AndesConfig(step_time=STEP))
    policy.scheduler = AndesScheduler(
        AndesConfig(step_time=STEP), on_decision=lambda record: lines.append(json.dumps(record))
    )
    workload = cyclic_bursts(0.6, 120.0, seed=1, cycle_s=120.0)
    simulate(workload, EngineConfig(step_time=STEP, kv_tokens=5000), policy)
    return lines


def test_every_plan_is_made_again(log: list[str]) -> None:
    records = [json.loads(line) for line in log]
    assert len(records) > 50
    assert sum(len(record["pause"]) for record in records) > 0
    for record in records:
        again = plan_to_dict(replay_decision(record))
        assert again == {name: record[name] for name in again}


def test_other_options_show_what_would_have_been(log: list[str]) -> None:
    records = [json.loads(line) for line in log]
    assert sum(record["gain"] > 0.0 for record in records) > 0
    never = PlannerConfig(max_preemptions=0)  # no swaps then; a shortage still makes somebody pause
    assert all(replay_decision(record, never).gain == 0.0 for record in records)


def test_a_digest_names_the_situation(log: list[str]) -> None:
    records = [json.loads(line) for line in log]
    assert len({record["digest"] for record in records}) > 0.9 * len(records)
    with pytest.raises(KeyError):
        replay_decision({})
