"""The decode worker's control port: Decode, health and reflection on one asyncio gRPC server."""

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from services.common.peer_guard import AioPeerGuard
from services.common.rpc import STOP_GRACE_S, server_options
from services.common.tls import PeerTls, bind
from services.decode.generate import GenerateServicer
from winnow.v1.decode_pb2_grpc import add_DecodeServicer_to_server

DECODE_SERVICE = "winnow.v1.Decode"


class ControlServer:
    """Health is SERVING for the server and for Decode until `announce_draining`.

    For the health service itself it is SERVING to the end: a draining worker is live but not ready.
    """

    def __init__(self, servicer: GenerateServicer, peers: PeerTls | None) -> None:
        self._credentials = peers.server_credentials() if peers else None
        self._health = health_aio.HealthServicer()
        guards = [AioPeerGuard(peers.name)] if peers else []
        self._server = grpc.aio.server(options=server_options(), interceptors=guards)
        add_DecodeServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (DECODE_SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> int:
        """Serve on `port` (0: any free one); returns the port.  Raises InvalidSetting if taken."""
        bound = bind(
            self._server, host, port, self._credentials, what="decode", param="decode_port"
        )
        await self._server.start()
        for name in ("", DECODE_SERVICE, HEALTH_SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return bound

    async def announce_draining(self) -> None:
        for name in ("", DECODE_SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)

    async def stop(self) -> None:
        """Cancel calls still open after STOP_GRACE_S; return when all have ended."""
        await self._server.stop(STOP_GRACE_S)
