"""Reading our own stream, and what refused or failed clients are told."""

from __future__ import annotations

import json

import pytest

from actors.serving.events import bearer, error_event, read_chunk, refusal_body


def event(**fields: object) -> str:
    return f"data: {json.dumps(fields, separators=(',', ':'))}\n\n"


def chat_event(content: str | None, answer: int = 0) -> str:
    return event(choices=[{"index": answer, "delta": {"content": content}}])


@pytest.mark.parametrize(
    ("chunk", "tokens"),
    [
        (chat_event("sky"), {0: 1}),
        (chat_event("sky") + chat_event("blue"), {0: 2}),
        (chat_event("sky", 2) + chat_event("blue", 11) + chat_event("red", 2), {2: 2, 11: 1}),
        (chat_event('x","index":7,"y'), {0: 1}),
        (chat_event(""), {}),
        (chat_event(None), {}),
        (event(choices=[{"index": 0, "text": "sky"}]), {0: 1}),
        (event(choices=[], usage={"prompt_tokens": 3}), {}),
        ("data: [DONE]\n\n", {}),
        ("", {}),
        (chat_event("é€").encode(), {0: 1}),
    ],
)
def test_visible_tokens_are_counted(chunk: str | bytes, tokens: dict[int, int]) -> None:
    assert read_chunk(chunk) == (tokens, False)


def test_an_error_event_is_seen_and_is_no_token() -> None:
    assert read_chunk('data: {"error": {"message": "EngineCore died"}}\n\n') == ({}, True)
    assert read_chunk(chat_event("x") + error_event(RuntimeError("gone"))) == ({0: 1}, True)


def test_the_last_event_of_a_failed_stream_names_the_cause_in_one_line() -> None:
    text = error_event(ValueError("first line\nsecond line"))
    assert text.endswith("data: [DONE]\n\n")
    body = json.loads(text.split("\n\n")[0].removeprefix("data: "))
    assert body["error"]["message"] == "the engine failed in mid-stream: ValueError: first line"
    assert body["error"]["code"] == 500


def test_refusals_have_the_form_that_clients_know() -> None:
    error = refusal_body(422, "qoe_tds: expected a number", "qoe_tds")["error"]
    assert error["param"] == "qoe_tds"
    assert error["type"] == "invalid_request_error"
    assert refusal_body(429, "full", None)["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Basic abc", ""),
        ("Bearer", ""),
        ("", ""),
    ],
)
def test_only_a_bearer_token_is_a_key(value: str, key: str) -> None:
    assert bearer({"authorization": value}) == key
    assert bearer({}) == ""
