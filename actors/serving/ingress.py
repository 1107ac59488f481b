"""The HTTP door: keys, targets and admission in front of Ray Serve LLM's own ingress.

Answers 401 without a known key, 400 for a body that no engine can read and 422 for targets that
make no sense (both naming the field), 429 with ``Retry-After`` when the endpoint is full; the rest
is Ray Serve LLM's. QoE is accounted at the moment each chunk leaves this process.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import HTTPException, Request
from ray.llm._internal.serve.core.configs.openai_api_models import (
    DetokenizeRequest,
    ErrorResponse,
    TokenizeCompletionRequest,
)
from ray.llm._internal.serve.core.ingress.ingress import init
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from starlette.responses import Response, StreamingResponse

from actors.serving.admission import AdmissionGate, ApiKey, find_key
from actors.serving.bodies import ChatBody, CompletionBody, places
from actors.serving.config import ServingConfig
from actors.serving.events import bearer
from actors.serving.headers import HeaderCheck
from actors.serving.ledger import QoELedger
from actors.serving.page import PageEndpoints
from actors.serving.refusals import RefusedError, from_engine, install
from actors.serving.targets import ANONYMOUS, merge_targets
from actors.serving.visit import Visit
from raysys.config import config_from_dict
from raysys.errors import ConfigError
from raysys.serving.andes.qoe import QoETracker
from raysys.serving.andes.spec import QoESpec

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

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Chat completion; QoE targets in ``vllm_xargs`` or ``X-QoE-*`` headers."""
        return await self._serve(super().chat, body, request)

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Text completion; QoE targets in ``vllm_xargs`` or ``X-QoE-*`` headers."""
        return await self._serve(super().completions, body, request)

    async def tokenize(self, body: TokenizeCompletionRequest, request: Request) -> Response:
        """Tokens of a text."""
        self._key(request)
        response: Response = await super().tokenize(body, request)
        return response

    async def detokenize(self, body: DetokenizeRequest, request: Request) -> Response:
        """Text of tokens."""
        self._key(request)
        response: Response = await super().detokenize(body, request)
        return response

    async def _serve(self, handler: Handler, body: Any, request: Request) -> Response:
        key = self._key(request)
        fields, spec = await self._targets(request, key)
        body.vllm_xargs = fields
        tenant = spec.tenant or ANONYMOUS
        now = time.monotonic()
        answers = places(body)
        self._enter(tenant, now, key.max_inflight if key else None, answers)
        self.watch()
        trackers = [QoETracker(spec, now) for _ in range(answers)]
        visit = Visit(self.gate, self.ledger, tenant, trackers, streamed=bool(body.stream))
        try:
            response = await handler(body, request)
        except BaseException:
            visit.end("error")
            raise
        if isinstance(response, StreamingResponse):
            response.body_iterator = visit.follow(response.body_iterator)
        else:
            visit.end("stop")
        return response

    def _key(self, request: Request) -> ApiKey | None:
        """The client's key; None on an open endpoint."""
        keys = self.settings.admission.keys
        key = find_key(keys, bearer(request.headers))
        if keys and key is None:
            raise RefusedError(401, "no valid API key", "authorization")
        return key

    async def _targets(
        self, request: Request, key: ApiKey | None
    ) -> tuple[dict[str, Any], QoESpec]:
        """The ``vllm_xargs`` to send on, and the reader's targets."""
        try:
            # The raw body, because the request model has already turned true into 1.
            given = (await request.json()).get("vllm_xargs")
            return merge_targets(given, request.headers, key, self.settings)
        except ConfigError as error:
            raise RefusedError(422, str(error), error.field) from None

    def _enter(self, tenant: str, now_s: float, limit: int | None, answers: int) -> None:
        """Take a place for each answer, or refuse."""
        most = self.gate.most(limit)
        if answers > most:
            raise RefusedError(
                422, f"n: expected at most {most} answers at once, got {answers}", "n"
            )
        retry_s = self.gate.enter(tenant, now_s, limit, answers)
        if retry_s:
            self.ledger.refused(tenant, now_s)
            raise RefusedError(429, "the endpoint is full", None, {"Retry-After": str(retry_s)})

    async def _get_model_id(self, model: str | None) -> str:
        try:
            return str(await super()._get_model_id(model))
        except HTTPException as error:
            raise RefusedError(error.status_code, str(error.detail), "model") from None

    async def _get_response(self, **request: Any) -> AsyncIterator[Any]:
        """The engine's answers; one that is an error is raised with the field that it names."""
        async for answer in super()._get_response(**request):
            first = answer[0] if isinstance(answer, list) and answer else answer
            if isinstance(first, ErrorResponse):
                raise from_engine(first)
            yield answer


def make_ingress() -> tuple[Any, type[QoEIngress]]:
    """The FastAPI application and the ingress class bound to its routes."""
    app = init()
    install(app)
    app.add_middleware(HeaderCheck)
    return app, make_fastapi_ingress(QoEIngress, endpoint_map=ENDPOINTS, app=app)
