"""The HTTP door: keys, targets and admission in front of Ray Serve LLM's own ingress.

Answers 401 without a known key, 422 for targets that make no sense (naming the field), 429 with
``Retry-After`` when the endpoint is full; everything else is Ray Serve LLM's. QoE is accounted at
the moment each chunk leaves this process.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request
from ray.serve.llm.ingress import OpenAiIngress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from actors.serving.admission import AdmissionGate, ApiKey, find_key
from actors.serving.config import ServingConfig
from actors.serving.events import bearer, error_event, read_chunk, refusal_body
from actors.serving.ledger import QoELedger
from actors.serving.targets import ANONYMOUS, merge_targets
from raysys.config import config_from_dict
from raysys.errors import ConfigError
from raysys.serving.andes.qoe import FinishReason, QoETracker

Handler = Callable[[Any, Request], Awaitable[Response]]


class QoEIngress(OpenAiIngress):  # type: ignore[misc]
    """Ray Serve LLM's ingress with targets, admission, keys and a QoE ledger."""

    def __init__(self, *args: Any, settings: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = config_from_dict(ServingConfig, settings)
        self.gate = AdmissionGate(self.settings.admission)
        self.ledger = QoELedger()

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Chat completion; QoE targets in ``vllm_xargs`` or ``X-QoE-*`` headers."""
        return await self._serve(super().chat, body, request)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Text completion; QoE targets in ``vllm_xargs`` or ``X-QoE-*`` headers."""
        return await self._serve(super().completions, body, request)

    async def _serve(self, handler: Handler, body: Any, request: Request) -> Response:
        key: ApiKey | None = None
        if self.settings.admission.keys:
            key = find_key(self.settings.admission.keys, bearer(request.headers))
            if key is None:
                return refusal(401, "no valid API key", "authorization")
        try:
            # The raw body, because the request model has already turned true into 1.
            given = (await request.json()).get("vllm_xargs")
            fields, spec = merge_targets(given, request.headers, key, self.settings.andes)
        except ConfigError as error:
            return refusal(422, str(error), error.field)
        body.vllm_xargs = fields
        tenant = spec.tenant or ANONYMOUS
        now = time.monotonic()
        retry_s = self.gate.enter(tenant, now, key.max_inflight if key else None)
        if retry_s:
            self.ledger.refused(tenant)
            return refusal(429, "the endpoint is full", None, {"Retry-After": str(retry_s)})
        visit = _Visit(self, tenant, QoETracker(spec, now))
        try:
            response = await handler(body, request)
        except BaseException:
            visit.end("error")
            raise
        if isinstance(response, StreamingResponse):
            response.body_iterator = visit.follow(response.body_iterator)
        else:
            visit.end("stop", count=False)
        return response


class _Visit:
    """One admitted request until its last byte."""

    def __init__(self, ingress: QoEIngress, tenant: str, tracker: QoETracker) -> None:
        self._ingress = ingress
        self._tenant = tenant
        self._tracker = tracker
        self._open = True

    async def follow(self, chunks: Any) -> AsyncIterator[Any]:
        reason: FinishReason = "cancelled"
        try:
            async for chunk in chunks:
                tokens, failed = read_chunk(chunk)
                self._tracker.on_token(time.monotonic(), tokens)
                if failed:
                    reason = "error"
                yield chunk
            reason = "stop" if reason == "cancelled" else reason
        except Exception as error:  # the replica is gone: say so in the stream, then end it
            reason = "error"
            yield error_event(error)
        finally:
            self.end(reason)

    def end(self, reason: FinishReason, *, count: bool = True) -> None:
        if not self._open:
            return
        self._open = False
        now = time.monotonic()
        self._ingress.gate.leave(self._tenant, now)
        if count:
            self._ingress.ledger.finished(self._tenant, self._tracker.finish(now, reason))


def refusal(
    status: int, message: str, field: str | None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An answer that refuses the request."""
    return JSONResponse(refusal_body(status, message, field), status_code=status, headers=headers)
