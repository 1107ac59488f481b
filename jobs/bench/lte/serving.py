"""The burst of the Andes benchmark, served by the dense and by the LTE model on one kind of
endpoint.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.andes.contest import (
    ContestConfig,
    contest_chats,
    contest_endpoint,
    mean_qoe,
    run_policy,
)
from actors.serving.client import ChatClient, Stream
from actors.serving.config import ModelConfig
from actors.serving.endpoint import Endpoint, free_port
from actors.session import Session, SessionConfig
from jobs.bench.lte import models
from raysys import scratch
from raysys.bench import Baseline, Claim, Profile

CONTEST = ContestConfig()
SPARSITY = 0.5


def andes_with_lte(profile: Profile) -> Claim:
    """Mean QoE of the burst under Andes' scheduler, LTE minus dense, and both throughputs.

    The LTE model has fitted routers: its speed is that of its sparsity, its words are not to be
    read.
    """
    seeds = tuple(range(profile.pick(1, 3)))
    runs = {
        name: _serve(folder, seeds)
        for name, folder in (
            ("dense", models.dense_model()),
            ("lte", models.fitted_model(SPARSITY)),
        )
    }
    qoe = {name: [mean_qoe(streams) for streams in found] for name, found in runs.items()}
    speed = {name: [_throughput(streams) for streams in found] for name, found in runs.items()}
    gains = [ours - base for ours, base in zip(qoe["lte"], qoe["dense"])]
    return Claim(
        name="andes_with_lte",
        value=statistics.median(gains),
        unit="mean QoE, LTE minus dense",
        better="higher",
        baseline=Baseline(name="dense, mean QoE", value=statistics.median(qoe["dense"])),
        ratio=statistics.median(a / b for a, b in zip(speed["lte"], speed["dense"])),
        samples={"qoe": qoe, "tokens_per_s": speed, "ratio": "throughput, LTE over dense"},
        seeds=list(seeds),
    )


def _serve(folder: Path, seeds: Sequence[int]) -> list[list[Stream]]:
    """The burst for every seed on a fresh endpoint, after a warm-up."""
    import ray

    with scratch.folder("lte") as status:
        endpoint = contest_endpoint(CONTEST, free_port(), str(status / "status.json"))
        model = ModelConfig(name="burst", folder=str(folder))
        endpoint = dataclasses.replace(endpoint, model=model)
        session: Any = None
        if not ray.is_initialized():
            session = Session.start(SessionConfig(address="local"))
        try:
            with Endpoint.start(endpoint):
                client = ChatClient(endpoint.url, endpoint.model.name)
                run_policy(client, contest_chats(CONTEST, 1000)[:4], "andes")
                return [run_policy(client, contest_chats(CONTEST, seed), "andes") for seed in seeds]
        finally:
            if session is not None:
                session.close()


def _throughput(streams: Sequence[Stream]) -> float:
    begin = min(stream.sent_s for stream in streams)
    end = max(stream.sent_s + stream.delivered_s[-1] for stream in streams)
    return sum(len(stream.delivered_s) for stream in streams) / (end - begin)
