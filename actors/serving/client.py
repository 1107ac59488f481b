"""Sends chats with the official OpenAI client and measures what their readers see.

Arrivals are open-loop: each chat is sent at its own time, whatever became of the others, because a
cap on concurrency would hide the queue. Times are the client's, from the moment of sending.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.andes.engine_settings import POLICY_FIELD, ROUTER_FIELD
from actors.serving.endpoint import quiet_logs
from raysys.errors import CapabilityError, RemoteError
from raysys.serving.andes.qoe import FinishReason, Outcome, QoESpec, QoETracker

REQUEST_TIMEOUT_S = 600.0
NO_KEY = "none"  # the OpenAI client wants one even where the endpoint does not


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """One chat to send.

    Args:
        prompt: what the user writes.
        spec: the QoE targets, sent with the request and used for scoring.
        arrival_s: when it is sent, seconds after the start of the burst.
        max_tokens: length limit of the answer.
        exact_length: ignore the model's own end, so that every run has the same lengths.
        policy: ask a switchable engine for ``"fcfs"`` or ``"andes"``; None says nothing.
        router: ask a switchable fleet for ``"qoe"`` or ``"power_of_two"``; None says nothing.
    """

    prompt: str
    spec: QoESpec = field(default_factory=QoESpec)
    arrival_s: float = 0.0
    max_tokens: int = 64
    exact_length: bool = False
    policy: str | None = None
    router: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """What came back for one chat.

    Args:
        chat: what was sent.
        sent_s: when, seconds after the start of the burst.
        delivered_s: arrival of each token, seconds after sending.
        token_ids: the tokens.
        text: the answer.
        outcome: the QoE account.
        error: what went wrong, or None.
        prompt_tokens: length of the prompt as the engine counts it; 0 where it did not tell.
    """

    chat: Chat
    sent_s: float
    delivered_s: tuple[float, ...]
    token_ids: tuple[int, ...]
    text: str
    outcome: Outcome
    error: str | None = None
    prompt_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token."""
        return self.delivered_s[0] if self.delivered_s else None

    @property
    def pace(self) -> float | None:
        """Tokens per second after the first one; None for less than two."""
        if len(self.delivered_s) < 2:
            return None
        span = self.delivered_s[-1] - self.delivered_s[0]
        return (len(self.delivered_s) - 1) / span if span > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class BurstReport:
    """A burst in figures: medians over its streams, QoE over all of them, failures included."""

    streams: int
    failed: int
    ttft_s: float
    pace: float
    mean_qoe: float
    worst_qoe: float
    tokens_per_s: float
    duration_s: float


def qoe_fields(spec: QoESpec) -> dict[str, float | str]:
    """The request fields that carry a spec (``vllm_xargs`` in the body)."""
    fields: dict[str, float | str] = {
        "qoe_ttft_s": spec.ttft_s,
        "qoe_tds": spec.tds,
        "qoe_weight": spec.weight,
        "qoe_kind": spec.kind,
    }
    return fields | ({"qoe_tenant": spec.tenant} if spec.tenant else {})


class ChatClient:
    """Streams chats from an OpenAI-compatible endpoint.

    Args:
        base_url: such as ``"http://127.0.0.1:8000/v1"``.
        model: name of the model at the endpoint.
        api_key: key, where the endpoint wants one.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            reason, remedy = str(error), "Run `make setup`, or pip install 'raysys[serving]'"
            raise CapabilityError("the OpenAI client", reason, remedy) from error
        quiet_logs()
        self._openai = openai
        self._options: dict[str, Any] = {
            "base_url": base_url,
            "api_key": api_key or NO_KEY,
            "max_retries": 0,
            "timeout": REQUEST_TIMEOUT_S,
        }
        self.base_url = base_url
        self.model = model
        self._clock = clock

    def burst(
        self, chats: Sequence[Chat], on_done: Callable[[Stream], None] | None = None
    ) -> list[Stream]:
        """Send all chats at their times and return their streams in the same order.

        A failed chat is a stream with an ``error``, never an exception.
        """
        return asyncio.run(self._burst(chats, on_done))

    def one_by_one(
        self, chats: Sequence[Chat], on_done: Callable[[Stream], None] | None = None
    ) -> list[Stream]:
        """Send each chat when the one before has ended: the unloaded endpoint."""

        async def send_all() -> list[Stream]:
            async with self._openai.AsyncOpenAI(**self._options) as client:
                start = self._clock()
                streams = []
                for chat in chats:
                    streams.append(await self._send(client, chat, start))
                    if on_done:
                        on_done(streams[-1])
                return streams

        return asyncio.run(send_all())

    async def _burst(
        self, chats: Sequence[Chat], on_done: Callable[[Stream], None] | None
    ) -> list[Stream]:
        async with self._openai.AsyncOpenAI(**self._options) as client:
            start = self._clock()

            async def at_its_time(chat: Chat) -> Stream:
                await asyncio.sleep(max(0.0, chat.arrival_s - (self._clock() - start)))
                stream = await self._send(client, chat, start)
                if on_done:
                    on_done(stream)
                return stream

            return list(await asyncio.gather(*map(at_its_time, chats)))

    async def _send(self, client: Any, chat: Chat, start: float) -> Stream:
        sent = self._clock()
        collector = _Collector(chat, sent)
        reason: FinishReason = "stop"
        error = None
        try:
            response = await client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": chat.prompt}],
                max_tokens=chat.max_tokens,
                temperature=0.0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={
                    "ignore_eos": chat.exact_length,
                    "return_token_ids": True,
                    "vllm_xargs": qoe_fields(chat.spec) | switches(chat),
                },
            )
            async for chunk in response:
                collector.add(chunk, self._clock())
            if not collector.ended:
                reason, error = "error", "the stream ended without its last event"
        except self._openai.OpenAIError as problem:
            reason, error = "error", describe_failure(problem)
        outcome = collector.tracker.finish(self._clock(), reason)
        return Stream(
            chat=chat,
            sent_s=sent - start,
            delivered_s=tuple(collector.delivered_s),
            token_ids=tuple(collector.token_ids),
            text="".join(collector.text),
            outcome=outcome,
            error=error,
            prompt_tokens=collector.prompt_tokens,
        )


class _Collector:
    """Gathers the chunks of one stream."""

    def __init__(self, chat: Chat, sent: float) -> None:
        self.tracker = QoETracker(chat.spec, sent)
        self.sent = sent
        self.delivered_s: list[float] = []
        self.token_ids: list[int] = []
        self.text: list[str] = []
        self.ended = False
        self.prompt_tokens = 0

    def add(self, chunk: Any, now: float) -> None:
        if chunk.usage is not None:
            self.prompt_tokens = chunk.usage.prompt_tokens
        for choice in chunk.choices:
            self.ended |= choice.finish_reason is not None
            content = choice.delta.content or ""
            token_ids = getattr(choice, "token_ids", None)
            if token_ids is None:  # an endpoint that does not tell: one token per piece of text
                token_ids = [-1] if content else []
            self.tracker.on_token(now, len(token_ids))
            self.delivered_s += [now - self.sent] * len(token_ids)
            self.token_ids += token_ids
            self.text.append(content)


def switches(chat: Chat) -> dict[str, float | str]:
    """The request fields that choose a policy and a router."""
    wanted = {POLICY_FIELD: chat.policy, ROUTER_FIELD: chat.router}
    return {name: value for name, value in wanted.items() if value}


def describe_failure(problem: Exception) -> str:
    """One line for a failed request: the kind of error, its status, and the server's words."""
    status = getattr(problem, "status_code", None)
    words = " ".join(str(problem).split())
    if len(words) > 300:
        words = words[:297] + "..."
    return f"{type(problem).__name__}{f' {status}' if status else ''}: {words}"


def summarize_burst(streams: Sequence[Stream]) -> BurstReport:
    """Put a burst into figures.

    Raises:
        RemoteError: no stream delivered a token.
    """
    ttft = [stream.ttft_s for stream in streams if stream.ttft_s is not None]
    pace = [stream.pace for stream in streams if stream.pace is not None]
    if not ttft or not pace:
        errors = {stream.error for stream in streams if stream.error}
        raise RemoteError("serving endpoint", f"no stream delivered text ({'; '.join(errors)})")
    scores = [stream.outcome.qoe for stream in streams if stream.outcome.counted]
    begin = min(stream.sent_s for stream in streams)
    end = max(s.sent_s + s.delivered_s[-1] for s in streams if s.delivered_s)
    tokens = sum(len(stream.delivered_s) for stream in streams)
    return BurstReport(
        streams=len(streams),
        failed=sum(stream.error is not None for stream in streams),
        ttft_s=statistics.median(ttft),
        pace=statistics.median(pace),
        mean_qoe=statistics.fmean(scores),
        worst_qoe=min(scores),
        tokens_per_s=tokens / (end - begin),
        duration_s=end - begin,
    )


def require_complete(streams: Sequence[Stream]) -> None:
    """Refuse to report a burst in which a stream failed.

    Raises:
        RemoteError: tells how many and the first reason.
    """
    errors = [stream.error for stream in streams if stream.error]
    if errors:
        reason = f"{len(errors)} of {len(streams)} streams failed, the first with {errors[0]}"
        remedy = "If an engine died, Ray Serve replaces it; try again in a minute"
        raise RemoteError("serving endpoint", reason, remedy)
