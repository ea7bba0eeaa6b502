"""`echo` with `logprobs`: what the model gives a prompt's own tokens, over REST and gRPC."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
import pytest_asyncio
import torch
from torch import Tensor
from transformers import PreTrainedModel

from services.common.jobs import PrefillJob, PrefillOutcome
from tests.deadlines import SOON_S
from tests.services.exposed import value
from tests.services.gateway.request.prompt_runs import break_off
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from tests.winnow import reference
from winnow.errors import NotFinite, Overloaded, PrefillFailed, PrefillLost
from winnow.tokenizer import Tokenizer
from winnow.v1 import inference_pb2 as pb
from winnow.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETIONS = "/v1/completions"
TEXT = "the quick brown fox, übergroß 漢字 🦊, jumps over<|end|>the lazy dog " * 4
PRUNING = {
    "method": "fastkv",
    "window_size": 8,
    "select_tokens": 32,
    "kv_budget": 24,
    "fixed_layer": 1,
    "observed_layers": 2,
    "min_layer": 1,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(model_path: Path, redis_url: str) -> AsyncIterator[TestService]:
    """One that prunes, so that what is computed unpruned is so in spite of that."""
    async with running_service(model_path, redis_url, pruning=PRUNING, num_workers=2) as service:
        yield service
        await service.until_idle()


@pytest.fixture(scope="module")
def model(model_path: Path) -> PreTrainedModel:
    return reference.load(model_path)


@pytest.fixture(scope="module")
def tokenizer(service: TestService) -> Tokenizer:
    return service.gateway.model.tokenizer


def log_softmax(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """Row i is what the model expects after token i."""
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)


async def score(service: TestService, prompt: object, **changes: Any) -> dict[str, Any]:
    body = {"model": MODEL_NAME, "prompt": prompt, "echo": True, "logprobs": 3, "max_tokens": 0}
    more = {"temperature": 0, "ignore_eos": True}
    response = await service.http.post(COMPLETIONS, json=body | more | changes)
    assert response.status_code == 200, response.text
    return dict(response.json())


def assert_scored(logprobs: dict[str, Any], rows: Tensor, token_ids: list[int]) -> None:
    """Every token's is the model's own, and the first has none."""
    chosen = [float(row[token_id]) for row, token_id in zip(rows, token_ids[1:], strict=False)]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(chosen, abs=1e-4)
    for row, top in zip(rows, logprobs["top_logprobs"][1:], strict=False):
        assert sorted(top.values()) == pytest.approx(sorted(row.topk(3).values.tolist()), abs=1e-4)
    assert {len(values) for values in logprobs.values()} == {len(token_ids)}


async def test_a_prompt_is_scored_and_nothing_generated(
    service: TestService, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(TEXT)
    answer = await score(service, TEXT)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert_scored(choice["logprobs"], log_softmax(model, token_ids), token_ids)
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(token_ids), 0)
    assert usage["total_tokens"] == len(token_ids)


async def test_it_is_computed_unpruned_and_says_so(
    service: TestService, model: PreTrainedModel
) -> None:
    prompt = [7, 9, 11, 13] * 40
    for changes in ({}, {"winnow": {"method": "asl"}}, {"max_tokens": 2}):
        answer = await score(service, prompt, **changes)
        logprobs = answer["choices"][0]["logprobs"]
        own = {name: values[: len(prompt)] for name, values in logprobs.items()}
        assert_scored(own, log_softmax(model, prompt), prompt)
        told = answer["usage"]["winnow"]
        assert (told["no_selection_reason"], told["selection_layer"]) == ("off", None)
        assert (told["selected_tokens"], told["computed_share"]) == (len(prompt), 1)
    pruned = await score(service, prompt, logprobs=None, max_tokens=1)
    assert pruned["usage"]["winnow"]["selection_layer"] == 1


async def test_no_decode_worker_is_needed_where_nothing_is_generated(
    model_path: Path, redis_url: str
) -> None:
    async with running_service(model_path, redis_url, num_workers=0) as alone:
        answer = await score(alone, "the fox")
        assert answer["usage"]["winnow"]["wire_bytes"] == 0
        assert answer["usage"]["winnow"]["ttft_s"] == 0
        refused = await alone.http.post(
            COMPLETIONS, json={"model": MODEL_NAME, "prompt": "the fox", "echo": True}
        )
        assert refused.status_code == 503


async def test_generated_tokens_follow_with_theirs(
    service: TestService, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(TEXT)
    new_ids = reference.greedy(model, token_ids, 5)
    answer = await score(service, TEXT, max_tokens=5)
    (choice,) = answer["choices"]
    assert choice["text"].startswith(TEXT) and len(choice["text"]) > len(TEXT)
    whole = token_ids + new_ids
    assert_scored(choice["logprobs"], log_softmax(model, whole)[:-1], whole)
    assert choice["logprobs"]["text_offset"][len(token_ids)] == len(TEXT)
    assert answer["usage"]["completion_tokens"] == 5


async def test_every_offset_is_where_its_token_is_in_the_text(
    service: TestService, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(TEXT)
    for prompt in (TEXT, token_ids):
        (choice,) = (await score(service, prompt))["choices"]
        assert choice["text"] == TEXT
        tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
        assert offsets == sorted(offsets) and offsets[0] == 0
        for token, offset in zip(tokens, offsets, strict=True):
            if not token.startswith("bytes:"):
                assert TEXT[offset:].startswith(token), (token, offset)


async def test_prompts_of_a_list_are_scored_each_and_choices_repeat_it(
    service: TestService, model: PreTrainedModel
) -> None:
    prompts = [[5, 6, 7, 8], [9], [3] * 30]
    answer = await score(service, prompts, n=2, max_tokens=1, temperature=1.5, seed=1)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for choice in answer["choices"]:
        prompt = prompts[choice["index"] // 2]
        own = {name: values[: len(prompt)] for name, values in choice["logprobs"].items()}
        assert_scored(own, log_softmax(model, prompt), prompt)
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1


@pytest.mark.parametrize("max_tokens", [0, 4])
async def test_a_stream_tells_the_same(service: TestService, max_tokens: int) -> None:
    whole = (await score(service, TEXT, max_tokens=max_tokens))["choices"][0]
    body: dict[str, Any] = {"prompt": TEXT, "echo": True, "logprobs": 3, "max_tokens": max_tokens}
    text = ""
    lists: dict[str, list[Any]] = {name: [] for name in whole["logprobs"]}
    async for chunk in await service.openai.completions.create(
        model=MODEL_NAME, temperature=0, stream=True, extra_body={"ignore_eos": True}, **body
    ):
        (choice,) = chunk.to_dict()["choices"]
        text += choice["text"]
        for name, values in choice["logprobs"].items():
            lists[name] += values
    assert text == whole["text"]
    assert lists["tokens"] == whole["logprobs"]["tokens"]
    assert lists["text_offset"] == whole["logprobs"]["text_offset"]
    assert lists["token_logprobs"][1:] == pytest.approx(
        whole["logprobs"]["token_logprobs"][1:], abs=1e-4
    )


async def test_echo_of_nothing_generated_needs_no_logprobs(service: TestService) -> None:
    answer = await score(service, "the fox", logprobs=None)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == (
        "the fox",
        None,
        "length",
    )


async def test_log_and_metrics_know_it(
    service: TestService, caplog: pytest.LogCaptureFixture
) -> None:
    async def finished() -> float:
        metrics = (await service.admin.get("/metrics")).text
        return value(metrics, "winnow_requests_finished_total", reason="length")

    before = await finished()
    with caplog.at_level("INFO", logger="services.gateway"):
        await score(service, "the fox")
    assert await finished() == before + 1
    (line,) = [
        r.getMessage() for r in caplog.records if r.name == "services.gateway.request.outcomes"
    ]
    assert "0 generated" in line and "nothing generated" in line
    assert value((await service.admin.get("/metrics")).text, "winnow_requests_running") == 0


@pytest.mark.parametrize(
    ("changes", "message", "param"),
    [
        ({"logprobs": 21}, "logprobs is 21; the allowed range is 0 to 20", "logprobs"),
        ({"max_tokens": -1}, "max_tokens is -1; the allowed range is 0 to 4,096", "max_tokens"),
        ({"echo": False}, "max_tokens is 0; the allowed range is 1 to 4,096", "max_tokens"),
        ({"prompt": [5] * 8192}, "prompt has 8,192 tokens; the limit is 8,191", "prompt"),
        ({"prompt": [5] * 8191, "max_tokens": 2}, "make 8,193", "max_tokens"),
        ({"best_of": 2}, "best_of is not supported", "best_of"),
        ({"prompt_logprobs": 1}, "prompt_logprobs is not supported", "prompt_logprobs"),
    ],
)
async def test_what_exceeds_a_limit_is_refused(
    service: TestService, changes: dict[str, Any], message: str, param: str
) -> None:
    body = {"model": MODEL_NAME, "prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 0}
    refused = await service.http.post(COMPLETIONS, json=body | changes)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, param)
    assert message in error["message"]


async def test_an_operators_cap_on_what_is_kept_is_a_cap_here_too(
    model_path: Path, redis_url: str
) -> None:
    caps = {"pruning": PRUNING, "max_kv_budget": 64}
    async with running_service(model_path, redis_url, num_workers=0, **caps) as capped:
        body = {"model": MODEL_NAME, "prompt": "a", "echo": True, "logprobs": 1}
        refused = await capped.http.post(COMPLETIONS, json=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "echo")
    assert "the operator's cap max_kv_budget is 64" in error["message"]


async def test_a_failed_prefill_is_tried_again(service: TestService) -> None:
    expected = (await score(service, "the fox"))["choices"]
    for failures in ([PrefillFailed("once")], [PrefillLost("gone"), PrefillLost("gone")]):
        service.prefiller.failures = list(failures)
        assert (await score(service, "the fox"))["choices"] == expected
        service.prefiller.failures = list(failures)
        assert (await score(service, "the fox", max_tokens=1))["choices"][0]["text"]


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize(
    ("failures", "status", "code"),
    [
        ([PrefillFailed("on fire"), PrefillFailed("on fire")], 502, "prefill_failed"),
        ([Overloaded("64 prompts wait")], 429, "overloaded"),
        ([NotFinite("the logits are not finite")], 500, "not_finite"),
    ],
)
async def test_what_befalls_prefill_reaches_the_client(
    service: TestService, failures: list[Exception], status: int, code: str, max_tokens: int
) -> None:
    service.prefiller.failures = list(failures)
    body = {"model": MODEL_NAME, "prompt": "a", "echo": True, "logprobs": 1}
    refused = await service.http.post(COMPLETIONS, json=body | {"max_tokens": max_tokens})
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
    await service.until_idle()


@pytest.mark.parametrize("max_tokens", [0, 4])
async def test_a_client_that_leaves_cancels_it(service: TestService, max_tokens: int) -> None:
    service.prefiller.hold_jobs()
    try:
        async with httpx.AsyncClient(base_url=service.url) as client, asyncio.timeout(SOON_S):
            body = {"model": MODEL_NAME, "prompt": "a", "echo": True, "logprobs": 1}
            leaving = asyncio.create_task(
                client.post(COMPLETIONS, json=body | {"max_tokens": max_tokens})
            )
            await service.prefiller.asked.wait()
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            await service.prefiller.cancelled.wait()
        await service.until_idle()
    finally:
        service.prefiller.hold.set()


async def test_a_prompt_over_its_time_gets_504(model_path: Path, redis_url: str) -> None:
    async with running_service(
        model_path, redis_url, num_workers=0, request_timeout_s=0.3
    ) as service:
        service.prefiller.hold_jobs()
        body = {"model": MODEL_NAME, "prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 0}
        late = await service.http.post(COMPLETIONS, json=body)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")


async def test_a_lost_decode_worker_costs_no_second_scoring(
    model_path: Path, redis_url: str
) -> None:
    async with running_service(model_path, redis_url, num_workers=2) as service:
        body = {"model": MODEL_NAME, "prompt": "the fox", "echo": True, "logprobs": 1}
        long = body | {"max_tokens": 600, "temperature": 0, "ignore_eos": True}
        expected = (await service.http.post(COMPLETIONS, json=long)).json()["choices"][0]
        async with service.http.stream("POST", COMPLETIONS, json=long | {"stream": True}) as answer:
            lines = answer.aiter_lines()
            chunks = [json.loads((await anext(lines)).removeprefix("data: "))]
            busy = next(w for w in service.workers if w.engine.stats().running_sequences)
            await break_off(busy)
            chunks += [json.loads(one[6:]) async for one in lines if one.startswith("data: {")]
        tokens = [t for c in chunks for t in c["choices"][0]["logprobs"]["tokens"]]
        assert tokens == expected["logprobs"]["tokens"]
        first, second = service.prefiller.jobs[-2:]
        assert (first.num_prompt_logprobs, second.num_prompt_logprobs) == (1, None)


async def test_a_prefill_worker_lost_before_it_told_is_asked_again(
    service: TestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KV is in place by then, so it is for the log-probabilities alone."""
    expected = await score(service, "the fox", max_tokens=9)
    prefill, jobs = service.prefiller.prefill, []

    async def lost(job: PrefillJob) -> PrefillOutcome:
        jobs.append(job)
        outcome = await prefill(job)
        if job.kv_address is None:
            return outcome
        async with asyncio.timeout(SOON_S):
            while not any(worker.engine.stats().running_sequences for worker in service.workers):
                await service.http.get("/health")
        raise PrefillLost("it died")

    monkeypatch.setattr(service.prefiller, "prefill", lost)
    answer = await score(service, "the fox", max_tokens=400)
    num_scored = len(expected["choices"][0]["logprobs"]["tokens"])
    logprobs = answer["choices"][0]["logprobs"]["token_logprobs"][:num_scored]
    assert logprobs == pytest.approx(expected["choices"][0]["logprobs"]["token_logprobs"])
    assert [job.kv_address is None for job in jobs] == [False, True]
    await service.until_idle()


@pytest_asyncio.fixture(loop_scope="module")
async def stub(service: TestService) -> AsyncIterator[InferenceStub]:
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        yield InferenceStub(channel)


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("num_tokens", [1, 40, 1500])
async def test_grpc_tells_the_same_as_rest(
    service: TestService, stub: InferenceStub, num_tokens: int, max_tokens: int
) -> None:
    prompt = [5 + i * 7 % 300 for i in range(num_tokens)]
    request = pb.CompleteRequest(
        model=MODEL_NAME,
        token_ids=pb.TokenIds(ids=prompt),
        echo=True,
        logprobs=3,
        max_tokens=max_tokens,
        temperature=0,
        ignore_eos=True,
    )
    chunks = [chunk async for chunk in stub.Complete(request, timeout=60)]
    deltas = [choice for chunk in chunks for choice in chunk.choices]
    scored = [one for delta in deltas for one in delta.prompt_logprobs]
    rest = (await score(service, prompt, max_tokens=max_tokens))["choices"][0]
    logprobs = rest["logprobs"]
    assert not scored[0].HasField("logprob") and not scored[0].top
    assert [one.token for one in scored] == logprobs["tokens"][:num_tokens]
    assert [one.logprob for one in scored[1:]] == pytest.approx(
        logprobs["token_logprobs"][1:num_tokens], abs=1e-4
    )
    assert all(len(one.top) == 3 for one in scored[1:])
    assert "".join(delta.text for delta in deltas) == rest["text"]
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]
    assert sum(len(delta.token_ids) for delta in deltas) == max_tokens
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (num_tokens, max_tokens)
    assert usage.winnow.no_selection_reason == "off"
