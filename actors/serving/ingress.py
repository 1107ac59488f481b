"""The HTTP door: keys, targets and admission in front of Ray Serve LLM's own ingress.

Answers 401 without a known key, 422 for targets that make no sense (naming the field), 429 with
``Retry-After`` when the endpoint is full; everything else is Ray Serve LLM's. QoE is accounted at
the moment each chunk leaves this process.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from ray.llm._internal.serve.core.ingress.ingress import init
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from actors.serving.admission import AdmissionGate, ApiKey, find_key
from actors.serving.config import ServingConfig
from actors.serving.events import bearer, refusal_body
from actors.serving.ledger import QoELedger
from actors.serving.media import JsonOnly
from actors.serving.page import PageEndpoints
from actors.serving.targets import ANONYMOUS, merge_targets
from actors.serving.visit import Visit
from raysys.config import config_from_dict
from raysys.errors import ConfigError
from raysys.serving.andes.qoe import QoETracker

Handler = Callable[[Any, Request], Awaitable[Response]]


# What is served, by method of the ingress. Ray Serve LLM's other routes (embeddings, scores,
# transcriptions) are for other kinds of models.
ENDPOINTS: dict[str, Callable[[Any], Any]] = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "completions": lambda app: app.post("/v1/completions"),
    "tokenize": lambda app: app.post("/tokenize"),
    "detokenize": lambda app: app.post("/detokenize"),
    "page": lambda app: app.get("/", include_in_schema=False),
    "page_file": lambda app: app.get("/page/{name}", include_in_schema=False),
    "service": lambda app: app.get("/qoe"),
    "start_burst": lambda app: app.post("/qoe/bursts", status_code=202),
}


class QoEIngress(PageEndpoints, OpenAiIngress):  # type: ignore[misc]
    """Ray Serve LLM's ingress with targets, admission, keys, a QoE ledger and a page."""

    def __init__(self, *args: Any, settings: dict[str, Any], **kwargs: Any) -> None:
        OpenAiIngress.__init__(self, *args, **kwargs)
        self.settings = config_from_dict(ServingConfig, settings)
        self.gate = AdmissionGate(self.settings.admission)
        self.ledger = QoELedger()
        PageEndpoints.__init__(self)

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
            fields, spec = merge_targets(given, request.headers, key, self.settings)
        except ConfigError as error:
            return refusal(422, str(error), error.field)
        body.vllm_xargs = fields
        tenant = spec.tenant or ANONYMOUS
        now = time.monotonic()
        retry_s = self.gate.enter(tenant, now, key.max_inflight if key else None)
        if retry_s:
            self.ledger.refused(tenant, now)
            return refusal(429, "the endpoint is full", None, {"Retry-After": str(retry_s)})
        self.watch()
        tracker = QoETracker(spec, now)
        visit = Visit(self.gate, self.ledger, tenant, tracker, streamed=bool(body.stream))
        try:
            response = await handler(body, request)
        except ValueError as error:
            visit.end("error")
            # Ray unpacks the parts of a message only now, and says so in this way.
            if not str(error).startswith("Validating message"):
                raise
            return refusal(400, str(error), "messages")
        except BaseException:
            visit.end("error")
            raise
        if isinstance(response, StreamingResponse):
            response.body_iterator = visit.follow(response.body_iterator)
        else:
            visit.end("stop")
        return response


def make_ingress() -> tuple[Any, type[QoEIngress]]:
    """The FastAPI application and the ingress class bound to its routes."""
    app = init()
    app.add_middleware(JsonOnly)
    return app, make_fastapi_ingress(QoEIngress, endpoint_map=ENDPOINTS, app=app)


def refusal(
    status: int, message: str, field: str | None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An answer that refuses the request."""
    return JSONResponse(refusal_body(status, message, field), status_code=status, headers=headers)
