"""Every mistake of a client is answered in one form that names the field; faults are ours."""

from __future__ import annotations

import asyncio
import json
import os
import warnings
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the ingress needs vLLM: run `make setup`")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside Ray, vLLM and FastAPI
    from ray import cloudpickle
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError

    from actors.serving.model_server import gather_sockets, in_built_in_words, refusing
    from actors.serving.refusals import engine_error, from_engine

from actors.serving.admission import AdmissionConfig
from actors.serving.config import ServingConfig
from raysys import scratch
from tests.actors.serving_echo import MODEL, Served, chat, send

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(ServingConfig(admission=AdmissionConfig(max_inflight=3)), monkeypatch)


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
    told = from_engine(
        engine_error(VLLMValidationError("bad", parameter="seed", value="9" * 10**6))
    )
    assert (told.status, told.field) == (400, "seed")
    assert len(told.response().body) < 2000
    told = from_engine(SimpleNamespace(
        error=SimpleNamespace(code=400, message="x (parameter=seed, value=1)", param=None)
    ))  # fmt: skip
    assert told.field == "seed"


def test_a_dead_engine_is_told_without_types_of_vllm() -> None:
    async def dead() -> None:
        raise EngineDeadError()

    with pytest.raises(RuntimeError, match="EngineDeadError") as caught:
        asyncio.run(in_built_in_words(dead()))
    assert type(caught.value) is RuntimeError
    assert b"vllm" not in cloudpickle.dumps(caught.value)


def test_leaving_reaches_the_engine_at_once() -> None:
    seen: list[str] = []

    async def answers() -> AsyncGenerator[str, None]:
        try:
            yield "first"
            yield "second"
        finally:
            seen.append("aborted")

    async def go() -> None:
        stream = refusing(answers(), None)
        await anext(stream)
        await stream.aclose()
        assert seen == ["aborted"]

    asyncio.run(go())


def test_an_error_in_mid_stream_is_no_refusal() -> None:
    async def answers() -> AsyncGenerator[str, None]:
        yield "first"
        raise TypeError("ours")

    async def go() -> list[str]:
        return [answer async for answer in refusing(answers(), None)]

    with pytest.raises(TypeError, match="ours"):
        asyncio.run(go())


@pytest.mark.parametrize(("length", "given"), [(70, True), (71, False)])
def test_vllms_sockets_get_a_folder_of_ours_where_their_path_is_not_too_long(
    monkeypatch: pytest.MonkeyPatch, length: int, given: bool
) -> None:
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "restored after the test")
    monkeypatch.delenv("VLLM_RPC_BASE_PATH")
    place = "/" + "a" * (length - 1)
    monkeypatch.setattr(scratch, "kept", lambda name: Path(place))
    gather_sockets()
    assert os.environ.get("VLLM_RPC_BASE_PATH") == (place if given else None)
