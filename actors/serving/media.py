"""Refuses bodies that are not JSON before anything reads them.

Ray Serve LLM's own answer to them quotes the body, which is bytes and breaks the answer (a 500).
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from actors.serving.events import refusal_body

JSON_TYPE = "application/json"


class JsonOnly:
    """ASGI middleware: a POST needs the content type ``application/json``, else 415.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and not is_json(scope["headers"]):
            message = f"the body must be JSON: send Content-Type: {JSON_TYPE}"
            body = refusal_body(415, message, "content-type")
            await JSONResponse(body, status_code=415)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def is_json(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether ASGI headers declare JSON; parameters such as a charset do not matter."""
    kinds = [value for name, value in headers if name.lower() == b"content-type"]
    return len(kinds) == 1 and kinds[0].split(b";")[0].strip().lower() == JSON_TYPE.encode()
