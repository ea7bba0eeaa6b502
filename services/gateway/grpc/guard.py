"""What the public gRPC port refuses before it reads a message, and how much it takes at once."""

from collections.abc import Awaitable, Callable, Iterable

import grpc
import grpc.aio

from services.common.rpc import abort_aio
from services.common.settings import Settings
from services.gateway.access.access import Access
from services.gateway.metrics import GatewayMetrics
from winnow.errors import InvalidKey

# What probes call; as over REST it tells nothing that a key would have to guard.
_OPEN_METHODS = "/grpc.health.v1.Health/"

# Each call may hold a message of max_body_bytes; Ray Serve takes as many requests over HTTP.
MAX_CALLS = 10_000
MAX_STREAMS_PER_CONNECTION = 128
# Clients notice nothing: they connect anew, and what runs goes on over the old connection.
MAX_CONNECTION_AGE_S = 1800
_MAX_CONNECTION_IDLE_S = 300
_ENDING_MARGIN_S = 30


class GrpcKeyGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # gRPC has no types here
    """Refuses calls without a key before their message is read: it may be as large as a body."""

    def __init__(self, access: Access, metrics: GatewayMetrics) -> None:
        self._access = access
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        if not handler_call_details.method.startswith(_OPEN_METHODS):
            try:
                self._access.require(authorization(handler_call_details.invocation_metadata))
            except InvalidKey as error:
                self._metrics.requests_refused.labels(error.code).inc()
                return _refusing(error)
        return await continuation(handler_call_details)


def authorization(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """Where a key is shown, as in the HTTP header."""
    return next((str(value) for name, value in metadata if name == "authorization"), None)


def _refusing(error: InvalidKey) -> grpc.RpcMethodHandler:
    """As for a stream of messages, of which gRPC reads none by itself."""

    async def refuse(_messages: object, context: grpc.aio.ServicerContext) -> None:
        await abort_aio(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


def connection_options(settings: Settings) -> list[tuple[str, int]]:
    """Bounds on each connection; a request that runs has the time that it may take."""
    ending_s = settings.request_timeout_s + _ENDING_MARGIN_S
    return [
        ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
        ("grpc.max_connection_idle_ms", 1000 * _MAX_CONNECTION_IDLE_S),
        ("grpc.max_connection_age_ms", 1000 * MAX_CONNECTION_AGE_S),
        ("grpc.max_connection_age_grace_ms", round(1000 * ending_s)),
    ]
