"""Pieces of the HTTP side that need no server: streamed events, refusals, the presented key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# The first one of an event is its choice's; the text comes after it.
_INDEX = re.compile(r'"index": ?(\d+)')


def bearer(headers: Mapping[str, str]) -> str:
    """The presented key; empty without one."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def read_chunk(chunk: Any) -> tuple[dict[int, int], bool]:
    """Visible tokens in one piece of a server-sent stream, and whether it reports an error.

    The engine sends one event per token; an event carries text in its ``content`` or ``text``.

    Returns:
        Tokens by the number of the answer that they belong to (``n`` > 1 asks for several).
    """
    if isinstance(chunk, list):  # a replica's batch of events, not yet joined by the ingress
        chunk = "".join(chunk)
    text = chunk if isinstance(chunk, str) else bytes(chunk).decode("utf-8", "replace")
    tokens: dict[int, int] = {}
    failed = False
    for event in text.split("\n\n"):
        if not event.startswith("data: ") or event.startswith("data: [DONE]"):
            continue
        failed |= event.startswith('data: {"error"')
        shown = '"content":' in event or '"text":' in event
        empty = any(mark in event for mark in ('"content":""', '"content":null', '"text":""'))
        if shown and not empty:
            index = _INDEX.search(event)
            answer = int(index[1]) if index else 0
            tokens[answer] = tokens.get(answer, 0) + 1
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
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": status}}
