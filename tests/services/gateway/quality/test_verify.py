"""`winnow: {"verify": true}`: the pruned answer, and beside it the unpruned one."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
import schemathesis

from services.common.rpc import error_from_rpc
from services.gateway.access.keys import entry_text, new_key
from services.gateway.quality import checks
from tests.services.gateway.quality.service import (
    COMPLETIONS,
    NUM_TOKENS,
    PRUNING,
    ask,
    body,
    complete,
    count,
    prompt,
)
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from winnow.errors import InvalidSetting, PrefillFailed
from winnow.v1 import inference_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")

VERIFY: dict[str, Any] = {"verify": True, "kv_budget": 9}
FULL = {"method": "full"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(model_path: Path, redis_url: str) -> AsyncIterator[TestService]:
    async with running_service(model_path, redis_url, pruning=PRUNING) as service:
        yield service
        await service.until_idle()


def verified(answer: dict[str, Any]) -> dict[str, Any]:
    return dict(answer["usage"]["winnow"]["verify"])


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "seed": 7}], ids=["greedy", "seed"])
async def test_both_answers_are_those_of_requests_of_their_own(
    service: TestService, sampling: dict[str, Any]
) -> None:
    pruned, whole = [
        (await ask(service, winnow=winnow, **sampling))["choices"][0]["text"]
        for winnow in ({"kv_budget": 9}, FULL)
    ]
    both = await ask(service, winnow=VERIFY, **sampling)
    assert [choice["text"] for choice in both["choices"]] == [pruned]
    told = verified(both)
    assert told["text"] == whole
    assert told["text_agrees"] is (pruned == whole) is False
    # SnapKV computes the prompt whole, so that the first token is the same.
    assert told["first_token_agrees"] and told["first_token_kl"] < 1e-3
    assert (told["finish_reason"], told["completion_tokens"]) == ("length", 6)
    assert told["ttft_s"] > 0


async def test_a_cut_that_goes_too_far_shows_in_the_first_token(service: TestService) -> None:
    cut = {"method": "fastkv", "fixed_layer": 0, "select_tokens": 9, "verify": True}
    found = [verified(await ask(service, prompt(seed), winnow=cut)) for seed in range(4)]
    assert not all(one["first_token_agrees"] for one in found)
    assert max(one["first_token_kl"] for one in found) > 0.1


async def test_nothing_pruned_is_nothing_changed(service: TestService) -> None:
    for winnow in (FULL, {"kv_budget": NUM_TOKENS}):
        told = verified(await ask(service, winnow=winnow | {"verify": True}))
        assert told["text_agrees"] and told["first_token_agrees"]
        assert told["first_token_kl"] < 1e-3


async def test_usage_and_log_probabilities_are_the_pruned_answers(service: TestService) -> None:
    plain = await ask(service, winnow={"kv_budget": 9}, logprobs=2)
    both = await ask(service, winnow=VERIFY, logprobs=2)
    (one,), (other,) = plain["choices"], both["choices"]
    assert (one["text"], one["finish_reason"]) == (other["text"], other["finish_reason"])
    assert one["logprobs"]["tokens"] == other["logprobs"]["tokens"]
    assert {len(top) for top in other["logprobs"]["top_logprobs"]} == {2}
    assert both["usage"]["completion_tokens"] == 6
    kept = [one["usage"]["winnow"]["kv_bytes_kept"] for one in (plain, both)]
    assert kept[0] == kept[1] < both["usage"]["winnow"]["kv_bytes_full"]
    assert "prompts" not in both["usage"]["winnow"] and "verify" not in plain["usage"]["winnow"]


async def test_a_stop_string_ends_each_of_them(service: TestService) -> None:
    whole = (await ask(service, winnow=FULL))["choices"][0]["text"]
    told = verified(await ask(service, winnow=VERIFY, stop=[whole[2:4]]))
    assert told["text"] == whole[: whole.index(whole[2:4])]
    assert told["finish_reason"] == "stop"


async def test_what_decode_would_cut_the_other_keeps(service: TestService) -> None:
    cut = {"decode_budget": 12, "recompress_interval": 1, "kv_budget": NUM_TOKENS, "verify": True}
    both = await ask(service, winnow=cut)
    whole = await ask(service, winnow=FULL)
    assert both["usage"]["winnow"]["recompressed_entries"] > 0
    assert verified(both)["text"] == whole["choices"][0]["text"]


async def test_a_stream_tells_it_with_its_usage(service: TestService) -> None:
    whole = await ask(service, winnow=VERIFY)
    asked = body(prompt(), winnow=VERIFY, stream=True, stream_options={"include_usage": True})
    text, usage = "", dict[str, Any]()
    async with service.http.stream("POST", COMPLETIONS, json=asked) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            for choice in chunk["choices"]:
                assert choice["index"] == 0
                text += choice["text"]
            usage = chunk["usage"] or {}
    assert text == whole["choices"][0]["text"]
    assert usage["winnow"]["verify"]["text"] == verified(whole)["text"]
    assert usage["completion_tokens"] == 6


async def test_a_chat_is_verified_too(service: TestService) -> None:
    asked = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": "the quick brown fox jumps " * 20}],
        "max_tokens": 4,
        "temperature": 0,
        "winnow": VERIFY,
    }
    answer = (await service.http.post("/v1/chat/completions", json=asked)).json()
    assert len(answer["choices"]) == 1 and verified(answer)["text"]


async def test_over_grpc_it_is_the_same(service: TestService) -> None:
    rest = await ask(service, winnow=VERIFY)
    request = pb.CompleteRequest(
        model=MODEL_NAME,
        token_ids=pb.TokenIds(ids=prompt()),
        max_tokens=6,
        temperature=0,
        ignore_eos=True,
        winnow=pb.WinnowOptions(**VERIFY, task="qa"),
    )
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        *chunks, last = await complete(channel, request)
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        assert text == rest["choices"][0]["text"]
        told = last.usage.winnow.verify
        assert told.text == verified(rest)["text"]
        assert (told.text_agrees, told.first_token_agrees) == (False, True)
        request.winnow.verify = False
        (*_, last) = await complete(channel, request)
        assert not last.usage.winnow.HasField("verify")


async def test_the_answer_is_as_openapi_describes_it(service: TestService) -> None:
    document = (await service.http.get("/openapi.json")).json()
    options = document["components"]["schemas"]["WinnowOptions"]["properties"]
    assert "default" in options["kv_budget"] and {"verify", "task"} <= options.keys()
    operation = schemathesis.openapi.from_dict(document)[COMPLETIONS]["POST"]
    case = operation.Case(body=body(prompt(), winnow=VERIFY), media_type="application/json")
    response = await asyncio.to_thread(case.call, base_url=service.url, timeout=60)
    assert response.status_code == 200
    case.validate_response(response)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n is 2"),
    ({"prompt": [[5, 6], [7]]}, "the request has 2 prompts"),
    ({"echo": True, "logprobs": 1}, "echo with logprobs computes the prompt unpruned"),
    ({"echo": True, "max_tokens": 0}, "max_tokens is 0"),
    ({"stream": True}, "needs stream_options.include_usage"),
    ({"winnow": {"verify": 1}}, "winnow.verify is 1"),
]


@pytest.mark.parametrize(("changes", "complaint"), REFUSALS)
async def test_what_it_cannot_do_is_refused(
    service: TestService, changes: dict[str, Any], complaint: str
) -> None:
    asked = body(changes.pop("prompt", prompt()), **{"winnow": VERIFY, **changes})
    response = await service.http.post(COMPLETIONS, json=asked)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "winnow.verify")
    assert complaint in error["message"]


async def test_over_grpc_it_is_refused_likewise(service: TestService) -> None:
    request = pb.CompleteRequest(
        model=MODEL_NAME,
        token_ids=pb.TokenIds(ids=prompt()),
        n=2,
        winnow=pb.WinnowOptions(**VERIFY),
    )
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await complete(channel, request)
    error = error_from_rpc(refused.value)
    assert isinstance(error, InvalidSetting) and error.param == "winnow.verify"


@pytest.mark.parametrize(
    ("cap", "winnow"),
    [
        ("max_kv_budget", {"kv_budget": 24}),
        ("max_select_tokens", {"method": "fastkv", "select_tokens": 32, "fixed_layer": 1}),
        ("max_decode_budget", {"decode_budget": 32}),
    ],
)
async def test_an_operators_cap_refuses_it(
    model_path: Path, redis_url: str, cap: str, winnow: dict[str, Any]
) -> None:
    pruning = PRUNING | winnow
    async with running_service(model_path, redis_url, pruning=pruning, **{cap: 64}) as service:
        await ask(service)
        response = await service.http.post(
            COMPLETIONS, json=body(prompt(), winnow={"verify": True})
        )
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "winnow.verify")
        assert f"cap {cap} is 64" in error["message"]


async def test_it_costs_and_counts_as_two_prompts(
    model_path: Path, redis_url: str, tmp_path: Path
) -> None:
    key, entry = new_key("reader", tokens_per_minute=3 * (NUM_TOKENS + 6))
    (tmp_path / "keys.yaml").write_text(entry_text(entry))
    async with running_service(
        model_path, redis_url, pruning=PRUNING, api_keys_file=tmp_path / "keys.yaml"
    ) as service:
        service.http.headers["authorization"] = f"Bearer {key}"
        await ask(service, winnow=VERIFY)
        assert count(service, "requests_received_total") == 2
        assert count(service, "generated_tokens_total") == 12
        asked = body(prompt(), winnow=VERIFY)
        assert (await service.http.post(COMPLETIONS, json=asked)).status_code == 429
        await ask(service)


async def test_where_either_fails_the_request_does(model_path: Path, redis_url: str) -> None:
    async with running_service(
        model_path, redis_url, pruning=PRUNING, prefill_attempts=1
    ) as service:
        service.prefiller.failures.append(PrefillFailed("it broke"))
        response = await service.http.post(COMPLETIONS, json=body(prompt(), winnow=VERIFY))
        assert response.status_code == 502
        await service.until_idle()


async def test_it_is_not_sampled_besides(
    model_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_QUIET_S", 0.05)
    async with running_service(model_path, redis_url, pruning=PRUNING, quality_sample=1) as service:
        await ask(service, winnow=VERIFY)
        await asyncio.sleep(0.3)
        assert [job.gives_way for job in service.prefiller.jobs] == [False, False]
