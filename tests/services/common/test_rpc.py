import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
import pytest

from services.common import rpc
from services.common.rpc import (
    abort,
    abort_aio,
    channel_options,
    error_from_rpc,
    server_options,
    status_code,
)
from tests.deadlines import SOON_S
from winnow import errors
from winnow.errors import WinnowError, error_class

CODES = sorted(errors._BY_CODE)


def raise_sync(request: bytes, context: grpc.ServicerContext) -> bytes:
    abort(context, error_class(request.decode())("what and why", param="top_p"))


async def raise_aio(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    await abort_aio(context, error_class(request.decode())("what and why", param="top_p"))


async def never_answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    await asyncio.Event().wait()
    return b""


def handler(method: object) -> grpc.GenericRpcHandler:
    methods = {"Raise": method, "Wait": never_answer}
    unary = {name: grpc.unary_unary_rpc_method_handler(each) for name, each in methods.items()}
    return grpc.method_handlers_generic_handler("test", unary)


@pytest.fixture
async def aio_address() -> AsyncIterator[str]:
    server = grpc.aio.server(handlers=[handler(raise_aio)], options=server_options())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def failure_of(address: str, code: str) -> grpc.aio.AioRpcError:
    async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await channel.unary_unary("/test/Raise")(code.encode(), timeout=SOON_S)
        return failure.value


@pytest.mark.parametrize("code", CODES)
async def test_every_error_arrives_with_its_kind_from_an_aio_server(
    aio_address: str, code: str
) -> None:
    failure = await failure_of(aio_address, code)
    error = error_from_rpc(failure)
    assert type(error) is error_class(code)
    assert (error.message, error.param) == ("what and why", "top_p")
    assert failure.code() is status_code(error)


def test_every_error_arrives_with_its_kind_from_a_sync_server() -> None:
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads, handlers=[handler(raise_sync)], options=server_options())
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=channel_options()) as channel:
            for code in CODES:
                with pytest.raises(grpc.RpcError) as failure:
                    channel.unary_unary("/test/Raise")(code.encode(), timeout=SOON_S)
                error = error_from_rpc(failure.value)
                assert type(error) is error_class(code)
                assert (error.message, error.param) == ("what and why", "top_p")
                assert failure.value.code() is status_code(error)
        server.stop(None).wait()


async def test_a_worker_that_is_not_there_is_no_decode_worker() -> None:
    error = error_from_rpc(await failure_of("127.0.0.1:1", "overloaded"))
    assert isinstance(error, errors.NoDecodeWorker)


async def test_a_call_that_nobody_serves_is_an_error_all_the_same(aio_address: str) -> None:
    async with grpc.aio.insecure_channel(aio_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await channel.unary_unary("/test/Other")(b"", timeout=SOON_S)
    error = error_from_rpc(failure.value)
    assert type(error) is WinnowError
    assert "UNIMPLEMENTED" in error.message


async def test_a_deadline_is_deadline_exceeded(aio_address: str) -> None:
    async with grpc.aio.insecure_channel(aio_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await channel.unary_unary("/test/Wait")(b"", timeout=0.1)
    assert isinstance(error_from_rpc(failure.value), errors.DeadlineExceeded)


async def test_a_call_in_which_nothing_is_said_outlives_many_pings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server drops the connection of a client that pings too often for it, from the fifth on."""
    monkeypatch.setattr(rpc, "KEEPALIVE_INTERVAL_S", 1)
    server = grpc.aio.server(handlers=[handler(never_answer)], options=server_options())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await channel.unary_unary("/test/Wait")(b"", timeout=8)
    await server.stop(None)
    assert isinstance(error_from_rpc(failure.value), errors.DeadlineExceeded)
