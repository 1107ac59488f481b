"""The page at ``/``: its files, the state of the service, and bursts under a chosen policy."""

from __future__ import annotations

import asyncio
import contextvars
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from fastapi import Request
from pydantic import BaseModel, Field
from ray.serve.llm.openai_api_models import ChatCompletionRequest
from starlette.responses import HTMLResponse, JSONResponse, Response

from actors.andes.engine_settings import POLICY_FIELD
from actors.serving.admission import AdmissionGate
from actors.serving.client import qoe_fields
from actors.serving.config import ServingConfig
from actors.serving.ledger import QoELedger
from actors.serving.page_files import page_files
from actors.serving.refusals import RefusedError
from actors.serving.visit import Visit
from raysys.serving.andes.qoe import QoETracker
from raysys.serving.andes.spec import MAX_TDS, QoESpec
from raysys.serving.prompts import PROMPTS

POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'"
SAMPLE_S = 1.0
KEPT_BURSTS = 6
BURST_TENANT = "(burst)"


class BurstRequest(BaseModel):
    """A burst of chats to start.

    Args:
        policy: under which the engine schedules from then on.
        chats: how many.
        tokens: length of every answer.
        spread_s: their arrivals lie within this time.
        ttft_s, tds: what every reader expects.
    """

    policy: Literal["andes", "fcfs"] = "andes"
    chats: int = Field(default=16, ge=1, le=64)
    tokens: int = Field(default=48, ge=2, le=256)
    spread_s: float = Field(default=2.0, ge=0.0, le=60.0)
    ttft_s: float = Field(default=1.0, ge=0.0, le=60.0)
    tds: float = Field(default=4.8, gt=0.0, le=MAX_TDS)


@dataclass(slots=True)
class Burst:
    """A burst under way or done."""

    asked: BurstRequest
    started_s: float
    trackers: list[QoETracker] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    ended_s: float | None = None

    def to_dict(self, now_s: float) -> dict[str, Any]:
        """JSON-ready figures; the mean is live until the burst is done."""
        live = [tracker.live(max(now_s, tracker.submitted_s)) for tracker in self.trackers]
        scores = self.scores + live
        return {
            "policy": self.asked.policy,
            "chats": self.asked.chats,
            "started_s": self.started_s,
            "done": len(self.scores),
            "running": self.ended_s is None,
            "mean_qoe": sum(scores) / len(scores) if scores else None,
            "worst_qoe": min(scores) if scores else None,
            "ttft_s": float(np.median(self.ttft_s)) if self.ttft_s else None,
            "seconds": (self.ended_s or now_s) - self.started_s,
        }


class PageEndpoints:
    """Mixed into the ingress, which has the gate, the ledger, the settings and the engine."""

    settings: ServingConfig
    gate: AdmissionGate
    ledger: QoELedger
    _get_response: Any
    _key: Any
    _model_cards: dict[str, Any]
    _default_serve_handles: dict[str, Any]

    def __init__(self) -> None:
        self._bursts: list[Burst] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching = False

    def watch(self) -> None:
        """Sample the service's QoE from now on, once a second."""
        if not self._watching:
            self._watching = True
            self._start(self._sample())

    def _start(self, coroutine: Any) -> None:
        # In a context of its own: Ray Serve would take its calls for parts of the present request,
        # and the engine takes the request's id for theirs, which must differ.
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _sample(self) -> None:
        while True:
            self.ledger.sample(time.monotonic())
            await asyncio.sleep(SAMPLE_S)

    async def page(self) -> Response:
        """The page."""
        if self.settings.page == "none":
            return JSONResponse({"openai": "/v1"})
        return HTMLResponse(
            page_files()["index.html"][0], headers={"Content-Security-Policy": POLICY}
        )

    async def page_file(self, name: str) -> Response:
        """A script or style of the page."""
        found = page_files().get(name)
        if found is None or self.settings.page == "none":
            raise RefusedError(404, f"no file {name!r}", "name")
        return Response(found[0], media_type=found[1], headers={"Cache-Control": "no-cache"})

    async def service(self, request: Request) -> Response:
        """The service's QoE over the last ten minutes, totals by tenant, and the last bursts."""
        self._key(request)
        self.watch()
        now = time.monotonic()
        return JSONResponse(
            {
                "now_s": now,
                "model": next(iter(self._model_cards)),
                "bursts_allowed": self.settings.bursts,
                "policy": self.settings.engine.policy,
                "series": list(self.ledger.series),
                "tenants": self.ledger.totals,
                "refused": self.gate.refused,
                "inside": self.gate.inflight.total(),
                "bursts": [burst.to_dict(now) for burst in self._bursts],
            }
        )

    async def start_burst(self, body: BurstRequest, request: Request) -> Response:
        """Start a burst; 403 where they are off, 409 while one runs, 422 if it cannot be had."""
        self._key(request)
        if not self.settings.bursts or not same_origin(request):
            raise RefusedError(403, "bursts are off: raysys serve --set page=full", "page")
        if body.policy == "andes" and self.settings.engine.policy != "andes":
            raise RefusedError(422, "this engine knows only order of arrival", "policy")
        if any(burst.ended_s is None for burst in self._bursts):
            raise RefusedError(409, "a burst is under way", None)
        self.watch()
        burst = Burst(asked=body, started_s=time.monotonic())
        self._bursts = [*self._bursts[1 - KEPT_BURSTS :], burst]
        self._start(self._run_burst(burst))
        return JSONResponse({"started": True}, status_code=202)

    async def _run_burst(self, burst: Burst) -> None:
        asked = burst.asked
        generator = np.random.default_rng(len(PROMPTS))  # the same burst each time
        arrivals = np.sort(generator.uniform(0.0, asked.spread_s, asked.chats))
        try:
            await asyncio.gather(
                *(self._one_chat(burst, index, float(at)) for index, at in enumerate(arrivals))
            )
        finally:
            burst.ended_s = time.monotonic()

    async def _one_chat(self, burst: Burst, index: int, arrival_s: float) -> None:
        asked = burst.asked
        await asyncio.sleep(arrival_s)
        now = time.monotonic()
        spec = QoESpec(ttft_s=asked.ttft_s, tds=asked.tds, tenant=BURST_TENANT)
        if self.gate.enter(BURST_TENANT, now):
            self.ledger.refused(BURST_TENANT, now)
            burst.scores.append(0.0)
            return
        tracker = QoETracker(spec, now)
        burst.trackers.append(tracker)
        visit = Visit(self.gate, self.ledger, BURST_TENANT, [tracker])
        chat = ChatCompletionRequest(
            model=next(iter(self._model_cards)),
            messages=[{"role": "user", "content": PROMPTS[index % len(PROMPTS)]}],
            max_tokens=asked.tokens,
            temperature=0.0,
            stream=True,
            ignore_eos=True,
            vllm_xargs={**qoe_fields(spec), POLICY_FIELD: asked.policy},
            request_id=uuid.uuid4().hex,
        )
        async for _ in visit.follow(self._get_response(body=chat, call_method="chat")):
            pass
        burst.trackers.remove(tracker)
        burst.scores.append(tracker.qoe())
        if tracker.first_s is not None:
            burst.ttft_s.append(tracker.first_s)


def same_origin(request: Request) -> bool:
    """Whether a browser's request comes from this very page; other clients send no origin."""
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")
