"""What the tests of quality ask of a service that prunes."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc.aio

from services.common.metrics import render
from tests.deadlines import SOON_S
from tests.services.exposed import value
from tests.services.gateway.service import MODEL_NAME, TestService
from winnow.v1 import inference_pb2 as pb
from winnow.v1.inference_pb2_grpc import InferenceStub

COMPLETIONS = "/v1/completions"
NUM_TOKENS = 96
PRUNING = {
    "method": "snapkv",
    "window_size": 8,
    "kv_budget": 24,
    "observed_layers": 2,
    "min_layer": 1,
}


def prompt(seed: int = 0) -> list[int]:
    """Tokens that no end token is among."""
    return [5 + (seed * 31 + idx * idx * 7 + idx) % 300 for idx in range(NUM_TOKENS)]


def body(token_ids: object, **changes: Any) -> dict[str, Any]:
    asked = {"model": MODEL_NAME, "prompt": token_ids, "max_tokens": 6, "ignore_eos": True}
    return asked | {"temperature": 0} | changes


async def ask(service: TestService, token_ids: object = None, **changes: Any) -> dict[str, Any]:
    """The answer of a request that goes well."""
    token_ids = prompt() if token_ids is None else token_ids
    response = await service.http.post(COMPLETIONS, json=body(token_ids, **changes))
    assert response.status_code == 200, response.text
    return dict(response.json())


def count(service: TestService, name: str, **labels: str) -> float:
    """A metric of the gateway's."""
    return value(render(service.gateway.metrics.registry).decode(), f"winnow_{name}", **labels)


def outcome(service: TestService, name: str) -> float:
    return count(service, "quality_checks_total", outcome=name)


def num_over(service: TestService) -> float:
    return sum(outcome(service, name) for name in ("done", "failed", "dropped"))


async def until_over(service: TestService, num_checks: int) -> None:
    """Returns when so many checks are over, however they ended."""
    await until(lambda: num_over(service) >= num_checks)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not is_so():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.02)


async def complete(
    channel: grpc.aio.Channel, request: pb.CompleteRequest
) -> list[pb.CompleteResponse]:
    """The chunks of an answer over gRPC."""
    stub = InferenceStub(channel)
    return [chunk async for chunk in stub.Complete(request, timeout=SOON_S)]
