"""A client that hardly says anything does not hold on for ever."""

import asyncio
from pathlib import Path

import grpc.aio
import pytest

from services.common.rpc import error_from_rpc, is_typed
from services.gateway.grpc import server
from services.gateway.rest import json_body
from tests.deadlines import SOON_S
from tests.services.gateway.grpc_requests import request
from tests.services.gateway.service import TestService, running_service
from winnow.errors import DeadlineExceeded
from winnow.v1.inference_pb2_grpc import InferenceStub

SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384)]

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_body_that_drips_is_cut_off(
    service: TestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_body, "BODY_TIMEOUT_S", 0.5)
    host, _, port = service.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: 1000\r\n"
    writer.write(f"{head}content-type: application/json\r\n\r\n{{".encode())
    async with asyncio.timeout(SOON_S):
        answer = await reader.readline()
        assert b" 408 " in answer
        while b"body_too_slow" not in answer:
            answer += await reader.read(1000)
    assert b"within 0.5 seconds" in answer
    writer.close()


async def test_a_grpc_client_that_stops_reading_is_ended_at_the_deadline(
    model_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_ABORT_TIMEOUT_S", 0.2)
    async with (
        running_service(model_path, redis_url, request_timeout_s=5) as service,
        grpc.aio.insecure_channel(service.grpc_address, SMALL_WINDOW) as channel,
    ):
        call = InferenceStub(channel).Complete(
            request(max_tokens=4000, n=4, logprobs=20), timeout=20
        )
        await call.read()
        await service.until_idle()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            while await call.read():
                pass
        assert isinstance(error_from_rpc(error.value), DeadlineExceeded)
        assert is_typed(error.value)  # it is ours, not gRPC's about the client's own deadline
