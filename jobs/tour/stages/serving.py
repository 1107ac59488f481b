"""Tour stage: the same burst of chats under FCFS and under Andes, on one real engine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.andes.contest import (
    POLICIES,
    ContestConfig,
    contest_chats,
    contest_endpoint,
    run_policy,
    same_text,
)
from actors.serving.client import BurstReport, ChatClient, Stream, summarize_burst
from actors.serving.endpoint import Endpoint, free_port
from jobs.tour.stage import Row, Stage, StageContext, StageResult
from raysys import scratch
from raysys.report import Plot, new_figure, series_color

SMOKE = ContestConfig(chats=6, tokens=24, kv_tokens=256, spread_s=0.5)
STANDARD = ContestConfig()


def run(context: StageContext) -> StageResult:
    """Start one engine, send the burst under each policy, compare what the readers saw."""
    contest = SMOKE if context.smoke else STANDARD
    chats = contest_chats(contest, context.seed)
    steps = len(POLICIES) * len(chats) + 2
    done = 0

    def advance(text: str, amount: int = 1) -> None:
        nonlocal done
        done += amount
        context.progress(done, steps, text)

    def tick(policy: str, stream: Stream) -> None:
        advance(f"burst, {policy}")

    streams: dict[str, list[Stream]] = {}
    with scratch.folder("andes") as folder:
        status_file = str(folder / "status.json")
        config = contest_endpoint(contest, free_port(), status_file)
        with Endpoint.start(config, report=lambda text: advance(text, 0)):
            advance("warming up", 2)
            client = ChatClient(config.url, config.model.name)
            run_policy(client, chats[: max(2, len(chats) // 4)], "andes")
            for policy in POLICIES:
                streams[policy] = run_policy(client, chats, policy, functools.partial(tick, policy))
    return _result(contest, streams)


def _result(contest: ContestConfig, streams: dict[str, list[Stream]]) -> StageResult:
    fcfs, andes = (summarize_burst(streams[policy]) for policy in POLICIES)
    rows = [
        _row("mean QoE of the readers", "0..1", "higher", fcfs, andes, "mean_qoe"),
        _row("worst QoE of a reader", "0..1", "higher", fcfs, andes, "worst_qoe"),
        _row("time to first token, median", "s", "lower", fcfs, andes, "ttft_s"),
        _row("throughput", "tokens/s", "higher", fcfs, andes, "tokens_per_s"),
    ]
    same = same_text(streams["fcfs"], streams["andes"])
    notes = [
        f"SmolLM2-135M-Instruct on vLLM behind Ray Serve; {contest.chats} streaming chats within "
        f"{contest.spread_s:g} s, {contest.tokens} tokens each, KV room for {contest.kv_tokens} "
        "tokens; measured at the client",
        f"targets scaled to this machine: first token in {contest.ttft_s:g} s, then "
        f"{contest.tds:g} tokens/s",
        "every answer has the same tokens under both policies"
        if same
        else "NOT every answer has the same tokens under both policies",
    ]
    return StageResult(rows=rows, plots=[delivery_plot(contest, streams)], notes=notes)


def _row(
    measure: str, unit: str, better: Any, fcfs: BurstReport, andes: BurstReport, field: str
) -> Row:
    return Row(
        measure=measure,
        unit=unit,
        better=better,
        baseline_name="vLLM, first come first served",
        baseline=getattr(fcfs, field),
        ours=getattr(andes, field),
    )


def delivery_plot(contest: ContestConfig, streams: dict[str, list[Stream]]) -> Plot:
    """Tokens over time for each stream under each policy, against what its reader expects."""
    figure, axes = new_figure(1, len(POLICIES), width=9.0)
    spec = contest.spec
    numbers = np.arange(1, contest.tokens + 1)
    latest = max(stream.delivered_s[-1] for runs in streams.values() for stream in runs)
    for column, policy in enumerate(POLICIES):
        panel = axes.flat[column]
        _draw(panel, streams[policy], series_color(column))
        panel.plot(spec.ttft_s + (numbers - 1) * spec.tau_s, numbers, "--", color="#8a8f98")
        panel.set_xlim(0, latest)
        panel.set_title("first come first served" if policy == "fcfs" else "Andes")
        panel.set_xlabel("seconds since the chat was sent")
    axes.flat[0].set_ylabel("tokens delivered")
    return Plot(
        title="Delivery of each stream in the burst",
        caption="Each line is one chat; the dashed line is what its reader expects. Lines left of "
        "it are on time. Andes pauses readers who hold unread text and lets the others start.",
        figure=figure,
    )


def _draw(panel: Any, streams: Sequence[Stream], color: str) -> None:
    for stream in streams:
        counts = np.arange(1, len(stream.delivered_s) + 1)
        panel.step(stream.delivered_s, counts, where="post", color=color, alpha=0.5, linewidth=1.0)


STAGE = Stage(
    name="serving",
    title="Andes: serving by the readers' experience",
    problem="Many people read answers at once; each wants the first word soon and then a steady "
    "pace, from one engine that they share.",
    command="raysys serve",
    run=run,
)
