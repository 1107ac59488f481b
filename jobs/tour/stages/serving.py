"""Tour stage: a burst of streaming chats to a real engine, measured at the client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.serving.client import (
    BurstReport,
    Chat,
    ChatClient,
    Stream,
    require_complete,
    summarize_burst,
)
from actors.serving.config import EngineConfig, ServingConfig
from actors.serving.endpoint import Endpoint, free_port
from jobs.tour.stage import Row, Stage, StageContext, StageResult
from raysys.report import Plot, new_figure
from raysys.serving.andes.qoe import QoESpec
from raysys.serving.prompts import PROMPTS

SPEC = QoESpec(ttft_s=1.0, tds=4.8)
SPREAD_S = 1.0  # the burst's chats arrive within this time


def run(context: StageContext) -> StageResult:
    """Start an engine, send chats one at a time and then at once, compare."""
    chats = make_chats(3 if context.smoke else 16, 12 if context.smoke else 48, context.seed)
    alone = chats[: 1 if context.smoke else 5]
    steps = len(alone) + len(chats) + 2
    done = 0

    def advance(text: str, amount: int = 1) -> None:
        nonlocal done
        done += amount
        context.progress(done, steps, text)

    engine = EngineConfig(max_model_len=1024, max_num_seqs=16, kv_tokens=8192)
    config = ServingConfig(port=free_port(), engine=engine)
    with Endpoint.start(config, report=lambda text: advance(text, 0)):
        advance("warming up", 2)
        client = ChatClient(config.url, config.model.name)
        require_complete(client.one_by_one(chats[:1]))
        reference = client.one_by_one(alone, lambda stream: advance("one at a time"))
        burst = client.burst(chats, lambda stream: advance("burst"))
    require_complete([*reference, *burst])
    return _result(summarize_burst(reference), summarize_burst(burst), burst)


def make_chats(count: int, max_tokens: int, seed: int) -> list[Chat]:
    """Chats with Poisson-like arrivals inside one second."""
    arrivals = np.sort(np.random.default_rng(seed).uniform(0.0, SPREAD_S, count))
    return [
        Chat(
            prompt=PROMPTS[index % len(PROMPTS)],
            spec=SPEC,
            arrival_s=float(arrival),
            max_tokens=max_tokens,
            exact_length=True,
        )
        for index, arrival in enumerate(arrivals)
    ]


def _result(alone: BurstReport, burst: BurstReport, streams: Sequence[Stream]) -> StageResult:
    name = "one at a time"
    rows = [
        _row("time to first token, median", "s", "lower", name, alone.ttft_s, burst.ttft_s),
        _row("pace of a stream, median", "tokens/s", "higher", name, alone.pace, burst.pace),
        _row("mean QoE of the readers", "0..1", "higher", name, alone.mean_qoe, burst.mean_qoe),
        _row("throughput", "tokens/s", "higher", name, alone.tokens_per_s, burst.tokens_per_s),
    ]
    notes = [
        f"SmolLM2-135M-Instruct on vLLM behind Ray Serve; {burst.streams} streaming chats within "
        f"{SPREAD_S:g} s against {alone.streams} sent one after the other",
        f"targets: first token in {SPEC.ttft_s:g} s, then {SPEC.tds:g} tokens/s; worst QoE of the "
        f"burst {burst.worst_qoe:.3f}",
    ]
    return StageResult(rows=rows, plots=[delivery_plot(streams)], notes=notes)


def _row(measure: str, unit: str, better: Any, name: str, baseline: float, ours: float) -> Row:
    return Row(
        measure=measure,
        unit=unit,
        better=better,
        baseline_name=name,
        baseline=baseline,
        ours=ours,
    )


def delivery_plot(streams: Sequence[Stream]) -> Plot:
    """Tokens over time for each stream, against the line that its reader expects."""
    figure, axes = new_figure()
    longest = max(len(stream.delivered_s) for stream in streams)
    for stream in streams:
        axes.step(
            stream.delivered_s,
            np.arange(1, len(stream.delivered_s) + 1),
            where="post",
            alpha=0.6,
            linewidth=1.0,
        )
    ideal = SPEC.ttft_s + np.arange(longest) * SPEC.tau_s
    axes.plot(ideal, np.arange(1, longest + 1), "k--", linewidth=1.5, label="expected")
    axes.set_xlabel("seconds since the chat was sent")
    axes.set_ylabel("tokens delivered")
    axes.legend(loc="lower right")
    return Plot(
        title="Delivery of each stream in the burst",
        caption="A stream left of the dashed line is ahead of its reader (QoE 1).",
        figure=figure,
    )


STAGE = Stage(
    name="serving",
    title="Serving streamed text",
    problem="Many people read answers at once; each wants the first word soon and then a steady "
    "pace, from one engine that they share.",
    command="raysys serve",
    run=run,
)
