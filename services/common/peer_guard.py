"""Interceptors that check the DNS name in a peer's certificate, not only the CA's signature.

gRPC checks a server's name for its clients, but not the clients' names for a server. Only a method
handler can see a certificate's names, so they are checked once per call, before the first message
is read.
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

_Behaviour = Callable[..., Any]
_NAMES = "x509_subject_alternative_name"
_KINDS = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


class PeerGuard(grpc.ServerInterceptor):  # type: ignore[misc]  # gRPC has no types here
    """For a sync server: refuses a peer whose certificate does not have `name` as a DNS name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        return _around(continuation(handler_call_details), self._guarded)

    def _guarded(self, behaviour: _Behaviour) -> _Behaviour:
        def guarded(asked: object, context: grpc.ServicerContext) -> object:
            if not _has_name(context, self._name):
                context.abort(*_refusal(self._name))
            return behaviour(asked, context)

        return guarded


class AioPeerGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """`PeerGuard` for an asyncio server."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        return _around(await continuation(handler_call_details), self._guarded)

    def _guarded(self, behaviour: _Behaviour) -> _Behaviour:
        async def require(context: grpc.aio.ServicerContext) -> None:
            if not _has_name(context, self._name):
                await context.abort(*_refusal(self._name))

        async def guarded(asked: object, context: grpc.aio.ServicerContext) -> object:
            await require(context)
            return await behaviour(asked, context)

        async def guarded_stream(
            asked: object, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[object]:
            await require(context)
            async for answer in behaviour(asked, context):
                yield answer

        return guarded_stream if inspect.isasyncgenfunction(behaviour) else guarded


def _around(
    handler: grpc.RpcMethodHandler | None, guard: Callable[[_Behaviour], _Behaviour]
) -> grpc.RpcMethodHandler | None:
    """The handler with its behaviour guarded; None (no such method) stays None."""
    if handler is None:
        return None
    kind, make = _KINDS[handler.request_streaming, handler.response_streaming]
    behaviour = guard(getattr(handler, kind))
    return make(behaviour, handler.request_deserializer, handler.response_serializer)


def _has_name(context: grpc.ServicerContext, name: str) -> bool:
    return name.encode() in context.auth_context().get(_NAMES, ())


def _refusal(name: str) -> tuple[grpc.StatusCode, str]:
    return grpc.StatusCode.PERMISSION_DENIED, f"the certificate has no DNS name {name!r}"
