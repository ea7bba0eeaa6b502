"""Chat completions through the official client."""

from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from tests.services.gateway.service import MODEL_NAME, TestService

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGES: list[Any] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the quick brown fox"},
]
RENDERED = "<|system|>be brief<|end|><|user|>the quick brown fox<|end|><|assistant|>"
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


async def chat(service: TestService, **parameters: Any) -> ChatCompletion:
    given: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 12} | GREEDY | parameters
    return await service.openai.chat.completions.create(model=MODEL_NAME, **given)


async def text_after(service: TestService, prompt: str) -> str:
    answer = await service.openai.completions.create(
        model=MODEL_NAME, prompt=prompt, max_tokens=12, **GREEDY
    )
    return answer.choices[0].text


async def test_answers_the_conversation_in_the_models_template(service: TestService) -> None:
    answer = await chat(service)
    choice = answer.choices[0]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content == await text_after(service, RENDERED)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None and answer.usage.completion_tokens == 12


async def test_parts_of_text_are_joined_and_developer_is_system(service: TestService) -> None:
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "the quick "},
                {"type": "text", "text": "brown fox"},
            ],
        },
    ]
    whole, joined = await chat(service), await chat(service, messages=parts)
    assert joined.choices[0].message.content == whole.choices[0].message.content


async def test_max_completion_tokens_means_max_tokens(service: TestService) -> None:
    answer = await service.openai.chat.completions.create(
        model=MODEL_NAME, messages=MESSAGES, max_completion_tokens=3, **GREEDY
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 3


async def test_without_max_tokens_the_answer_may_fill_what_is_allowed(
    service: TestService,
) -> None:
    messages: list[Any] = [{"role": "user", "content": "a"}]
    answer = await service.openai.chat.completions.create(
        model=MODEL_NAME, messages=messages, extra_body={"logit_bias": {"0": 100}}
    )
    assert answer.choices[0].finish_reason == "stop"


async def test_logprobs_carry_bytes_and_alternatives(service: TestService) -> None:
    answer = await chat(service, logprobs=True, top_logprobs=2, max_tokens=5)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == 5
    for token in logprobs.content:
        assert token.top_logprobs[0].logprob == token.logprob
        assert len(token.top_logprobs) == 2
    raw = b"".join(bytes(token.bytes or []) for token in logprobs.content)
    assert raw.decode(errors="replace").startswith(answer.choices[0].message.content or "")


async def test_n_gives_so_many_messages(service: TestService) -> None:
    answer = await chat(service, n=3, temperature=1.5, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
