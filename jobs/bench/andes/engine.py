"""Andes' claims on the real engine: vLLM on this machine's CPU with SmolLM2, over HTTP.

One engine serves every run, because its start is what costs time; it changes its policy on request.
Targets and the KV room are scaled to the machine (:class:`actors.andes.contest.ContestConfig`).
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.andes.contest import (
    POLICIES,
    ContestConfig,
    contest_chats,
    contest_endpoint,
    mean_qoe,
    run_policy,
    same_text,
)
from actors.andes.engine_settings import idle_status
from actors.serving.client import ChatClient, Stream
from actors.serving.config import KV_BLOCK, ServingConfig
from actors.serving.endpoint import Endpoint, free_port
from actors.session import Session, SessionConfig
from raysys import scratch
from raysys.bench import Baseline, Claim, ClaimFunction, Profile
from raysys.config import config_to_dict
from raysys.serving.andes.models import StepTime
from raysys.serving.andes.simulator.engine import EngineConfig as SimConfig
from raysys.serving.andes.simulator.policies import policy_named
from raysys.serving.andes.simulator.result import simulate
from raysys.serving.andes.simulator.workload import Workload

RUNS = 3
WARM_UP_CHATS = 8
CONTEST = ContestConfig()
ENGINE_CONFIG = {"engine_contest": config_to_dict(CONTEST)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """All runs on one engine: per seed and policy the streams, and the fitted step time."""

    seeds: tuple[int, ...]
    streams: dict[tuple[int, str], list[Stream]]
    pauses: dict[tuple[int, str], int]
    step_time: StepTime
    endpoint: ServingConfig


@functools.cache
def measure(seeds: tuple[int, ...]) -> Measured:
    """Run the contest for each seed under both policies, alternately, on one engine.

    Raises:
        CapabilityError: vLLM or the packaged model is not installed.
        RemoteError: a stream failed.
    """
    import ray

    streams: dict[tuple[int, str], list[Stream]] = {}
    pauses: dict[tuple[int, str], int] = {}
    with scratch.folder("andes") as folder:
        status_file = folder / "status.json"
        endpoint = contest_endpoint(CONTEST, free_port(), str(status_file))
        session = None if ray.is_initialized() else Session.start(SessionConfig(address="local"))
        try:
            with Endpoint.start(endpoint):
                client = ChatClient(endpoint.url, endpoint.model.name)
                run_policy(client, contest_chats(CONTEST, 1000)[:WARM_UP_CHATS], "andes")
                for index, seed in enumerate(seeds):
                    for policy in POLICIES if index % 2 == 0 else reversed(POLICIES):
                        before = idle_status(status_file)["pauses"]
                        streams[seed, policy] = run_policy(
                            client, contest_chats(CONTEST, seed), policy
                        )
                        pauses[seed, policy] = idle_status(status_file)["pauses"] - before
                step_time = StepTime(**idle_status(status_file)["step_time"])
        finally:
            if session is not None:
                session.close()
    return Measured(
        seeds=seeds, streams=streams, pauses=pauses, step_time=step_time, endpoint=endpoint
    )


def engine_qoe_gain(profile: Profile) -> Claim:
    """Mean QoE at the clients, Andes minus FCFS, in every run; the smallest difference counts."""
    measured = measure(seeds_of(profile))
    ours = [mean_qoe(measured.streams[seed, "andes"]) for seed in measured.seeds]
    stock = [mean_qoe(measured.streams[seed, "fcfs"]) for seed in measured.seeds]
    gains = [one - two for one, two in zip(ours, stock)]
    same = [
        same_text(measured.streams[seed, "fcfs"], measured.streams[seed, "andes"])
        for seed in measured.seeds
    ]
    return Claim(
        name="engine_qoe_gain",
        value=min(gains),
        unit="mean QoE, Andes minus FCFS, smallest of the runs",
        better="higher",
        baseline=Baseline(name="FCFS mean QoE, median of the runs", value=statistics.median(stock)),
        ratio=statistics.median(one / two for one, two in zip(ours, stock)),
        samples={
            "andes": ours,
            "fcfs": stock,
            "gain": gains,
            "tokens_identical": same,
            "pauses": [measured.pauses[seed, "andes"] for seed in measured.seeds],
            "throughput_ratio": [_throughput_ratio(measured, seed) for seed in measured.seeds],
        },
        seeds=list(measured.seeds),
    )


def sim_fidelity(profile: Profile) -> Claim:
    """Largest distance between the simulator's and the engine's mean QoE for equal arrivals."""
    measured = measure(seeds_of(profile))
    rows: list[dict[str, Any]] = []
    for seed in measured.seeds:
        for policy in POLICIES:
            streams = measured.streams[seed, policy]
            result = simulate(
                workload_of(streams),
                sim_config(measured),
                policy_named(policy, measured.endpoint.andes.scheduler),
            )
            rows.append(
                {
                    "seed": seed,
                    "policy": policy,
                    "engine": mean_qoe(streams),
                    "simulator": result.mean_qoe,
                    "throughput_engine": _throughput(streams),
                    "throughput_simulator": result.throughput,
                }
            )
    distances = [abs(row["engine"] - row["simulator"]) for row in rows]
    return Claim(
        name="sim_fidelity",
        value=max(distances),
        unit="mean QoE, largest distance between simulator and engine",
        better="lower",
        samples={"runs": rows, "step_time": config_to_dict(measured.step_time)},
        seeds=list(measured.seeds),
    )


def seeds_of(profile: Profile) -> tuple[int, ...]:
    """Seeds of the engine's runs: one in the quick profile, whose time is short."""
    return tuple(range(profile.pick(1, RUNS)))


def workload_of(streams: Sequence[Stream]) -> Workload:
    """What was really sent, in order of sending: the simulator gets the same."""
    ordered = sorted(streams, key=lambda stream: stream.sent_s)
    specs = [stream.chat.spec for stream in ordered]
    return Workload(
        name="engine contest",
        arrival_s=np.array([stream.sent_s for stream in ordered]),
        prompt_tokens=np.array([stream.prompt_tokens for stream in ordered], dtype=np.int64),
        output_tokens=np.array([len(s.delivered_s) for s in ordered], dtype=np.int64),
        ttft_s=np.array([spec.ttft_s for spec in specs]),
        tau_s=np.array([spec.tau_s for spec in specs]),
        weight=np.array([spec.weight for spec in specs]),
    )


def sim_config(measured: Measured) -> SimConfig:
    """The simulated twin of the engine: its room and the step time that it learned."""
    engine = measured.endpoint.engine
    return SimConfig(
        step_time=measured.step_time,
        kv_tokens=engine.kv_tokens or CONTEST.kv_tokens,
        block_tokens=KV_BLOCK,
        max_batch=engine.max_num_seqs,
        step_tokens=engine.max_num_batched_tokens,
        prefix_cache=engine.prefix_caching,
    )


def _throughput(streams: Sequence[Stream]) -> float:
    begin = min(stream.sent_s for stream in streams)
    end = max(stream.sent_s + stream.delivered_s[-1] for stream in streams)
    return sum(len(stream.delivered_s) for stream in streams) / (end - begin)


def _throughput_ratio(measured: Measured, seed: int) -> float:
    ours, stock = (_throughput(measured.streams[seed, name]) for name in ("andes", "fcfs"))
    return ours / stock


CLAIMS: dict[str, ClaimFunction] = {
    "engine_qoe_gain": engine_qoe_gain,
    "sim_fidelity": sim_fidelity,
}
