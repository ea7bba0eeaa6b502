"""What OpenAI's and vLLM's clients send besides what they want: taken, and never in the way."""

import re
from pathlib import Path
from typing import Any

import openai
import pytest
from anthropic.types.beta.message_create_params import MessageCreateParamsBase as MessageParams
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams
from openai.types.responses.response_create_params import (
    ResponseCreateParamsBase as ResponseParams,
)

from services.gateway.body import Body
from services.gateway.rest.bodies import ChatRequest, CompletionRequest, Sampling
from services.gateway.rest.messages_bodies import MessagesRequest
from services.gateway.rest.requests import RequestReader
from services.gateway.rest.responses_bodies import ResponsesRequest
from services.gateway.rest.unsupported import (
    CHAT_PARAMETERS,
    COMPLETION_PARAMETERS,
    MESSAGES_PARAMETERS,
    RESPONSES_PARAMETERS,
)
from services.gateway.rest.without_effect import WithoutEffect
from tests.services.gateway.service import MODEL_NAME, TestService

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE = Path(__file__).parents[4] / "docs" / "api.md"
TEXT: dict[str, Any] = {"model": MODEL_NAME, "prompt": "the fox", "max_tokens": 4, "temperature": 0}
CHAT = {
    "model": MODEL_NAME,
    "messages": [{"role": "user", "content": "the fox"}],
    "max_tokens": 4,
    "temperature": 0,
}
WITHOUT_EFFECT: dict[str, Any] = {
    "guided_decoding_backend": "xgrammar",
    "metadata": {"run": "7"},
    "prediction": {"type": "content", "content": "the lazy dog"},
    "prompt_cache_key": "tenant",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "someone",
    "service_tier": "flex",
    "store": True,
    "user": "someone",
    "verbosity": "low",
    "priority": 3,
}
FOR_NOTHING: list[dict[str, Any]] = [
    {"top_k": -1, "min_p": 0, "top_p": 1, "repetition_penalty": 1, "length_penalty": 1.0},
    {"seed": -1},
    {"best_of": 1, "use_beam_search": False, "early_stopping": False, "n": 1},
    {"stop": ""},
    {"stop": []},
    {"stop": None, "logit_bias": None, "seed": None, "n": None, "temperature": None},
    {"logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0},
    {"echo": False, "stream": False, "logprobs": None, "ignore_eos": None},
    {"stream_options": {}},
    {"stream_options": {"include_usage": False, "continuous_usage_stats": False}},
    {"stream_options": None, "winnow": {}},
    {"guided_json": None, "structured_outputs": None, "logits_processors": None},
    {"bad_words": [], "allowed_token_ids": None, "spaces_between_special_tokens": True},
    {"response_format": {"type": "text"}, "prompt_logprobs": None, "return_token_ids": False},
]


@pytest.mark.parametrize(
    ("params", "request_type", "refused"),
    [
        (ChatParams, ChatRequest, CHAT_PARAMETERS),
        (TextParams, CompletionRequest, COMPLETION_PARAMETERS),
        (ResponseParams, ResponsesRequest, RESPONSES_PARAMETERS),
        (MessageParams, MessagesRequest, MESSAGES_PARAMETERS),
    ],
)
async def test_every_parameter_of_the_official_client_is_known(
    params: Any, request_type: type[Body], refused: dict[str, Any]
) -> None:
    in_headers = {"betas"}
    known = set(request_type.model_fields) | set(refused) | {"stream"} | in_headers
    assert set(params.__annotations__) - known == set()


async def test_no_parameter_is_both_taken_and_refused() -> None:
    assert not set(ChatRequest.model_fields) & set(CHAT_PARAMETERS)
    assert not set(CompletionRequest.model_fields) & set(COMPLETION_PARAMETERS)
    assert not set(ResponsesRequest.model_fields) & set(RESPONSES_PARAMETERS)
    assert not set(MessagesRequest.model_fields) & set(MESSAGES_PARAMETERS)


@pytest.mark.parametrize(
    ("title", "request_type", "refused"),
    [
        ("/v1/responses", ResponsesRequest, RESPONSES_PARAMETERS),
        ("/v1/messages", MessagesRequest, MESSAGES_PARAMETERS),
    ],
)
async def test_the_page_about_the_api_lists_the_parameters_of_other_apis(
    title: str, request_type: type[Body], refused: dict[str, Any]
) -> None:
    section = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    common = set(Sampling.model_fields) if title == "/v1/messages" else set()
    listed = set(re.findall(r"`([a-z_]+)[`.:]", section)) | common
    assert (request_type.model_fields.keys() | refused.keys()) - listed == set()


async def test_the_page_about_the_api_lists_every_parameter() -> None:
    page = re.split(r"\*\*(Carried out|Taken without effect|Refused)\*\*", PAGE.read_text())
    sections = dict(zip(page[1::2], page[2::2], strict=True))
    ignored = set(WithoutEffect.model_fields)
    carried_out = (ChatRequest.model_fields | CompletionRequest.model_fields).keys() - ignored
    for section, names in {
        "Carried out": carried_out,
        "Taken without effect": ignored,
        "Refused": CHAT_PARAMETERS.keys() | COMPLETION_PARAMETERS.keys(),
    }.items():
        listed = set(re.findall(r"`([a-z_]+)[`.]", sections[section].split("\n\n")[0]))
        assert names - listed - {"stream_options"} == set()


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)]
)
async def test_fields_without_effect_have_none(
    service: TestService, path: str, body: dict[str, Any]
) -> None:
    assert set(WITHOUT_EFFECT) == set(WithoutEffect.model_fields)
    plain = (await service.http.post(path, json=body)).json()
    answer = await service.http.post(path, json=body | WITHOUT_EFFECT)
    assert answer.status_code == 200
    assert answer.json()["choices"] == plain["choices"]
    null = await service.http.post(path, json=body | dict.fromkeys(WITHOUT_EFFECT))
    assert null.status_code == 200


@pytest.mark.parametrize("changes", FOR_NOTHING, ids=str)
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)]
)
async def test_what_asks_for_nothing_is_taken(
    service: TestService, path: str, body: dict[str, Any], changes: dict[str, Any]
) -> None:
    answer = await service.http.post(path, json=body | changes)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "changes",
    [
        {"top_logprobs": 0, "logprobs": False},
        {"tools": [], "tool_choice": "none", "modalities": ["text"]},
        {"add_special_tokens": False, "chat_template": None, "documents": None},
    ],
)
async def test_what_asks_for_nothing_in_a_chat_is_taken(
    service: TestService, changes: dict[str, Any]
) -> None:
    assert (await service.http.post("/v1/chat/completions", json=CHAT | changes)).is_success


async def test_a_stream_may_ask_for_obfuscation_and_gets_none(service: TestService) -> None:
    options = {"include_obfuscation": True}
    body = CHAT | {"stream": True, "stream_options": options}
    answer = await service.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert "obfuscation" not in answer.text


@pytest.fixture(scope="module")
def reader(service: TestService) -> RequestReader:
    gateway = service.gateway
    return RequestReader(
        service.settings, gateway.limits, gateway.model.tokenizer, gateway.grammars
    )


async def test_minus_one_is_no_top_k_and_a_random_seed(reader: RequestReader) -> None:
    asked = [
        reader.completion(TEXT | {"top_k": -1, "seed": -1}).generation.sampling for _ in range(3)
    ]
    assert [sampling.top_k for sampling in asked] == [0, 0, 0]
    assert len({sampling.seed for sampling in asked}) == 3


async def streamed_usage(
    stream: "openai.AsyncStream[Any]",
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Of the chunks with choices, and of the last one."""
    chunks = [chunk.to_dict() async for chunk in stream]
    assert chunks[-1]["choices"] == []
    return [chunk["usage"] for chunk in chunks[:-1]], chunks[-1]["usage"]


@pytest.mark.parametrize("is_chat", [False, True])
async def test_usage_comes_with_every_chunk_that_vllms_option_asks_for(
    service: TestService, is_chat: bool
) -> None:
    client = service.openai
    create: Any = client.chat.completions.create if is_chat else client.completions.create
    stream = await create(
        **(CHAT if is_chat else TEXT),
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        extra_body={"ignore_eos": True},
    )
    usages, last = await streamed_usage(stream)
    assert [usage["completion_tokens"] for usage in usages] == sorted(
        {usage["completion_tokens"] for usage in usages}
    )
    assert usages[-1] == {name: last[name] for name in usages[-1]}
    assert last["completion_tokens"] == 4
    assert {usage["prompt_tokens"] for usage in usages} == {last["prompt_tokens"]}


async def test_continuous_usage_counts_each_choice_for_itself(service: TestService) -> None:
    asked: dict[str, Any] = TEXT | {
        "prompt": [[5, 6, 7], [8]],
        "n": 2,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "extra_body": {"ignore_eos": True},
    }
    stream = await service.openai.completions.create(stream=True, **asked)
    seen: dict[int, dict[str, int]] = {}
    async for chunk in stream:
        for choice in chunk.choices:
            assert chunk.usage is not None
            seen[choice.index] = chunk.usage.to_dict()
    assert [seen[i]["completion_tokens"] for i in range(4)] == [4, 4, 4, 4]
    assert [seen[i]["prompt_tokens"] for i in range(4)] == [3, 3, 1, 1]


async def test_without_include_usage_no_chunk_has_any(service: TestService) -> None:
    body = TEXT | {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    answer = await service.http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert "usage" not in answer.text
