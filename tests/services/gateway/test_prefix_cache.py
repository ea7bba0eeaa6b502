"""The prefix store through the whole service: who shares a beginning, and what usage tells."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
import pytest_asyncio

from services.gateway.access.keys import entry_text, new_key
from tests.services.gateway.grpc_requests import request
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from tests.winnow.drive import prompt
from winnow.engine.prefix.hashes import BLOCK_TOKENS
from winnow.v1 import inference_pb2 as pb
from winnow.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALICE, ALICE_ENTRY = new_key("alice")
BOB, BOB_ENTRY = new_key("bob")
NUM_DOCUMENT_TOKENS = 2 * BLOCK_TOKENS + 40
NUM_CACHED = 2 * BLOCK_TOKENS
NUM_SELECTED = 64
PRUNING: dict[str, Any] = {
    "method": "fastkv",
    "fixed_layer": 1,
    "select_tokens": NUM_SELECTED,
    "kv_budget": 48,
    "window_size": 8,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(
    model_path: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[TestService]:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(entry_text(ALICE_ENTRY) + entry_text(BOB_ENTRY))
    async with running_service(
        model_path, redis_url, api_keys_file=keys, prefix_cache_bytes=8 << 20, pruning=PRUNING
    ) as service:
        yield service
        await service.until_idle()


def questions(document: int) -> list[list[int]]:
    """Two prompts that begin with the same document and end with different questions."""
    beginning = prompt(NUM_DOCUMENT_TOKENS, seed=document)
    return [beginning + prompt(24, seed=1000 + document), beginning + prompt(30, seed=document + 7)]


async def ask(
    service: TestService, token_ids: Sequence[object], key: str = ALICE, **changes: Any
) -> httpx.Response:
    body = {
        "model": MODEL_NAME,
        "prompt": token_ids,
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
    }
    headers = {"authorization": f"Bearer {key}"}
    return await service.http.post("/v1/completions", json=body | changes, headers=headers)


async def num_cached(
    service: TestService, token_ids: list[int], key: str = ALICE, **changes: Any
) -> int:
    response = await ask(service, token_ids, key, **changes)
    usage = response.raise_for_status().json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached == usage["winnow"]["cached_tokens"]
    return int(cached)


async def test_the_second_question_finds_the_document_and_gets_the_answer_it_gets_without_the_store(
    service: TestService, model_path: Path, redis_url: str
) -> None:
    first, second = questions(1)
    told = [(await ask(service, token_ids)).json() for token_ids in (first, second, second)]
    details = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in told]
    assert details == [0, NUM_CACHED, NUM_CACHED]
    async with running_service(model_path, redis_url, pruning=PRUNING) as without:
        expected = [(await ask(without, token_ids)).json() for token_ids in (first, second, second)]
    for ours, theirs in zip(told, expected, strict=True):
        assert ours["choices"] == theirs["choices"]
        assert theirs["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        assert theirs["usage"]["winnow"]["no_prefix_reason"] == "off"
        for name in ("selection_layer", "selected_tokens", "kv_bytes_kept"):
            assert ours["usage"]["winnow"][name] == theirs["usage"]["winnow"][name]


async def test_usage_tells_what_was_saved(service: TestService) -> None:
    first, second = questions(2)
    await ask(service, first)
    winnow = (await ask(service, second)).json()["usage"]["winnow"]
    assert winnow["cached_tokens"] + winnow["computed_tokens"] == len(second)
    assert winnow["cached_tokens"] == NUM_CACHED
    assert winnow["no_prefix_reason"] == ""
    assert winnow["recomputed_tokens"] == 0  # the frontier is at the layer of the cut
    assert winnow["saved_layer_tokens"] == 2 * NUM_CACHED
    computed = 2 * (len(second) - NUM_CACHED) + 2 * NUM_SELECTED
    assert winnow["computed_share"] == pytest.approx(computed / (4 * len(second)))


async def test_usage_of_several_prompts_sums_up_what_was_cached(service: TestService) -> None:
    first, second = questions(3)
    await ask(service, first)
    usage = (await ask(service, [second, prompt(20, seed=3)])).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == NUM_CACHED
    assert [one["cached_tokens"] for one in usage["winnow"]["prompts"]] == [NUM_CACHED, 0]
    assert usage["winnow"]["computed_tokens"] == len(second) - NUM_CACHED + 20


async def test_the_official_client_reads_cached_tokens_of_chats_and_streams(
    service: TestService,
) -> None:
    client = service.openai.with_options(api_key=ALICE)
    document = "the quick brown fox jumps over the lazy dog. " * 20

    async def cached(question: str) -> int:
        stream = await client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": document + question}],
            max_tokens=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        last = [chunk async for chunk in stream][-1]
        assert last.usage is not None and last.usage.prompt_tokens_details is not None
        assert last.usage.prompt_tokens_details.cached_tokens is not None
        return last.usage.prompt_tokens_details.cached_tokens

    assert await cached("who jumps?") == 0
    assert await cached("over whom?") > 0
    whole = await client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": document + "how lazy?"}],
        max_tokens=2,
    )
    assert whole.usage is not None and whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens


async def test_another_key_does_not_see_what_was_asked_and_the_same_one_does(
    service: TestService,
) -> None:
    first, second = questions(4)
    assert await num_cached(service, first, ALICE) == 0
    assert await num_cached(service, second, BOB) == 0
    assert await num_cached(service, second, ALICE) == NUM_CACHED
    assert await num_cached(service, first, BOB) == NUM_CACHED  # of its own


async def test_another_salt_shares_nothing_and_the_same_one_does(service: TestService) -> None:
    first, second = questions(5)
    assert await num_cached(service, first, cache_salt="a") == 0
    assert await num_cached(service, second) == 0
    assert await num_cached(service, second, cache_salt="b") == 0
    assert await num_cached(service, first, BOB, cache_salt="a") == 0
    assert await num_cached(service, second, cache_salt="a") == NUM_CACHED


async def test_rest_and_grpc_share_what_one_key_asked(service: TestService) -> None:
    first, second = questions(6)
    await ask(service, first, cache_salt="both")
    metadata = (("authorization", f"Bearer {ALICE}"),)
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        stub = InferenceStub(channel)
        message = request(token_ids=pb.TokenIds(ids=second), cache_salt="both")
        chunks = [chunk async for chunk in stub.Complete(message, metadata=metadata)]
        usage = chunks[-1].usage.winnow
        assert usage.cached_tokens == NUM_CACHED
        assert usage.computed_tokens == len(second) - NUM_CACHED
        assert usage.saved_layer_tokens == 2 * NUM_CACHED
        for salt, length in (("", "0"), ("x" * 257, "257")):
            refused = stub.Complete(request(cache_salt=salt), metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await refused.read()
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert f"has {length} characters; the allowed range is 1 to 256" in str(error.value)


@pytest.mark.parametrize(("salt", "length"), [("", "0"), ("secret" * 50, "300")])
async def test_a_salt_that_is_empty_or_too_long_is_refused_and_not_shown(
    service: TestService, salt: str, length: str
) -> None:
    response = await ask(service, [5, 6], cache_salt=salt)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "cache_salt"
    assert f"has {length} characters; the allowed range is 1 to 256" in error["message"]
    assert "secret" not in response.text


async def test_neither_keys_hashes_nor_salts_leave_the_gateway(service: TestService) -> None:
    await ask(service, [5, 6, 7], cache_salt="a salt of my own")
    salt = service.prefiller.jobs[-1].cache_salt
    assert salt and "my own" not in salt and salt != ALICE_ENTRY.sha256


@pytest.mark.parametrize("method", ["h2o", "pyramidinfer"])
async def test_methods_that_cannot_use_it_say_why(service: TestService, method: str) -> None:
    first, second = questions(8)
    await ask(service, first)
    options = {"method": method, "kv_budget": 48}
    winnow = (await ask(service, second, winnow=options)).json()["usage"]["winnow"]
    assert winnow["cached_tokens"] == 0
    reasons = {"h2o": "needs_all_queries", "pyramidinfer": "drops_from_layer_0"}
    assert winnow["no_prefix_reason"] == reasons[method]


async def test_log_probabilities_of_a_prompt_are_computed_without_it(service: TestService) -> None:
    first, second = questions(9)
    await ask(service, first)
    scored: dict[str, Any] = {"echo": True, "logprobs": 1, "winnow": {"method": "full"}}
    assert await num_cached(service, second, **scored) == 0


async def test_a_message_tells_what_was_cached_though_claude_code_counts_its_requests(
    service: TestService,
) -> None:
    system = {"type": "text", "text": "the quick brown fox " * NUM_CACHED}
    usages = []
    for request_idx in range(2):
        counted = f"x-anthropic-billing-header: cc_version=2.1; cch=fa69{request_idx};"
        body = {
            "model": MODEL_NAME,
            "system": [{"type": "text", "text": counted}, system],
            "messages": [{"role": "user", "content": f"question {request_idx}"}],
            "max_tokens": 2,
        }
        answer = await service.http.post("/v1/messages", json=body, headers={"x-api-key": ALICE})
        usages.append(answer.raise_for_status().json()["usage"])
    first, second = usages
    assert first["cache_read_input_tokens"] == 0
    assert second["cache_read_input_tokens"] >= NUM_CACHED
    total = second["input_tokens"] + second["cache_read_input_tokens"]
    assert total == first["input_tokens"]
