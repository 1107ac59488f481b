"""FCFS against Andes on one real engine: the same chats, the same engine, only the order differs.

Targets are scaled to the machine. A CPU serves a few sequences at reading speed where a GPU serves
hundreds, so the KV room is made small enough to contend and readers are slowed down until the
engine could satisfy all of them in time, which is the case that the paper is about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from actors.andes.engine_settings import AndesEngineConfig
from actors.serving.client import Chat, ChatClient, Stream, require_complete
from actors.serving.config import EngineConfig, ServingConfig
from raysys.config import check_range
from raysys.serving.andes.controller import ControllerConfig
from raysys.serving.andes.models import StepTime
from raysys.serving.andes.options import PlannerConfig
from raysys.serving.andes.qoe import QoESpec
from raysys.serving.andes.scheduler import AndesConfig
from raysys.serving.prompts import PROMPTS

POLICIES = ("fcfs", "andes")
# Where the latency model starts, for this model on one core; it learns the machine's own figures
# after some steps. The general default, a GPU's, would call restores nearly free here.
CPU_STEP_TIME = StepTime(base_s=0.055, per_sequence_s=0.006, per_prefill_token_s=0.0015)


@dataclass(frozen=True, kw_only=True, slots=True)
class ContestConfig:
    """A burst that contends for the KV room.

    Args:
        chats: chats in the burst.
        tokens: length of every answer.
        spread_s: the burst's arrivals lie within this time.
        ttft_s, tds: what every reader expects.
        kv_tokens: KV room of the engine.
        max_model_len: longest prompt and answer.
        horizon_s: look-ahead of the planner, about the time that an answer takes here.
        guard_s: unread text that makes a reader pausable.
        guard_room_factor: see :class:`~raysys.serving.andes.planner.PlannerConfig`; small, because
            the whole room is only a few answers.
    """

    chats: int = 16
    tokens: int = 48
    spread_s: float = 2.0
    ttft_s: float = 1.0
    tds: float = 1.5
    kv_tokens: int = 416
    max_model_len: int = 256
    horizon_s: float = 20.0
    guard_s: float = 5.0
    guard_room_factor: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "chats", 1)
        check_range(self, "tokens", 2)
        check_range(self, "spread_s", 0.0)

    @property
    def spec(self) -> QoESpec:
        return QoESpec(ttft_s=self.ttft_s, tds=self.tds)


def contest_endpoint(config: ContestConfig, port: int, status_file: str) -> ServingConfig:
    """The endpoint whose engine obeys the policy that a request names."""
    planner = PlannerConfig(
        horizon_s=config.horizon_s,
        guard_s=config.guard_s,
        guard_room_factor=config.guard_room_factor,
        growth_tokens=4.0,  # the KV of a request is already counted in whole blocks
        plan_every=4,
    )
    andes = AndesEngineConfig(
        # A room of a few answers makes restores a larger share of the work than a real room does.
        scheduler=AndesConfig(
            planner=planner,
            controller=ControllerConfig(max_waste=0.30, resume_waste=0.10),
            step_time=CPU_STEP_TIME,
        ),
        switchable=True,
        status_file=status_file,
    )
    engine = EngineConfig(
        policy="andes",
        max_model_len=config.max_model_len,
        max_num_seqs=32,
        kv_tokens=config.kv_tokens,
        prefix_caching=True,
    )
    return ServingConfig(port=port, engine=engine, andes=andes)


def contest_chats(config: ContestConfig, seed: int) -> list[Chat]:
    """The burst: uniform arrivals within ``spread_s``, prompts in shuffled order."""
    generator = np.random.default_rng(seed)
    arrivals = np.sort(generator.uniform(0.0, config.spread_s, config.chats))
    order = generator.permutation(config.chats)
    return [
        Chat(
            prompt=PROMPTS[int(pick) % len(PROMPTS)],
            spec=config.spec,
            arrival_s=float(arrival),
            max_tokens=config.tokens,
            exact_length=True,
        )
        for pick, arrival in zip(order, arrivals)
    ]


def run_policy(
    client: ChatClient,
    chats: Sequence[Chat],
    policy: str,
    on_done: Callable[[Stream], None] | None = None,
    *,
    router: str | None = None,
) -> list[Stream]:
    """Send the burst under a policy (and by a router, on an endpoint that lets clients choose it).

    Every stream must be complete.

    Raises:
        RemoteError: a stream failed.
    """
    streams = client.burst([replace(chat, policy=policy, router=router) for chat in chats], on_done)
    require_complete(streams)
    return streams


def mean_qoe(streams: Sequence[Stream]) -> float:
    """Mean QoE at the clients."""
    return float(np.mean([stream.outcome.qoe for stream in streams]))


def same_text(first: Sequence[Stream], second: Sequence[Stream]) -> bool:
    """Whether each chat got the same tokens in both runs (greedy decoding)."""
    return all(one.token_ids == two.token_ids for one, two in zip(first, second, strict=True))
