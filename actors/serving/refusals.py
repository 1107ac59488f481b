"""Refused requests: one exception and one form of answer, whoever refuses.

The ingress refuses keys, targets and full endpoints; the web framework, Ray Serve LLM and vLLM
refuse bodies, each in a form of its own. All leave as OpenAI's error, which names the field where
one is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ErrorResponse,
    OpenAIHTTPException,
)
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from actors.serving.events import refusal_body
from raysys.errors import RaysysError

MAX_MESSAGE = 1000  # an engine quotes what was sent, which may be megabytes


_PARAMETER = re.compile(r"\(parameter=(\w+)")


class RefusedError(RaysysError):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: what was wrong, in words.
        field: the field of the body, or the header, that was wrong; None where it is no field.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, field, headers)
        self.status = status
        self.message = message
        self.field = field
        self.headers = headers

    def __str__(self) -> str:
        return self.message

    def response(self) -> Refusal:
        """The answer."""
        message = self.message
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]}..."
        body = refusal_body(self.status, message, self.field)
        headers = None if self.headers is None else dict(self.headers)
        return Refusal(body, status_code=self.status, headers=headers)


class Refusal(JSONResponse):
    """JSON in ASCII: it may quote what was sent, and lone surrogates have no UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def install(app: Any) -> None:
    """Answer every way of refusing in the one form."""
    from vllm.exceptions import VLLMClientError

    async def answer(request: Request, error: Exception) -> Refusal:
        return refused(error).response()

    kinds: tuple[type[Exception], ...] = (
        RefusedError,
        RequestValidationError,
        HTTPException,
        OpenAIHTTPException,
        VLLMClientError,
    )
    for kind in kinds:
        app.add_exception_handler(kind, answer)


def refused(error: Exception) -> RefusedError:
    """What an exception of :func:`install` means for the client."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, RequestValidationError):
        return complaint({**error.errors()[0], "loc": error.errors()[0]["loc"][1:]}, error.body)
    if isinstance(error, HTTPException):
        return RefusedError(error.status_code, str(error.detail), None, error.headers)
    if isinstance(error, OpenAIHTTPException):
        return RefusedError(error.status_code, error.message)
    return from_engine(engine_error(error))


def from_engine(response: Any) -> RefusedError:
    """An engine's answer that is an error (Ray Serve LLM's, or vLLM's of the same form)."""
    error = response.error
    named = _PARAMETER.search(error.message)  # some ways through vLLM keep it only in the text
    return RefusedError(int(error.code), error.message, error.param or (named and named[1]))


def engine_error(error: Exception, field: str | None = None) -> Any:
    """vLLM's own reading of an exception, as Ray Serve LLM's error.

    Args:
        error: the exception.
        field: named where vLLM names none.
    """
    from vllm.entrypoints.serve import create_error_response

    told = create_error_response(error).error.model_dump()
    # The engine lacks what the client asked for, which is the client's to change.
    told["code"] = 400 if told["code"] == 501 else told["code"]
    told["param"] = told["param"] or field
    return ErrorResponse(error=told)


def complaint(first: Mapping[str, Any], given: Any, path: str = "") -> RefusedError:
    """A schema's complaint in our words.

    Args:
        first: an error of pydantic's; its location is within ``given``.
        given: what was validated.
        path: where that is in the body; empty for the body itself.
    """
    field = field_of(first["loc"], given, path, missing=first["type"] == "missing") or None
    return RefusedError(400, f"{field or 'body'}: {first['msg']}", field)


def field_of(location: Sequence[Any], given: Any, path: str = "", *, missing: bool = False) -> str:
    """A validator's location as a path such as ``messages[0].content``.

    Args:
        location: keys and indexes, mixed with names of the alternatives that were tried.
        given: what was validated; what is not in it is no key.
        path: where that is in the body.
        missing: the last part is a key that is not there.
    """
    for number, part in enumerate(location, 1):
        if isinstance(part, int) and isinstance(given, list) and 0 <= part < len(given):
            given, path = given[part], f"{path}[{part}]"
        elif isinstance(given, dict) and part in given:
            given, path = given[part], f"{path}.{part}"
        elif missing and number == len(location):
            path = f"{path}.{part}"
    return path.removeprefix(".")
