"""``router_gain``: two replicas of unequal speed behind the QoE router and behind power of two.

The full profile measures two real engines of this machine, the second of which sleeps after each
step until it is as slow as asked; one endpoint serves every run, the request says which router it
wants. The quick profile has no time for two engines and takes the simulator, and says so.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from typing import Any

import numpy as np

from actors.andes.contest import (
    ContestConfig,
    contest_chats,
    contest_endpoint,
    mean_qoe,
    run_policy,
)
from actors.serving.client import ChatClient, Stream
from actors.serving.config import FleetConfig, ServingConfig
from actors.serving.endpoint import Endpoint, free_port
from actors.session import Session, SessionConfig
from jobs.bench.andes.cases import MACHINES
from raysys import scratch
from raysys.bench import Claim, ClaimFunction, Profile, paired_claim
from raysys.config import config_to_dict
from raysys.serving.andes.models import StepTime
from raysys.serving.andes.scheduler import AndesConfig
from raysys.serving.andes.simulator import fleet
from raysys.serving.andes.simulator.engine import EngineConfig
from raysys.serving.andes.simulator.policies import Andes
from raysys.serving.andes.simulator.workload import cyclic_bursts

ROUTERS = ("power_of_two", "qoe")
SLOWDOWN = 4.0
RATE_PER_S, DURATION_S = 1.3, 600.0
# As in the contest of one engine, but over a longer time: a router needs something to see, and
# what it decides matters as long as the burst lasts.
CONTEST = ContestConfig(chats=24, tokens=48, spread_s=12.0, tds=2.0, kv_tokens=1024)
ROUTING_CONFIG = {
    "router_contest": config_to_dict(CONTEST),
    "router_slowdown": SLOWDOWN,
    "router_simulated": {"cyclic_rate_per_s": RATE_PER_S, "duration_s": DURATION_S},
}


def router_gain(profile: Profile) -> Claim:
    """Mean QoE of all readers; the second of two replicas is four times slower."""
    seeds = [1, 2, 3]
    runs = {seed: _measured(seeds)[seed] if profile.full else _simulated(seed) for seed in seeds}
    return paired_claim(
        "router_gain",
        "mean QoE",
        "higher",
        ours=[runs[seed]["qoe"]["mean_qoe"] for seed in seeds],
        baseline_name="power of two choices",
        baseline=[runs[seed]["power_of_two"]["mean_qoe"] for seed in seeds],
        seeds=seeds,
        extra={"on": "two engines" if profile.full else "simulator", "runs": list(runs.values())},
    )


def _slower(step: StepTime, factor: float) -> StepTime:
    return StepTime(**{name: factor * value for name, value in dataclasses.asdict(step).items()})


def _simulated(seed: int) -> dict[str, Any]:
    base = MACHINES["base"]
    machines = [EngineConfig(step_time=base), EngineConfig(step_time=_slower(base, SLOWDOWN))]
    workload = cyclic_bursts(RATE_PER_S, DURATION_S, seed, cycle_s=DURATION_S)

    def policy(machine: EngineConfig) -> Andes:
        return Andes(AndesConfig(step_time=machine.step_time))

    row: dict[str, Any] = {"seed": seed}
    for router in fleet.ROUTERS:
        config = fleet.FleetConfig(router=router, seed=seed)
        result = fleet.simulate_fleet(workload, machines, policy, config)
        row[router] = {
            "mean_qoe": result.mean_qoe,
            "p10_qoe": float(np.percentile(result.qoe, 10)),
            "throughput": result.throughput,
            "to_the_fast_one": float((result.replica == 0).mean()),
        }
    return row


def router_endpoint(port: int, status_file: str) -> ServingConfig:
    """Two replicas of the contest's engine, the second one slowed down."""
    single = contest_endpoint(CONTEST, port, status_file)
    return dataclasses.replace(
        single,
        replicas=2,
        engine=dataclasses.replace(single.engine, bind_cores="nobind"),
        andes=dataclasses.replace(single.andes, slowdowns=(1.0, SLOWDOWN)),
        fleet=FleetConfig(switchable=True),
    )


_MEASURED: dict[int, dict[str, Any]] = {}


def _measured(seeds: list[int]) -> dict[int, dict[str, Any]]:
    """All runs on one pair of engines, the routers alternately.

    Raises:
        CapabilityError: vLLM or the packaged model is not installed.
        RemoteError: a stream failed.
    """
    import ray

    if _MEASURED:
        return _MEASURED
    with scratch.folder("andes") as folder:
        endpoint = router_endpoint(free_port(), str(folder / "status.json"))
        session = None if ray.is_initialized() else Session.start(SessionConfig(address="local"))
        try:
            with Endpoint.start(endpoint):
                client = ChatClient(endpoint.url, endpoint.model.name)
                # Both engines learn their own speed before anything counts.
                for router in ROUTERS:
                    run_policy(client, contest_chats(CONTEST, 1000), "andes", router=router)
                for index, seed in enumerate(seeds):
                    _MEASURED[seed] = {"seed": seed}
                    for router in ROUTERS if index % 2 == 0 else reversed(ROUTERS):
                        chats = contest_chats(CONTEST, seed)
                        streams = run_policy(client, chats, "andes", router=router)
                        figures = _MEASURED[seed][router] = _figures(streams)
                        # Long runs get interrupted: what was measured is told as it comes.
                        print(f"router_gain: seed {seed}, {router}: {figures}", file=sys.stderr)
        finally:
            if session is not None:
                session.close()
    return _MEASURED


def _figures(streams: list[Stream]) -> dict[str, float]:
    scores = [stream.outcome.qoe for stream in streams]
    return {
        "mean_qoe": mean_qoe(streams),
        "p10_qoe": float(np.percentile(scores, 10)),
        "ttft_s": statistics.median(float(stream.ttft_s or 0.0) for stream in streams),
    }


CLAIMS: dict[str, ClaimFunction] = {"router_gain": router_gain}
