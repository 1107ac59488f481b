"""Refuses requests by their headers, before anything reads them.

Ray Serve LLM answers both cases with a 500 of its own: it quotes a body that is not JSON as bytes,
and takes a request's id for text.
"""

from __future__ import annotations

from typing import Any

from actors.serving.refusals import RefusedError

JSON_TYPE = "application/json"
REQUEST_ID = b"x-request-id"


class HeaderCheck:
    """ASGI middleware: a POST needs the content type ``application/json`` (else 415), and a
    request's id must be ASCII (else 400).

    Args:
        app: the application behind it.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refusal = check(scope) if scope["type"] == "http" else None
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def check(scope: Any) -> RefusedError | None:
    """Why a request is refused by its headers; None if it is not."""
    if not all(value.isascii() for name, value in scope["headers"] if name.lower() == REQUEST_ID):
        return RefusedError(400, "X-Request-Id: expected ASCII", "x-request-id")
    if scope["method"] == "POST" and not is_json(scope["headers"]):
        message = f"the body must be JSON: send Content-Type: {JSON_TYPE}"
        return RefusedError(415, message, "content-type")
    return None


def is_json(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether ASGI headers declare JSON; parameters such as a charset do not matter."""
    kinds = [value for name, value in headers if name.lower() == b"content-type"]
    return len(kinds) == 1 and kinds[0].split(b";")[0].strip().lower() == JSON_TYPE.encode()
