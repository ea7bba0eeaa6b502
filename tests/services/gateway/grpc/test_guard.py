"""How much the public gRPC port takes at once, of one connection and of all."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from services.gateway.grpc import guard, server
from services.gateway.grpc.server import GrpcServer
from tests.services.gateway.service import TestService

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASK = HealthCheckRequest()


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[HealthStub]:
    """Over a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        yield HealthStub(channel)


@asynccontextmanager
async def another_port(service: TestService) -> AsyncIterator[str]:
    """Of the same gateway, with the limits that are set by now."""
    server = GrpcServer(service.gateway)
    try:
        yield f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
    finally:
        await server.stop()


async def watching(stub: HealthStub, num_calls: int) -> list[Any]:
    """So many calls that stay open."""
    watches = [stub.Watch(ASK) for _ in range(num_calls)]
    for watch in watches:
        await watch.read()
    return watches


async def test_one_connection_has_so_many_calls_and_others_have_theirs(
    service: TestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_STREAMS_PER_CONNECTION", 3)
    async with another_port(service) as address, connected(address) as greedy:
        watches = await watching(greedy, 3)
        with pytest.raises(grpc.aio.AioRpcError) as waited:
            await greedy.Check(ASK, timeout=1)
        assert waited.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with connected(address) as other:
            assert await other.Check(ASK, timeout=30)
        watches[0].cancel()
        assert await greedy.Check(ASK, timeout=30)


async def test_calls_over_the_limit_are_refused(
    service: TestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_CALLS", 2)
    async with another_port(service) as address, connected(address) as stub:
        watches = await watching(stub, 2)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Check(ASK, timeout=30)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not any(watch.done() for watch in watches)


async def test_a_connection_grows_so_old_and_its_client_makes_another(
    service: TestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_CONNECTION_AGE_S", 1)
    monkeypatch.setattr(guard, "_ENDING_MARGIN_S", -service.settings.request_timeout_s + 1)
    async with another_port(service) as address, connected(address) as stub:
        watch = stub.Watch(ASK)
        await watch.read()
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await watch.read()
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await stub.Check(ASK, timeout=30)
