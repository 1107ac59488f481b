"""Pieces of the HTTP side that need no server: streamed events, refusals, the presented key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def bearer(headers: Mapping[str, str]) -> str:
    """The presented key; empty without one."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def read_chunk(chunk: Any) -> tuple[int, bool]:
    """Visible tokens in one piece of a server-sent stream, and whether it reports an error.

    The engine sends one event per token; an event carries text in its ``content`` or ``text``.
    """
    if isinstance(chunk, list):  # a replica's batch of events, not yet joined by the ingress
        chunk = "".join(chunk)
    text = chunk if isinstance(chunk, str) else bytes(chunk).decode("utf-8", "replace")
    tokens, failed = 0, False
    for event in text.split("\n\n"):
        if not event.startswith("data: ") or event.startswith("data: [DONE]"):
            continue
        failed |= event.startswith('data: {"error"')
        shown = '"content":' in event or '"text":' in event
        empty = any(mark in event for mark in ('"content":""', '"content":null', '"text":""'))
        tokens += shown and not empty
    return tokens, failed


def error_event(error: Exception) -> str:
    """The last events of a stream whose engine failed, as OpenAI clients understand them."""
    first_line = str(error).strip().split("\n", 1)[0][:300]
    body = {
        "message": f"the engine failed in mid-stream: {type(error).__name__}: {first_line}",
        "type": "internal_error",
        "param": None,
        "code": 500,
    }
    return f"data: {json.dumps({'error': body})}\n\ndata: [DONE]\n\n"


def refusal_body(status: int, message: str, field: str | None) -> dict[str, Any]:
    """An error in OpenAI's format."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": status}}
