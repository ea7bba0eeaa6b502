"""A client that hardly says anything does not hold on for ever."""

import asyncio

import pytest

from services.gateway import json_body
from tests.services.gateway.service import TestService

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_body_that_drips_is_cut_off(
    service: TestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_body, "BODY_TIMEOUT_S", 0.5)
    host, _, port = service.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: 1000\r\n\r\n{{"
    writer.write(head.encode())
    async with asyncio.timeout(10):
        answer = await reader.readline()
        assert b" 408 " in answer
        while b"body_too_slow" not in answer:
            answer += await reader.read(1000)
    assert b"within 0.5 seconds" in answer
    writer.close()
