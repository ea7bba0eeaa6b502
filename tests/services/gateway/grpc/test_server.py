"""winnow.v1.Inference over a real channel: the same completions as over REST."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.common.rpc import error_from_rpc, is_typed
from services.gateway.grpc.server import GrpcServer
from services.gateway.request.generation_run import PromptRun
from tests.deadlines import SOON_S
from tests.services.exposed import value
from tests.services.gateway.grpc_requests import PROMPT, request
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from tests.winnow import reference
from winnow.errors import DeadlineExceeded, InvalidSetting
from winnow.tokens import Token
from winnow.v1 import inference_pb2 as pb
from winnow.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def channel(service: TestService) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> InferenceStub:
    return InferenceStub(channel)


async def responses(stub: InferenceStub, **changes: Any) -> list[pb.CompleteResponse]:
    return [one async for one in stub.Complete(request(**changes), timeout=30)]


async def refusal(stub: InferenceStub, **changes: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await responses(stub, **changes)
    return error.value


def text_of(chunks: list[pb.CompleteResponse], index: int = 0) -> str:
    choices = (choice for chunk in chunks for choice in chunk.choices)
    return "".join(choice.text for choice in choices if choice.index == index)


async def test_tokens_are_those_of_transformers_and_text_that_of_rest(
    service: TestService, stub: InferenceStub, model_path: Path
) -> None:
    chunks = await responses(stub)
    token_ids = [i for chunk in chunks for choice in chunk.choices for i in choice.token_ids]
    assert token_ids == reference.greedy(reference.load(model_path), PROMPT, 12)
    rest = await service.openai.completions.create(
        model=MODEL_NAME,
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert text_of(chunks) == rest.choices[0].text
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_last_chunk_carries_the_usage(stub: InferenceStub) -> None:
    *chunks, last = await responses(stub, n=2)
    assert not any(chunk.HasField("usage") for chunk in chunks)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (40, 24)
    assert last.usage.winnow.no_selection_reason == "off"
    assert last.usage.winnow.wire_bytes > last.usage.winnow.kv_bytes_kept > 0
    ends = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason}
    assert ends == {0: "length", 1: "length"}


async def test_text_and_messages_are_prompts_too(service: TestService, stub: InferenceStub) -> None:
    tokenizer = service.gateway.model.tokenizer
    messages = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="fox")])
    (*_, by_text) = await responses(stub, text="the quick brown")
    (*_, by_chat) = await responses(stub, messages=messages)
    assert by_text.usage.prompt_tokens == len(tokenizer.encode("the quick brown"))
    rendered = tokenizer.render_chat([{"role": "user", "content": "fox"}])
    assert by_chat.usage.prompt_tokens == len(rendered)


async def test_echo_stop_and_logprobs(stub: InferenceStub) -> None:
    plain = text_of(await responses(stub, text="the fox"))
    assert text_of(await responses(stub, text="the fox", echo=True)) == f"the fox{plain}"
    stopped = await responses(stub, text="the fox", stop=[plain[3:5]])
    assert text_of(stopped) == plain[: plain.index(plain[3:5])]
    chunks = await responses(stub, logprobs=2)
    logprobs = [one for chunk in chunks for choice in chunk.choices for one in choice.logprobs]
    assert len(logprobs) == 12
    assert all(len(one.top) == 2 and one.logprob == one.top[0].logprob for one in logprobs)


async def test_pruning_options_count_and_zero_means_unlimited(stub: InferenceStub) -> None:
    options: dict[str, Any] = {"method": "snapkv", "window_size": 8}
    (*_, cut) = await responses(stub, winnow=pb.WinnowOptions(**options, kv_budget=16))
    (*_, whole) = await responses(stub, winnow=pb.WinnowOptions(**options, kv_budget=0))
    assert cut.usage.winnow.kv_bytes_kept * 40 == cut.usage.winnow.kv_bytes_full * 16
    assert whole.usage.winnow.kv_bytes_kept == whole.usage.winnow.kv_bytes_full


REFUSALS: list[tuple[dict[str, Any], grpc.StatusCode, str, str | None, str]] = [
    ({"model": "x"}, grpc.StatusCode.NOT_FOUND, "model_not_found", "model", "'x' is not served"),
    ({"text": ""}, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request", "text", "at least 1"),
    (
        {"token_ids": pb.TokenIds(ids=[320])},
        grpc.StatusCode.INVALID_ARGUMENT,
        "invalid_request",
        "token_ids",
        "id 320",
    ),
    (
        {"token_ids": pb.TokenIds(ids=[5] * 9000)},
        grpc.StatusCode.INVALID_ARGUMENT,
        "context_length_exceeded",
        "token_ids",
        "9,000 tokens; the limit is 8,191",
    ),
    (
        {"temperature": -1},
        grpc.StatusCode.INVALID_ARGUMENT,
        "invalid_value",
        "temperature",
        "is -1; the allowed range is [0, 2]",
    ),
    (
        {"max_tokens": 0},
        grpc.StatusCode.INVALID_ARGUMENT,
        "invalid_value",
        "max_tokens",
        "is 0; the allowed range is 1 to 4,096",
    ),
    (
        {"winnow": pb.WinnowOptions(kv_budget=8)},
        grpc.StatusCode.INVALID_ARGUMENT,
        "invalid_value",
        "winnow.kv_budget",
        "above window_size, 8",
    ),
    (
        {"messages": pb.ChatMessages()},
        grpc.StatusCode.INVALID_ARGUMENT,
        "invalid_request",
        "messages",
        "at least 1",
    ),
    (
        {"max_tokens": 0},
        grpc.StatusCode.INVALID_ARGUMENT,
        "invalid_value",
        "max_tokens",
        "the allowed range is 1 to",
    ),
]


@pytest.mark.parametrize(("changes", "status", "code", "param", "message"), REFUSALS)
async def test_refuses_bad_input_with_its_code_and_parameter(
    stub: InferenceStub,
    changes: dict[str, Any],
    status: grpc.StatusCode,
    code: str,
    param: str | None,
    message: str,
) -> None:
    error = await refusal(stub, **changes)
    assert error.code() is status
    winnow_error = error_from_rpc(error)
    assert (winnow_error.code, winnow_error.param) == (code, param)
    assert message in winnow_error.message


async def test_a_request_without_prompt_is_refused(stub: InferenceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="text, token_ids or messages"):
        async for _ in stub.Complete(pb.CompleteRequest(model=MODEL_NAME), timeout=SOON_S):
            pass


async def test_cancelling_the_call_leaves_nothing_behind(
    service: TestService, stub: InferenceStub
) -> None:
    call = stub.Complete(request(max_tokens=4000), timeout=30)
    await call.read()
    call.cancel()
    await service.until_idle()


async def test_cancelling_the_call_ends_it_though_a_cancel_within_is_lost(
    service: TestService, stub: InferenceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As asyncio.wait_for may lose it; more deltas than an answer's queue holds come after."""
    tokens, begun = PromptRun.tokens, asyncio.Event()

    async def tokens_that_lose_a_cancel(run: PromptRun) -> AsyncGenerator[list[Token]]:
        async with aclosing(tokens(run)) as steps:
            async for step in steps:
                yield step
                if not begun.is_set():
                    begun.set()
                    with suppress(asyncio.CancelledError):
                        await asyncio.Event().wait()

    monkeypatch.setattr(PromptRun, "tokens", tokens_that_lose_a_cancel)
    call = stub.Complete(request(max_tokens=1000), timeout=30)
    await begun.wait()
    call.cancel()
    async with asyncio.timeout(SOON_S):
        while value((await service.admin.get("/metrics")).text, "winnow_requests_running"):
            await service.until_idle()


async def test_a_server_that_stops_lets_calls_end_and_tells_those_that_do_not(
    service: TestService,
) -> None:
    server = GrpcServer(service.gateway)
    port = await server.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = InferenceStub(channel)
        short = aiter(stub.Complete(request(max_tokens=50), timeout=60))
        await anext(short)
        service.prefiller.hold_jobs()
        held = stub.Complete(request(), timeout=60)
        await service.prefiller.asked.wait()
        stopping = asyncio.create_task(server.stop(4))
        assert [one async for one in short][-1].HasField("usage")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await held.read()
        assert isinstance(error_from_rpc(error.value), DeadlineExceeded)
        assert is_typed(error.value)
        await asyncio.wait_for(stopping, 10)
    service.prefiller.hold.set()
    await service.until_idle()


async def test_health_follows_readiness(model_path: Path, redis_url: str) -> None:
    serving = health_pb2.HealthCheckResponse.SERVING
    for num_workers, expected in ((1, serving), (0, health_pb2.HealthCheckResponse.NOT_SERVING)):
        async with (
            running_service(model_path, redis_url, num_workers=num_workers) as service,
            grpc.aio.insecure_channel(service.grpc_address) as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", "winnow.v1.Inference"):
                check = health_pb2.HealthCheckRequest(service=name)
                assert (await health.Check(check, timeout=SOON_S)).status == expected


async def test_reflection_lists_the_service(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
    )
    names = {one.name async for answer in call for one in answer.list_services_response.service}
    assert {"winnow.v1.Inference", "grpc.health.v1.Health"} <= names


async def test_a_port_that_is_taken_is_refused_in_one_line(service: TestService) -> None:
    server = GrpcServer(service.gateway)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InvalidSetting, match=f"gRPC cannot be served on 127.0.0.1:{port}"):
            await server.start("127.0.0.1", port)
    await server.stop()


async def test_a_replica_shares_the_port_with_the_one_it_replaces(service: TestService) -> None:
    port = int(service.grpc_address.rpartition(":")[2])
    second = GrpcServer(service.gateway)
    assert await second.start("127.0.0.1", port) == port
    await asyncio.wait_for(second.stop(), 10)
