"""Key check and connection limits of the public gRPC port, before any message is read."""

from collections.abc import Awaitable, Callable, Iterable

import grpc
import grpc.aio

from services.common.rpc import abort_aio
from services.common.settings import Settings
from services.gateway.access.access import Access
from services.gateway.metrics import GatewayMetrics
from winnow.errors import InvalidKey

# Called by probes; as over REST, the answer reveals nothing that needs a key.
_OPEN_METHODS = "/grpc.health.v1.Health/"

# Each call may hold a message of max_body_bytes; Ray Serve accepts as many requests over HTTP.
MAX_CALLS = 10_000
MAX_STREAMS_PER_CONNECTION = 128
# Transparent to clients: they reconnect, and open calls finish on the old connection.
MAX_CONNECTION_AGE_S = 1800
_MAX_CONNECTION_IDLE_S = 300
_ENDING_MARGIN_S = 30


class GrpcKeyGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # gRPC has no types here
    """Refuses calls without a valid key before reading their message, which may be large."""

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
    """The value of the authorization header, or None."""
    return next((str(value) for name, value in metadata if name == "authorization"), None)


def _refusing(error: InvalidKey) -> grpc.RpcMethodHandler:
    """Handler that refuses; a streaming one, because gRPC then reads no message by itself."""

    async def refuse(_messages: object, context: grpc.aio.ServicerContext) -> None:
        await abort_aio(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


def connection_options(settings: Settings) -> list[tuple[str, int]]:
    """Limits of each connection; a running request keeps all of its time."""
    ending_s = settings.request_timeout_s + _ENDING_MARGIN_S
    return [
        ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
        ("grpc.max_connection_idle_ms", 1000 * _MAX_CONNECTION_IDLE_S),
        ("grpc.max_connection_age_ms", 1000 * MAX_CONNECTION_AGE_S),
        ("grpc.max_connection_age_grace_ms", round(1000 * ending_s)),
    ]
