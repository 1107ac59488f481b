"""Ray Serve LLM's server of one model with three faults of Ray 2.60 and vLLM 0.29 together mended.

What vLLM raises about a request is not always of the two types that Ray expects, and became a
server error; Ray looks for vLLM's tokenizer routes under a name of another version; and a dead
engine's exception made Ray Serve's controller import vLLM, and stand still meanwhile.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any

from jinja2 import TemplateError
from ray.serve.llm.deployment import LLMServer

from actors.serving.refusals import engine_error
from raysys import scratch

_log = logging.getLogger(__name__)
# Where vLLM raises one of these, it is about the request; its own server answers them as such.
ABOUT_THE_REQUEST = (TypeError, OverflowError, NotImplementedError, TemplateError)
MAX_SOCKET_PATH = 107  # bytes, Linux
SOCKET_NAME = "/01234567-89ab-cdef-0123-456789abcdef"
FIELDS = {"chat": "messages", "completions": "prompt", "tokenize": "prompt", "detokenize": "tokens"}


class ModelServer(LLMServer):  # type: ignore[misc]
    """A replica that answers every mistake of a client as one."""

    async def start(self) -> None:
        """Start the engine, and find its tokenizer routes."""
        gather_sockets()
        await super().start()
        if getattr(self.engine, "_oai_serving_tokenization", self) is None:
            routes = getattr(self.engine._app_state, "serving_tokenization", None)
            self.engine._oai_serving_tokenization = routes

    async def check_health(self) -> None:
        """Asked by Ray Serve's controller.

        Raises:
            RuntimeError: the engine is dead.
        """
        await in_built_in_words(super().check_health())

    async def _run_request(self, request: Any, *, engine_method: str, **options: Any) -> Any:
        answers = await super()._run_request(request, engine_method=engine_method, **options)
        return refusing(answers, FIELDS.get(engine_method))


def gather_sockets() -> None:
    """Give vLLM's sockets a folder of this process's own.

    By default they lie in the system's temporary folder itself, and stay there for good: Ray ends
    replicas, and replicas their engines, by a kill.
    """
    folder = str(scratch.kept("vllm"))
    if len(folder) + len(SOCKET_NAME) <= MAX_SOCKET_PATH:
        os.environ.setdefault("VLLM_RPC_BASE_PATH", folder)


async def in_built_in_words(check: Awaitable[None]) -> None:
    """Await a check; its failure becomes a built-in type.

    The controller must import what defines the type: vLLM takes seconds, two minutes on a busy
    machine, in which no replica of any application is replaced.

    Raises:
        RuntimeError: the check failed.
    """
    try:
        await check
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


async def refusing(
    answers: AsyncGenerator[Any, None], field: str | None
) -> AsyncGenerator[Any, None]:
    """Pass answers on; a complaint about the request before the first one becomes an answer.

    Args:
        answers: the engine's.
        field: the field that is named where vLLM names none.
    """
    begun = False
    try:
        async with aclosing(answers):  # a client that leaves must reach the engine at once
            async for answer in answers:
                begun = True
                yield answer
    except ABOUT_THE_REQUEST as error:
        if begun:
            raise
        # The client is told; whether it was really its mistake can be seen here.
        _log.warning("refused before the first token: %r", error, exc_info=error)
        yield engine_error(error, field)
