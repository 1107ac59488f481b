"""The HTTP side in one process: the real ingress and its routes, an engine that only echoes.

What needs an engine is in tests/jobs/test_serve_engine.py; fuzzing from the schema is here too,
because it must reach every corner and an engine would take its time.
"""

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
    from vllm.exceptions import VLLMValidationError

    from actors.serving.ingress import make_ingress
    from actors.serving.model_server import refusing

from actors.serving.admission import AdmissionConfig
from actors.serving.config import EngineConfig, ServingConfig
from actors.serving.ledger import QoELedger
from raysys.config import config_to_dict
from tests.jobs.serving_fuzz import fuzz_app

CHAT = "/v1/chat/completions"
MODEL = "echo"
TEXT = ("The ", "sky ", "is ", "blue")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


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


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(ServingConfig(admission=AdmissionConfig(max_inflight=3)), monkeypatch)


def chat(content: str = "Hi", **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "stream": True}
    return body | more


def test_targets_and_switches_reach_the_engine(served: Served) -> None:
    async def go() -> str:
        async with served.client() as client:
            fields = {"qoe_tds": 3.0, "andes_policy": "fcfs", "andes_router": "power_of_two"}
            answer = await client.post(
                "/v1/chat/completions",
                json=chat(vllm_xargs=fields),
                headers={"X-QoE-TTFT-S": "0.5", "X-QoE-Tenant": "blue"},
            )
            return answer.text

    text = asyncio.run(go())
    assert text.count('"content"') == 4
    [body] = served.echo.seen
    assert body.vllm_xargs == {
        "qoe_tds": 3.0,
        "qoe_ttft_s": 0.5,
        "qoe_tenant": "blue",
        "andes_policy": "fcfs",
    }  # fmt: skip  (loopback: policies may be switched, routers may not)
    assert served.ingress.ledger.totals["blue"]["requests"] == 1
    assert served.ingress.gate.inflight.total() == 0


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "application/xml", None])
def test_only_json_is_read(served: Served, kind: str | None) -> None:
    async def go(headers: dict[str, str]) -> httpx.Response:
        async with served.client() as client:
            content = json.dumps(chat()).encode()
            return await client.post("/v1/chat/completions", content=content, headers=headers)

    answer = asyncio.run(go({"Content-Type": kind} if kind else {}))
    assert answer.status_code == 415
    assert answer.json()["error"]["param"] == "content-type"
    assert asyncio.run(go({"Content-Type": "Application/JSON; charset=utf-8"})).status_code == 200


def send(served: Served, body: Any, path: str = CHAT, **headers: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with served.client() as client:
            kind = {"Content-Type": "application/json"}
            return await client.post(path, content=data, headers=kind | headers)

    return asyncio.run(go())


def with_message(**message: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}, message]}


ASSISTANT = {"role": "assistant", "content": None}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        # The two that a fuzz of the real engine found: a message of another format, no role.
        (with_message(author={"role": "user"}, content=[]), "messages[1].role"),
        (with_message(content="Hi"), "messages[1].role"),
        (with_message(role=5, content="Hi"), "messages[1].role"),
        (with_message(role="developer", content=[1]), "messages[1].content[0]"),
        (with_message(role="developer", content={}), "messages[1].content"),
        (with_message(role="user", content=5), "messages[1].content"),
        (
            with_message(role="user", content=[{"type": "text", "text": 5}]),
            "messages[1].content[0].text",
        ),
        (with_message(role="user", content=[{"type": "text"}]), "messages[1].content[0].text"),
        (with_message(**ASSISTANT, tool_calls=5), "messages[1].tool_calls"),
        (with_message(**ASSISTANT, tool_calls="f"), "messages[1].tool_calls"),
        ({"model": MODEL, "messages": [None]}, "messages[0]"),
        ({"model": MODEL, "messages": "Hi"}, "messages"),
        ({"model": MODEL}, "messages"),
        (chat(max_tokens="many"), "max_tokens"),
        (chat(top_logprobs=3), "top_logprobs"),
        (chat(kv_transfer_params={"prompt_token_ids": [-1]}), "kv_transfer_params"),
        (b'{"model": "echo", "messages": [], "max_tokens": NaN}', "max_tokens"),
        (b'{"model": "echo", "messages": [], "max_tokens": "\\ud800"}', "max_tokens"),
        (b"[1]", None),
        (b"[" * 50_000, None),
    ],
)
def test_bodies_that_no_engine_can_read_are_refused_by_name(
    served: Served, body: Any, field: str | None
) -> None:
    answer = send(served, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field, error
    assert error["type"] == "invalid_request_error"
    assert not served.echo.seen


def test_lists_of_parts_and_calls_reach_the_engine(served: Served) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {**ASSISTANT, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    body = chat(messages=messages)
    assert send(served, body).status_code == 200
    [seen] = served.echo.seen
    assert seen.messages[0]["tool_calls"] == [call]
    assert seen.messages[2]["content"] == [{"type": "text", "text": "Hi"}]


@pytest.mark.parametrize(
    ("xargs", "field"),
    [('{"qoe_tenant": "\\ud800"}', "qoe_tenant"), ('{"x": [1, 1180591620717411303424]}', "x")],
)
def test_fields_that_cannot_be_sent_are_refused(served: Served, xargs: str, field: str) -> None:
    body = json.dumps(chat())[:-1] + f', "vllm_xargs": {xargs}}}'
    answer = send(served, body.encode())
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"] == field


def test_unknown_models_and_odd_headers_are_refused_by_name(served: Served) -> None:
    answer = send(served, json.dumps(chat()).replace(MODEL, "\\ud800").encode())
    assert answer.status_code == 404
    assert answer.json()["error"] | {"message": ""} == {
        "message": "", "type": "not_found_error", "param": "model", "code": 404
    }  # fmt: skip
    answer = send(served, chat(), **{"X-Request-Id": b"\xff"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-request-id"


def engine_raising(error: Exception, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine raise, behind the replica's own wrapper."""
    served.echo.fault = error
    plain = served.echo.remote
    monkeypatch.setattr(
        served.echo, "remote", lambda body, raw: refusing(plain(body, raw), "messages")
    )


@pytest.mark.parametrize(
    ("error", "status", "field"),
    [
        (TypeError("TextEncodeInput must be ..."), 400, "messages"),
        (OverflowError("number too large to fit in target type"), 400, "messages"),
        (NotImplementedError("no such thing"), 400, "messages"),
        (RuntimeError("EngineDeadError"), 500, None),
        (KeyError("block"), 500, None),
    ],
)
def test_complaints_about_the_request_are_the_clients_and_faults_are_ours(
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
    field: str | None,
) -> None:
    engine_raising(error, served, monkeypatch)
    answer = send(served, chat(stream=False))
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == field
    assert served.ingress.gate.inflight.total() == 0


def test_an_engines_complaint_keeps_its_field_and_is_short() -> None:
    from actors.serving.refusals import engine_error, from_engine

    told = from_engine(
        engine_error(VLLMValidationError("bad", parameter="seed", value="9" * 10**6))
    )
    assert (told.status, told.field) == (400, "seed")
    assert len(told.response().body) < 2000
    told = from_engine(SimpleNamespace(
        error=SimpleNamespace(code=400, message="x (parameter=seed, value=1)", param=None)
    ))  # fmt: skip
    assert told.field == "seed"


def test_an_error_in_mid_stream_is_no_refusal() -> None:
    async def answers() -> AsyncIterator[str]:
        yield "first"
        raise TypeError("ours")

    async def go() -> list[str]:
        return [answer async for answer in refusing(answers(), None)]

    with pytest.raises(TypeError, match="ours"):
        asyncio.run(go())


def test_each_answer_takes_a_place_and_the_worst_one_counts(served: Served) -> None:
    too_many = send(served, chat(n=4))
    assert too_many.status_code == 422
    assert too_many.json()["error"]["param"] == "n"
    # The echo answers only the first of the three: the others' readers get nothing.
    assert send(served, chat(n=3, vllm_xargs={"qoe_ttft_s": 0.0})).status_code == 200
    assert served.ingress.ledger.totals["anonymous"]["requests"] == 1
    assert served.ingress.ledger.totals["anonymous"]["qoe_sum"] < 1.0
    assert served.ingress.gate.inflight.total() == 0
    assert not served.ingress.ledger.live


def test_an_engine_that_dies_ends_the_stream_with_an_error(served: Served) -> None:
    async def go() -> str:
        async with served.client() as client:
            return (await client.post("/v1/chat/completions", json=chat("fail"))).text

    text = asyncio.run(go())
    assert text.count('"content"') == 2
    assert '"error"' in text
    assert "EngineDeadError" in text
    assert text.endswith("data: [DONE]\n\n")
    assert served.ingress.gate.inflight.total() == 0
    assert not served.ingress.ledger.live


def test_bursts_run_once_and_are_accounted(served: Served) -> None:
    burst = {"chats": 5, "tokens": 4, "spread_s": 0.0, "policy": "andes", "ttft_s": 60.0}

    async def go() -> tuple[list[int], dict[str, Any]]:
        async with served.client() as client:
            codes = [
                (await client.post("/qoe/bursts", json=burst, headers=headers)).status_code
                for headers in ({"Origin": "http://elsewhere"}, {"Origin": "http://page.test"}, {})
            ]
            for _ in range(3000):
                state = (await client.get("/qoe")).json()
                if not state["bursts"][0]["running"]:
                    break
                await asyncio.sleep(0.02)
            return codes, state

    codes, state = asyncio.run(go())
    assert codes == [403, 202, 409]
    [last] = state["bursts"]
    assert last["done"] == 5
    # Three places: two of the five were refused, which is a QoE of 0 for their readers.
    assert last["worst_qoe"] == 0.0
    assert last["mean_qoe"] == pytest.approx(0.6)
    assert state["tenants"]["(burst)"]["refused"] == 2
    assert state["series"]
    assert {body.vllm_xargs["andes_policy"] for body in served.echo.seen} == {"andes"}
    assert len({body.request_id for body in served.echo.seen}) == 3  # engines know them apart


def test_where_strangers_come_in_bursts_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    public = Served(ServingConfig(host="0.0.0.0"), monkeypatch)
    bare = Served(ServingConfig(page="none"), monkeypatch)

    async def go(served: Served, path: str, body: Any = None) -> int:
        monkeypatch.setattr(
            serve, "get_replica_context", lambda: SimpleNamespace(servable_object=served.ingress)
        )
        async with served.client() as client:
            asked = client.post(path, json=body) if body is not None else client.get(path)
            return (await asked).status_code

    assert asyncio.run(go(public, "/qoe/bursts", {})) == 403
    assert asyncio.run(go(public, "/")) == 200
    assert asyncio.run(go(public, "/page/app.js")) == 200
    assert asyncio.run(go(bare, "/page/app.js")) == 404
    assert asyncio.run(go(bare, "/qoe/bursts", {})) == 403


def test_the_schema_holds_under_fuzzing(served: Served) -> None:
    report = fuzz_app(served.app, MODEL, examples=6)
    assert report.calls >= 40
    assert report.operations == len(served.app.openapi()["paths"])
    assert not report.failures, report.failures[:3]


def test_only_streams_are_read_as_they_come(served: Served) -> None:
    async def go() -> None:
        async with served.client() as client:
            await client.post("/v1/chat/completions", json=chat(stream=False))

    asyncio.run(go())
    assert not served.ingress.ledger.live
    assert served.ingress.ledger.totals == {}
    assert served.ingress.gate.inflight.total() == 0


def test_stock_vllm_has_one_order_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Served(ServingConfig(engine=EngineConfig(policy="vllm")), monkeypatch)

    async def go() -> list[int]:
        async with stock.client() as client:
            return [
                (await client.post("/qoe/bursts", json={"policy": policy, "chats": 1})).status_code
                for policy in ("andes", "fcfs")
            ]

    assert asyncio.run(go()) == [422, 202]
