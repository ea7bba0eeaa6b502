"""The public gRPC API: winnow.v1.Inference with health and reflection, on the gateway's own server.

It does not use Ray Serve's gRPC proxy, which has neither standard health nor reflection and passes
no typed trailing metadata. Replicas on one machine share the port.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from services.common.rpc import abort_aio, server_options
from services.common.tls import bind, public_credentials
from services.common.tracing import context_in
from services.gateway.access.keys import ApiKey
from services.gateway.errors import public_error
from services.gateway.gateway import Gateway
from services.gateway.grpc.guard import MAX_CALLS, GrpcKeyGuard, authorization, connection_options
from services.gateway.grpc.requests import may_have_grammar, parsed_bytes, request_from_proto
from services.gateway.grpc.responses import delta_to_proto, usage_to_proto
from services.gateway.grpc.shutdown import Shutdown
from winnow.errors import WinnowError
from winnow.v1 import inference_pb2 as pb

logger = logging.getLogger(__name__)

SERVICE = "winnow.v1.Inference"
_READINESS_INTERVAL_S = 5.0
_ABORT_TIMEOUT_S = 5.0
_SHARE_OF_GRACE = 0.9  # the rest is for sending errors


class GrpcServer:
    """Start it once, then stop it; health is SERVING while requests can be served."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._health = health_aio.HealthServicer()
        self._server = grpc.aio.server(
            options=_options(gateway),
            interceptors=[GrpcKeyGuard(gateway.access, gateway.metrics)],
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        self._shutdown = Shutdown()
        inference = _Inference(gateway, self._shutdown)
        self._server.add_generic_rpc_handlers((inference.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self._watch: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Serve on `port` (0: any free one); returns the port.  Raises InvalidSetting if taken."""
        credentials = public_credentials(self._gateway.settings)
        bound = bind(self._server, host, port, credentials, what="gRPC", param="grpc_port")
        await self._tell_health()
        await self._server.start()
        self._watch = asyncio.create_task(self._keep_telling_health())
        return bound

    async def stop(self, grace_s: float | None = None) -> None:
        """Return when open calls have ended.

        Requests still open shortly before the end of `grace_s` get an error; other calls still open
        at its end are cancelled.
        """
        if grace_s is not None:
            self._shutdown.end_in(_SHARE_OF_GRACE * grace_s)
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def _keep_telling_health(self) -> None:
        while True:
            await asyncio.sleep(_READINESS_INTERVAL_S)
            await self._tell_health()

    async def _tell_health(self) -> None:
        ready = (await self._gateway.readiness()).ready
        status = health_pb2.HealthCheckResponse
        for name in ("", SERVICE):
            await self._health.set(name, status.SERVING if ready else status.NOT_SERVING)


def _options(gateway: Gateway) -> list[tuple[str, int]]:
    """Server options: the port is shared by all replicas, including one that replaces another.

    Requests may be as large as over HTTP.
    """
    settings = gateway.settings
    size = ("grpc.max_receive_message_length", int(settings.max_body_bytes))
    shared = server_options(share_port=True)
    others = [option for option in shared if option[0] != size[0]]
    return [*others, size, *connection_options(settings)]


class _Inference:
    def __init__(self, gateway: Gateway, shutdown: Shutdown) -> None:
        self._gateway = gateway
        self._shutdown = shutdown

    def handler(self) -> grpc.GenericRpcHandler:
        """Handler of serialized messages, so that a malformed one gets a typed error too."""
        complete = grpc.unary_stream_rpc_method_handler(
            self.complete, response_serializer=pb.CompleteResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Complete": complete})

    async def complete(self, body: bytes, context: grpc.aio.ServicerContext) -> None:
        """Write chunks as text is generated, then one with the usage; or end with a typed error.

        Written rather than yielded, so that a deadline also ends the wait for a slow client.
        """
        started = False

        async def write(response: pb.CompleteResponse) -> None:
            nonlocal started
            started = True
            await context.write(response)

        try:
            metadata = context.invocation_metadata() or ()
            key = self._gateway.access.require(authorization(metadata))
            async with self._shutdown.call():
                await self._gateway.access.charge_request(key)
                await self._answer(body, context_in(metadata), key, write)
        except Exception as error:  # the client always gets one typed error
            failure = public_error(error)
            if not started:
                self._gateway.metrics.requests_refused.labels(failure.code).inc()
            await _abort(context, failure)

    async def _answer(
        self,
        body: bytes,
        trace_context: str,
        key: ApiKey | None,
        write: Callable[[pb.CompleteResponse], Awaitable[None]],
    ) -> None:
        gateway, tokenizer = self._gateway, self._gateway.model.tokenizer
        message = await asyncio.to_thread(parsed_bytes, body)
        read = partial(request_from_proto, gateway, message)
        has_grammar = may_have_grammar(message)
        request = await (gateway.reads.read(read) if has_grammar else asyncio.to_thread(read))
        async with (
            gateway.open(request, key, trace_context) as running,
            aclosing(running.deltas()) as deltas,
        ):
            async for delta in deltas:
                for response in delta_to_proto(delta, request.request_id, tokenizer):
                    await write(response)
            last = await asyncio.to_thread(
                lambda: usage_to_proto(running.usage(), request.request_id)
            )
            await write(last)


async def _abort(context: grpc.aio.ServicerContext, error: WinnowError) -> None:
    """End the call; one that does not read delays this briefly, and gets the error when it does."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_ABORT_TIMEOUT_S):
            await abort_aio(context, error)
