"""Several simulated engines behind a router, and a tenant that claims to read 1,000 tokens/s."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from raysys.errors import ConfigError
from raysys.serving.andes.models import StepTime
from raysys.serving.andes.options import PlannerConfig
from raysys.serving.andes.scheduler import AndesConfig
from raysys.serving.andes.simulator.engine import EngineConfig
from raysys.serving.andes.simulator.fleet import ROUTERS, FleetConfig, simulate_fleet
from raysys.serving.andes.simulator.policies import Andes, Fcfs
from raysys.serving.andes.simulator.result import simulate
from raysys.serving.andes.simulator.workload import Workload, cyclic_bursts, poisson

FAST = StepTime(base_s=0.05, per_sequence_s=0.0005, per_prefill_token_s=1 / 8000)
SLOW = StepTime(base_s=0.20, per_sequence_s=0.002, per_prefill_token_s=1 / 2000)
PAIR = [EngineConfig(step_time=FAST, kv_tokens=8000), EngineConfig(step_time=SLOW, kv_tokens=8000)]


def andes(machine: EngineConfig) -> Andes:
    return Andes(AndesConfig(step_time=machine.step_time))


def fcfs(machine: EngineConfig) -> Fcfs:
    return Fcfs()


def test_a_fleet_of_one_is_the_engine() -> None:
    workload = poisson(0.5, 120.0, seed=3)
    machine = EngineConfig(step_time=FAST, kv_tokens=6000)
    alone = simulate(workload, machine, Fcfs())
    fleet = simulate_fleet(workload, [machine], fcfs)
    assert fleet.qoe == pytest.approx(alone.qoe, abs=1e-9)
    assert fleet.throughput == pytest.approx(alone.throughput)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_is_served_once(router: str) -> None:
    workload = poisson(1.0, 60.0, seed=1)
    result = simulate_fleet(workload, PAIR, andes, FleetConfig(router=router))
    assert result.qoe.shape == (workload.size,)
    assert np.isfinite(result.ttft_s).all()
    assert set(result.replica) <= {0, 1}


def test_unequal_replicas_are_used_as_fast_as_they_are() -> None:
    workload = cyclic_bursts(0.55, 400.0, seed=2, cycle_s=400.0)
    ours, other = (
        simulate_fleet(workload, PAIR, andes, FleetConfig(router=router))
        for router in ("qoe", "power_of_two")
    )
    assert ours.mean_qoe > other.mean_qoe
    assert (ours.replica == 0).mean() > 0.7


def test_a_fleet_needs_a_machine() -> None:
    with pytest.raises(ConfigError, match="machines"):
        simulate_fleet(poisson(1.0, 5.0, seed=0), [], fcfs)


def overstating(workload: Workload, share: float, seed: int) -> tuple[Workload, np.ndarray]:
    """A part of the readers claims 1,000 tokens/s and a first token at once."""
    greedy = np.random.default_rng(seed).random(workload.size) < share
    tau_s = np.where(greedy, 0.001, workload.tau_s)
    ttft_s = np.where(greedy, 0.0, workload.ttft_s)
    return dataclasses.replace(workload, tau_s=tau_s, ttft_s=ttft_s), greedy


def test_a_tenant_that_asks_for_1000_tokens_a_second_starves_nobody() -> None:
    honest = cyclic_bursts(0.45, 400.0, seed=4, cycle_s=400.0)
    claims, greedy = overstating(honest, 0.3, seed=5)
    machine = EngineConfig(step_time=FAST, kv_tokens=8000)

    def others(workload: Workload, **planner: float) -> float:
        config = AndesConfig(step_time=FAST, planner=PlannerConfig(**planner))
        return float(simulate(workload, machine, Andes(config)).qoe[~greedy].mean())

    undisturbed = others(honest)
    limited = others(claims)
    unlimited = others(claims, max_tds=1000.0)
    assert limited >= undisturbed - 0.03
    assert limited >= unlimited
