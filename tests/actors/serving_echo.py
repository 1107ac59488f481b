"""The real ingress and its routes in one process, with an engine that only echoes."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the ingress needs vLLM: run `make setup`")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside Ray, vLLM and FastAPI
    import httpx
    from ray import cloudpickle, serve
    from ray.llm._internal.serve.core.configs.openai_api_models import ModelCard

    from actors.serving.ingress import make_ingress

from actors.serving.config import ServingConfig
from actors.serving.ledger import QoELedger
from raysys.config import config_to_dict

CHAT = "/v1/chat/completions"
MODEL = "echo"
TEXT = ("The ", "sky ", "is ", "blue")


class Echo:
    """A deployment handle: streams four tokens; ``fail`` in the prompt kills the engine."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.closed = 0
        self.fault: Exception | None = None
        self.chat = self.completions = self.tokenize = self.detokenize = self

    def options(self, **options: Any) -> Echo:
        return self

    async def remote(self, body: Any, raw: Any) -> AsyncIterator[Any]:
        body = cloudpickle.loads(cloudpickle.dumps(body))  # an engine is another process
        self.seen.append(body)
        text = str(getattr(body, "messages", ""))
        if self.fault is not None:
            raise self.fault
        try:
            for number, token in enumerate(TEXT):
                if "fail" in text and number == 2:
                    raise RuntimeError("EngineDeadError")
                event = {"choices": [{"index": 0, "delta": {"content": token}}]}
                yield f"data: {json.dumps(event, separators=(',', ':'))}\n\n"
                await asyncio.sleep(0.01)
            yield "data: [DONE]\n\n"
        finally:
            self.closed += 1


class Served:
    """The application with one ingress behind it."""

    def __init__(self, settings: ServingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.echo = Echo()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.app, made = make_ingress()
        monkeypatch.setattr("actors.serving.ingress.QoELedger", lambda: QoELedger(metrics=False))
        card = ModelCard(id=MODEL, object="model", owned_by="raysys", permission=[], metadata={})
        cls: Any = made.__mro__[1]
        self.ingress = cls({MODEL: self.echo}, {MODEL: card}, settings=config_to_dict(settings))
        context = SimpleNamespace(servable_object=self.ingress)
        monkeypatch.setattr(serve, "get_replica_context", lambda: context)

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://page.test")


def chat(content: str = "Hi", **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "stream": True}
    return body | more


def send(served: Served, body: Any, path: str = CHAT, **headers: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with served.client() as client:
            kind = {"Content-Type": "application/json"}
            return await client.post(path, content=data, headers=kind | headers)

    return asyncio.run(go())
