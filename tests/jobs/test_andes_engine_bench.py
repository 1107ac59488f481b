"""The engine claims and the tour stage from known streams: what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from actors.andes.contest import ContestConfig, contest_chats, contest_endpoint, same_text
from actors.serving.client import Chat, Stream
from jobs.bench.andes import engine as andes_engine
from jobs.bench.andes.engine import Measured, engine_qoe_gain, sim_fidelity, workload_of
from jobs.tour.stages import serving
from raysys.bench import Profile
from raysys.config import load_config
from raysys.errors import ConfigError
from raysys.serving.andes.models import StepTime
from raysys.serving.andes.qoe import QoETracker

CONTEST = ContestConfig(chats=6, tokens=20)


def stream(chat: Chat, late_s: float, token: int = 7) -> Stream:
    """All tokens at once, ``late_s`` after the first was expected."""
    at = chat.spec.ttft_s + late_s
    tracker = QoETracker(chat.spec, 0.0)
    tracker.on_token(at, chat.max_tokens)
    return Stream(
        chat=chat,
        sent_s=chat.arrival_s,
        delivered_s=(at,) * chat.max_tokens,
        token_ids=(token,) * chat.max_tokens,
        text="",
        outcome=tracker.finish(at),
        prompt_tokens=30,
    )


def measured(late: dict[str, float], token: int = 7) -> Measured:
    streams = {
        (seed, policy): [stream(chat, late[policy]) for chat in contest_chats(CONTEST, seed)]
        for seed in (0, 1)
        for policy in ("fcfs", "andes")
    }
    streams[1, "andes"] = [stream(c, late["andes"], token) for c in contest_chats(CONTEST, 1)]
    return Measured(
        seeds=(0, 1),
        streams=streams,
        pauses=dict.fromkeys(streams, 3),
        step_time=StepTime(),
        endpoint=contest_endpoint(CONTEST, 1234, "status.json"),
    )


def closed_form(late_s: float) -> float:
    """Constant lateness: L / (L + 2 late), L the time to read the answer."""
    reading_s = CONTEST.tokens / CONTEST.tds
    return reading_s / (reading_s + 2 * late_s)


def test_the_gain_is_the_smallest_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = measured({"fcfs": 10.0, "andes": 2.0})
    monkeypatch.setattr(andes_engine, "measure", lambda seeds: runs)
    claim = engine_qoe_gain(Profile())
    assert claim.value == pytest.approx(closed_form(2.0) - closed_form(10.0))
    assert claim.baseline is not None
    assert claim.baseline.value == pytest.approx(closed_form(10.0))
    assert claim.samples["tokens_identical"] == [True, True]
    assert claim.samples["pauses"] == [3, 3]


def test_different_tokens_do_not_go_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = measured({"fcfs": 1.0, "andes": 1.0}, token=8)
    monkeypatch.setattr(andes_engine, "measure", lambda seeds: runs)
    assert engine_qoe_gain(Profile()).samples["tokens_identical"] == [True, False]


def test_the_simulator_gets_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = measured({"fcfs": 0.0, "andes": 0.0})
    monkeypatch.setattr(andes_engine, "measure", lambda seeds: runs)
    workload = workload_of(runs.streams[0, "fcfs"])
    assert np.all(np.diff(workload.arrival_s) >= 0)
    assert set(workload.prompt_tokens) == {30}
    assert set(workload.output_tokens) == {CONTEST.tokens}
    claim = sim_fidelity(Profile())
    # A fast step time leaves nobody waiting, in the simulator as in these streams.
    assert claim.value == pytest.approx(0.0, abs=0.02)
    assert {row["policy"] for row in claim.samples["runs"]} == {"fcfs", "andes"}


def test_the_burst_is_a_function_of_its_seed() -> None:
    first, again, other = (contest_chats(CONTEST, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert all(0.0 <= chat.arrival_s <= CONTEST.spread_s for chat in first)
    assert all(chat.exact_length for chat in first)


def test_text_is_compared_chat_by_chat() -> None:
    chats = contest_chats(CONTEST, 0)
    ours: Sequence[Stream] = [stream(chat, 0.0) for chat in chats]
    other = [*ours[:-1], stream(chats[-1], 0.0, token=8)]
    assert same_text(ours, ours)
    assert not same_text(ours, other)


@pytest.mark.parametrize("override", ["chats=0", "tokens=1", "spread_s=-1"])
def test_bad_contests_name_their_field(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ContestConfig, overrides=[override])
    assert caught.value.field == override.split("=", maxsplit=1)[0]


def test_the_stage_reports_both_policies_and_tells_of_different_texts() -> None:
    runs = measured({"fcfs": 10.0, "andes": 2.0}, token=8)
    streams = {policy: runs.streams[1, policy] for policy in ("fcfs", "andes")}
    for group in streams.values():  # a pace needs two times
        for index, one in enumerate(group):
            spread = tuple(t + 0.01 * k for k, t in enumerate(one.delivered_s))
            group[index] = Stream(
                chat=one.chat, sent_s=one.sent_s, delivered_s=spread, token_ids=one.token_ids,
                text="", outcome=one.outcome,
            )  # fmt: skip
    result = serving._result(CONTEST, streams)
    quality = result.rows[0]
    assert quality.baseline == pytest.approx(closed_form(10.0))
    assert quality.ours == pytest.approx(closed_form(2.0))
    assert any(note.startswith("NOT every answer") for note in result.notes)
    assert len(result.plots) == 1
