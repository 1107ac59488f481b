"""Typed errors on the wire: which gRPC status stands for which error, and back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from raysys.errors import ConfigError, InfeasibleError, RaysysError, RemoteError

LOG = logging.getLogger("raysys.venn")
Request = TypeVar("Request")


def code_of(error: RaysysError) -> grpc.StatusCode:
    """Status code of an error of ours."""
    if isinstance(error, ConfigError):
        return grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, InfeasibleError):
        return grpc.StatusCode.FAILED_PRECONDITION
    if isinstance(error, RemoteError):
        return grpc.StatusCode.UNAVAILABLE
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


class DecodeInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Bytes that are no message get INVALID_ARGUMENT; gRPC itself would call it internal."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        handler = await continuation(details)
        if handler is None:
            return handler
        decode = handler.request_deserializer

        def lenient(data: bytes) -> Any:
            try:
                return decode(data) if decode is not None else data
            except DecodeError:
                return _UNDECODABLE

        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                _guard_requests(handler.stream_stream), lenient, handler.response_serializer
            )
        if handler.request_streaming:
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream), lenient, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _guard(handler.unary_unary), lenient, handler.response_serializer
        )


_UNDECODABLE = object()
_UNDECODABLE_TEXT = "message: expected a protocol message of this method, got other bytes"


def _guard(method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: Any) -> Any:
        if request is _UNDECODABLE:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _UNDECODABLE_TEXT)
        return await method(request, context)

    return call


def _guard_stream(
    method: Callable[[Any, Any], AsyncIterator[Any]],
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        if request is _UNDECODABLE:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _UNDECODABLE_TEXT)
        async for item in method(request, context):
            yield item

    return call


def _guard_requests(
    method: Callable[[Any, Any], AsyncIterator[Any]],
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def call(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async def decodable() -> AsyncIterator[Any]:
            async for request in requests:
                if request is _UNDECODABLE:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _UNDECODABLE_TEXT)
                yield request

        async for item in method(decodable(), context):
            yield item

    return call
