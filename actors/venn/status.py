"""Typed errors on the wire: which gRPC status stands for which error, and back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

from raysys.errors import ConfigError, InfeasibleError, RaysysError, RemoteError

LOG = logging.getLogger("raysys.venn")
Request = TypeVar("Request")


def code_of(error: RaysysError) -> grpc.StatusCode:
    """Status code of an error of ours."""
    if isinstance(error, ConfigError):
        return grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, InfeasibleError):
        return grpc.StatusCode.FAILED_PRECONDITION
    return grpc.StatusCode.INTERNAL


def typed(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Answer errors of ours with their status; anything else is logged, and said to be internal."""

    async def call(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await method(self, request, context)
        except RaysysError as error:
            await context.abort(code_of(error), str(error)[:2000])
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception:
            LOG.exception("a request failed")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")

    return call


def typed_stream(method: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """As :func:`typed`, for methods that yield."""

    async def call(
        self: Any, request: Any, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Any]:
        try:
            async for item in method(self, request, context):
                yield item
        except RaysysError as error:
            await context.abort(code_of(error), str(error)[:2000])
        except (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit):
            raise
        except Exception:
            LOG.exception("a stream failed")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")

    return call


def remote_error(peer: str, error: grpc.aio.AioRpcError) -> RemoteError:
    """An error of ours for a failed call."""
    code = error.code().name
    remedy = {
        "UNAVAILABLE": "Is the service running at this address?",
        "UNAUTHENTICATED": "Give a valid token or certificate",
        "DEADLINE_EXCEEDED": "The service is overloaded or gone; try again",
    }.get(code, "")
    return RemoteError(peer, f"{code}: {error.details()}", remedy)
