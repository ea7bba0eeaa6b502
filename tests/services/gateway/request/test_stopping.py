"""What ends an answer, and what of it is shown: over REST and gRPC, and on two releases at once."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from openai.types import Completion

from services.decode import spec
from services.gateway.request.choices import EndTokens
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from winnow.engine.generation_spec import GenerationSpec
from winnow.sampling_params import SamplingParams
from winnow.v1 import decode_pb2, inference_pb2
from winnow.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "the quick brown fox jumps"
NUM_TOKENS = 16
USER = 2  # <|user|>, a control token that ends nothing


async def complete(service: TestService, *, own: Any = (), **more: Any) -> Completion:
    """own: parameters that the official client does not know."""
    given: dict[str, Any] = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0} | more
    body = {"ignore_eos": True} | dict(own)
    return await service.openai.completions.create(model=MODEL_NAME, extra_body=body, **given)


async def tokens_of(service: TestService, **changes: Any) -> list[inference_pb2.ChoiceDelta]:
    """The deltas of one answer over gRPC."""
    values: dict[str, Any] = {
        "text": PROMPT,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = inference_pb2.CompleteRequest(model=MODEL_NAME, **(values | changes))
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        call = InferenceStub(channel).Complete(request, timeout=60)
        return [choice async for chunk in call for choice in chunk.choices]


def ids(deltas: list[inference_pb2.ChoiceDelta]) -> list[int]:
    return [i for delta in deltas for i in delta.token_ids]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def greedy(service: TestService) -> list[int]:
    """The token ids of the answer that nothing ends."""
    return ids(await tokens_of(service))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def late(greedy: list[int]) -> int:
    """A token of that answer that is not among its first ones."""
    return next(i for i in greedy[4:] if i not in greedy[:4])


def text_before(service: TestService, greedy: list[int], token_id: int) -> str:
    return service.gateway.model.tokenizer.decode(greedy[: greedy.index(token_id)])


@pytest.mark.parametrize("ignore_eos", [True, False])
async def test_a_stop_token_ends_the_answer_before_its_text(
    service: TestService, greedy: list[int], late: int, ignore_eos: bool
) -> None:
    own = {"stop_token_ids": [late, 319], "ignore_eos": ignore_eos}
    answer = await complete(service, own=own)
    choice = answer.choices[0]
    assert choice.text == text_before(service, greedy, late)
    assert (choice.finish_reason, choice.to_dict()["stop_reason"]) == ("stop", late)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == greedy.index(late) + 1
    await service.until_idle()


async def test_included_its_text_is_the_last_of_the_answer(
    service: TestService, greedy: list[int], late: int
) -> None:
    own = {"stop_token_ids": [late], "include_stop_str_in_output": True}
    choice = (await complete(service, own=own)).choices[0]
    shown = service.gateway.model.tokenizer.decode(greedy[: greedy.index(late) + 1])
    assert (choice.text, choice.to_dict()["stop_reason"]) == (shown, late)


async def test_a_stop_string_is_told_and_shown_where_it_is_included(
    service: TestService,
) -> None:
    whole = (await complete(service)).choices[0].text
    stop = whole[5:8]
    for includes in (False, True):
        own = {"include_stop_str_in_output": includes}
        choice = (await complete(service, own=own, stop=["never", stop])).choices[0]
        end = whole.index(stop) + (len(stop) if includes else 0)
        assert choice.text == whole[:end]
        assert (choice.finish_reason, choice.to_dict()["stop_reason"]) == ("stop", stop)


async def test_an_end_token_of_the_model_has_no_stop_reason(service: TestService) -> None:
    own = {"ignore_eos": False, "stop_token_ids": [0]}
    choice = (await complete(service, own=own, logit_bias={"0": 100})).choices[0]
    assert (choice.text, choice.finish_reason, choice.to_dict()["stop_reason"]) == (
        "",
        "stop",
        None,
    )
    own = {"ignore_eos": True, "stop_token_ids": [0]}
    choice = (await complete(service, own=own, logit_bias={"0": 100})).choices[0]
    assert (choice.finish_reason, choice.to_dict()["stop_reason"]) == ("stop", 0)


async def test_an_answer_that_nothing_stopped_has_no_stop_reason(service: TestService) -> None:
    choice = (await complete(service, own={"stop_token_ids": [USER]})).choices[0]
    assert (choice.finish_reason, choice.to_dict()["stop_reason"]) == ("length", None)


@pytest.mark.parametrize("stop", ["<|user|>", "<|user|>" * 2])
async def test_a_stop_string_that_is_a_control_token_stops(
    service: TestService, greedy: list[int], stop: str
) -> None:
    """By the token itself, which is no text of the answer."""
    forced = {"logit_bias": {str(USER): 100}}
    choice = (await complete(service, stop=[stop], **forced)).choices[0]
    assert (choice.text, choice.finish_reason) == ("", "stop")
    assert choice.to_dict()["stop_reason"] == stop
    ignored = (await complete(service, stop=["<|system|>"], **forced)).choices[0]
    assert (ignored.text, ignored.finish_reason) == ("", "length")
    eos = (await complete(service, stop=["<|end|>"], logit_bias={"0": 100})).choices[0]
    assert (eos.text, eos.finish_reason) == ("", "stop")


async def test_control_tokens_are_shown_on_request(service: TestService) -> None:
    forced = {"logit_bias": {str(USER): 100}, "max_tokens": 3}
    assert (await complete(service, **forced)).choices[0].text == ""
    shown = await complete(service, own={"skip_special_tokens": False}, logprobs=0, **forced)
    assert shown.choices[0].text == "<|user|>" * 3
    assert shown.choices[0].logprobs is not None
    assert shown.choices[0].logprobs.text_offset == [0, 8, 16]


@pytest.mark.parametrize("ignore_eos", [True, False])
async def test_nothing_ends_an_answer_before_min_tokens(
    service: TestService, ignore_eos: bool
) -> None:
    own = {"min_tokens": 6, "ignore_eos": ignore_eos, "stop_token_ids": [USER]}
    wanted = {"0": 100, str(USER): 100} | {str(i): -100 for i in (1, 3)}
    answer = await complete(service, own=own, logit_bias=wanted, stop=["a", "e", " "], logprobs=0)
    assert answer.usage is not None and answer.usage.completion_tokens == 7
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert not {"<|end|>", "<|user|>"} & set(choice.logprobs.tokens[:6])
    assert choice.logprobs.tokens[6] in {"<|end|>", "<|user|>"}


async def test_a_stop_string_within_min_tokens_does_not_count(service: TestService) -> None:
    whole = (await complete(service)).choices[0].text
    answer = await complete(service, own={"min_tokens": 8}, stop=[whole[0]])
    assert answer.usage is not None and answer.usage.completion_tokens > 8
    assert answer.choices[0].text.startswith(whole[:5])


async def test_each_of_several_choices_ends_by_itself_streamed_or_not(
    service: TestService,
) -> None:
    options: dict[str, Any] = {"n": 4, "temperature": 1.5, "seed": 3}
    free = [one for one in await tokens_of(service, **options) if one.index == 1]
    own = {"stop_token_ids": ids(free)[5:6], "ignore_eos": True}
    whole = await complete(service, own=own, logprobs=1, **options)
    assert "stop" in {choice.finish_reason for choice in whole.choices}
    texts, ends = [""] * 4, {}
    given: dict[str, Any] = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "logprobs": 1} | options
    async for chunk in await service.openai.completions.create(
        model=MODEL_NAME, stream=True, extra_body=own, **given
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = (choice.finish_reason, choice.to_dict()["stop_reason"])
    assert texts == [choice.text for choice in whole.choices]
    assert ends == {
        choice.index: (choice.finish_reason, choice.to_dict()["stop_reason"])
        for choice in whole.choices
    }


async def test_chat_takes_the_same(service: TestService) -> None:
    def chat(**own: Any) -> Any:
        return service.openai.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=8,
            temperature=0,
            logit_bias={str(USER): 100},
            extra_body={"ignore_eos": True} | own,
        )

    answer = await chat(stop_token_ids=[USER], min_tokens=2)
    stopped = answer.choices[0]
    assert (stopped.finish_reason, stopped.to_dict()["stop_reason"]) == ("stop", USER)
    assert answer.usage.completion_tokens == 3
    shown = (await chat(skip_special_tokens=False)).choices[0]
    assert shown.message.content == "<|user|>" * 8


async def test_grpc_takes_and_tells_the_same(
    service: TestService, greedy: list[int], late: int
) -> None:
    stopped = await tokens_of(service, stop_token_ids=[late])
    assert ids(stopped) == greedy[: greedy.index(late) + 1]
    assert (stopped[-1].finish_reason, stopped[-1].stop_token_id) == ("stop", late)
    assert "".join(one.text for one in stopped) == text_before(service, greedy, late)
    delayed = await tokens_of(service, stop_token_ids=[late], min_tokens=NUM_TOKENS)
    assert len(ids(delayed)) == NUM_TOKENS and late not in ids(delayed)
    assert delayed[-1].WhichOneof("stop_reason") is None
    bias = {"logit_bias": {USER: 100}}
    by_text = await tokens_of(service, stop=["<|user|>"], include_stop_str_in_output=True, **bias)
    assert [one.text for one in by_text] == ["<|user|>"]
    assert by_text[-1].stop_string == "<|user|>"
    shown = await tokens_of(service, skip_special_tokens=False, max_tokens=2, **bias)
    assert "".join(one.text for one in shown) == "<|user|><|user|>"


@pytest.mark.parametrize(
    ("own", "message", "param"),
    [
        ({"min_tokens": 17}, "min_tokens is 17; the allowed range is [0, 16]", "min_tokens"),
        ({"min_tokens": -1}, "min_tokens is -1; the allowed range is [0, 16]", "min_tokens"),
        ({"min_tokens": 1.5}, "min_tokens is 1.5", "min_tokens"),
        ({"stop_token_ids": [320]}, "token id 320; the vocab", "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "token id -1; the vocab", "stop_token_ids"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids[0] is 1000000", "stop_token_ids[0]"),
        ({"stop_token_ids": list(range(129))}, "129 tokens; the limit is 128", "stop_token_ids"),
        ({"stop_token_ids": [5] * 129}, "129 tokens; the limit is 128", "stop_token_ids"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5", "stop_token_ids"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids[0] is '5'", "stop_token_ids[0]"),
        ({"skip_special_tokens": 1}, "skip_special_tokens is 1", "skip_special_tokens"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    service: TestService, own: dict[str, Any], message: str, param: str
) -> None:
    body = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": NUM_TOKENS} | own
    response = await service.http.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert message in error["message"]


def forget_newer_fields(request: decode_pb2.GenerateRequest, vocab_size: int) -> GenerationSpec:
    """As a decode worker of the release before, which does not know them."""
    for name in ("stop_token_ids", "min_tokens"):
        request.sampling.ClearField(name)
    return spec.spec_from_request(request, vocab_size)


@pytest_asyncio.fixture(loop_scope="module")
async def older(
    model_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[TestService]:
    """A service whose decode worker is of the release before."""
    monkeypatch.setattr("services.decode.worker.FEATURES", ())
    monkeypatch.setattr("services.decode.generate.spec_from_request", forget_newer_fields)
    async with running_service(model_path, redis_url) as service:
        yield service
        await service.until_idle()


async def test_beside_an_older_decode_worker_the_gateway_ends_the_answer(
    older: TestService, greedy: list[int], late: int
) -> None:
    answer = await complete(older, own={"stop_token_ids": [late]})
    assert answer.choices[0].text == text_before(older, greedy, late)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == greedy.index(late) + 1


async def test_an_older_decode_worker_gets_no_request_with_min_tokens(older: TestService) -> None:
    body = {"model": MODEL_NAME, "prompt": PROMPT, "min_tokens": 2}
    response = await older.http.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_decode_worker")
    without = await older.http.post("/v1/completions", json=body | {"min_tokens": 0})
    assert without.status_code == 200


async def test_end_tokens_are_the_models_and_the_requests() -> None:
    sampling = SamplingParams(stop_token_ids=frozenset({1, 2}))
    assert EndTokens.of(sampling, frozenset({0, 1})) == EndTokens(frozenset({0, 1}), frozenset({2}))
    ignoring = SamplingParams(stop_token_ids=frozenset({1, 2}), ignore_eos=True)
    assert EndTokens.of(ignoring, frozenset({0, 1})) == EndTokens(frozenset(), frozenset({1, 2}))
