"""Text completions through the official client, against what transformers computes."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from openai.types import Completion
from transformers import PreTrainedModel

from tests.services.gateway.service import MODEL_NAME, TestService
from tests.winnow import reference
from winnow.text_stream import TextStream
from winnow.tokenizer import Tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "the quick brown fox jumps"
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def transformers_model(model_path: Path) -> PreTrainedModel:
    return reference.load(model_path)


@pytest.fixture(scope="module")
def tokenizer(service: TestService) -> Tokenizer:
    return service.gateway.model.tokenizer


def text_of(tokenizer: Tokenizer, token_ids: list[int], stop: tuple[str, ...] = ()) -> str:
    stream = TextStream(tokenizer, stop)
    return "".join(map(stream.feed, token_ids)) + stream.finish()


async def complete(service: TestService, **parameters: Any) -> Completion:
    given: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 16} | GREEDY | parameters
    return await service.openai.completions.create(model=MODEL_NAME, **given)


async def test_greedy_text_is_that_of_transformers(
    service: TestService, transformers_model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    expected = reference.greedy(transformers_model, tokenizer.encode(PROMPT), 40)
    answer = await complete(service, max_tokens=40)
    assert answer.choices[0].text == text_of(tokenizer, expected)
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == MODEL_NAME


async def test_token_ids_as_prompt_give_the_same_as_their_text(
    service: TestService, tokenizer: Tokenizer
) -> None:
    by_text = await complete(service)
    by_ids = await complete(service, prompt=tokenizer.encode(PROMPT))
    assert by_ids.choices[0].text == by_text.choices[0].text


async def test_lists_of_prompts_and_n_give_choices_in_order(service: TestService) -> None:
    prompts = [PROMPT, "lazy dog", "over the"]
    alone = [(await complete(service, prompt=prompt)).choices[0].text for prompt in prompts]
    answer = await complete(service, prompt=prompts, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [t for text in alone for t in (text,) * 2]
    lists = await complete(service, prompt=[[5, 6, 7], [8]])
    assert [choice.index for choice in lists.choices] == [0, 1]


async def test_usage_counts_tokens_and_tells_what_was_done(
    service: TestService, tokenizer: Tokenizer
) -> None:
    answer = await complete(service, n=2, max_tokens=5)
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert usage.completion_tokens == 10
    assert usage.total_tokens == usage.prompt_tokens + 10
    winnow = usage.to_dict()["winnow"]
    assert isinstance(winnow, dict)
    assert winnow["no_selection_reason"] == "off"
    assert winnow["selected_tokens"] == usage.prompt_tokens
    assert winnow["kv_bytes_full"] == winnow["kv_bytes_kept"] < winnow["wire_bytes"]
    assert winnow["ttft_s"] > winnow["prefill_s"] > 0


async def test_usage_of_several_prompts_sums_up_and_lists_them(service: TestService) -> None:
    answer = await complete(service, prompt=[[5] * 40, [6] * 10])
    assert answer.usage is not None
    winnow: Any = answer.usage.to_dict()["winnow"]
    assert [prompt["selected_tokens"] for prompt in winnow["prompts"]] == [40, 10]
    assert winnow["selected_tokens"] == 50


async def test_a_request_sets_its_pruning(service: TestService) -> None:
    options = {
        "method": "fastkv",
        "fixed_layer": 1,
        "select_tokens": 32,
        "kv_budget": 24,
        "compression": "snapkv",
        "decode_budget": 40,
        "recompress_interval": 8,
    }
    body = {"winnow": options, "ignore_eos": True}
    answer = await complete(service, prompt=[7, 9] * 100, max_tokens=64, extra_body=body)
    assert answer.usage is not None
    winnow: Any = answer.usage.to_dict()["winnow"]
    assert winnow["selection_layer"] == 1
    assert winnow["selected_tokens"] == 32
    assert winnow["kv_bytes_kept"] * 200 == winnow["kv_bytes_full"] * 24
    assert winnow["computed_share"] == pytest.approx((2 * 200 + 2 * 32) / (4 * 200))
    assert winnow["recompressed_entries"] > 0


async def test_stop_strings_end_the_text_before_them(service: TestService) -> None:
    whole = (await complete(service, max_tokens=30)).choices[0].text
    stop = whole[9:12]
    answer = await complete(service, max_tokens=30, stop=[stop, "never"])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens < 30
    await service.until_idle()


async def test_the_end_token_ends_the_text_unless_ignored(
    service: TestService, tokenizer: Tokenizer
) -> None:
    end = {"logit_bias": {"0": 100}, "max_tokens": 4}
    stopped = await complete(service, **end, extra_body={})
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    assert stopped.usage is not None and stopped.usage.completion_tokens == 1
    ignored = await complete(service, **end)
    assert (ignored.choices[0].text, ignored.choices[0].finish_reason) == ("", "length")


async def test_echo_begins_with_the_prompt(service: TestService, tokenizer: Tokenizer) -> None:
    plain = (await complete(service)).choices[0].text
    assert (await complete(service, echo=True)).choices[0].text == PROMPT + plain
    token_ids = tokenizer.encode(PROMPT)
    assert (await complete(service, echo=True, prompt=token_ids)).choices[0].text == PROMPT + plain


async def test_logprobs_are_those_of_the_model(
    service: TestService, transformers_model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(PROMPT)
    new_ids = reference.greedy(transformers_model, token_ids, 6)
    with torch.no_grad():
        logits = transformers_model(torch.tensor([token_ids + new_ids])).logits[0]
    expected = logits.log_softmax(-1)[len(token_ids) - 1 : -1]
    answer = await complete(service, max_tokens=6, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    chosen = [float(row[token_id]) for row, token_id in zip(expected, new_ids, strict=True)]
    assert logprobs.token_logprobs == pytest.approx(chosen, abs=1e-3)
    for row, top in zip(expected, logprobs.top_logprobs, strict=True):
        assert sorted(top.values()) == pytest.approx(sorted(row.topk(3).values.tolist()), abs=1e-3)
    assert logprobs.tokens is not None and len(logprobs.tokens) == 6
    assert logprobs.text_offset is not None and logprobs.text_offset[0] == 0


async def test_logprobs_of_zero_give_only_the_chosen_token(service: TestService) -> None:
    logprobs = (await complete(service, max_tokens=3, logprobs=0)).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None and len(logprobs.token_logprobs) == 3
    assert logprobs.top_logprobs == [{}, {}, {}]


async def test_a_seed_repeats_the_sampling_and_none_does_not(service: TestService) -> None:
    async def sample(**more: Any) -> str:
        answer = await complete(service, **({"temperature": 1.5, "max_tokens": 24} | more))
        return answer.choices[0].text

    assert await sample(seed=7) == await sample(seed=7)
    assert len({await sample() for _ in range(4)}) > 1


async def test_choices_of_one_prompt_are_sampled_apart(service: TestService) -> None:
    answer = await complete(service, n=4, temperature=1.5, seed=3, max_tokens=24)
    assert len({choice.text for choice in answer.choices}) == 4


async def test_penalties_change_the_text(service: TestService) -> None:
    plain = (await complete(service, max_tokens=48)).choices[0].text
    for body in ({"repetition_penalty": 10.0}, {"presence_penalty": 2, "frequency_penalty": 2}):
        extra = body | {"ignore_eos": True}
        assert (await complete(service, max_tokens=48, extra_body=extra)).choices[0].text != plain


async def test_default_max_tokens_is_sixteen(service: TestService) -> None:
    answer = await service.openai.completions.create(
        model=MODEL_NAME, prompt=PROMPT, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 16


async def test_many_clients_at_once_each_get_their_own_answer(
    service: TestService, transformers_model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    prompts = [[5 + i, 11 + 3 * i, 40 + i] * (1 + i % 5) for i in range(16)]
    answers = await asyncio.gather(*(complete(service, prompt=prompt) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = reference.greedy(transformers_model, prompt, 16)
        assert answer.choices[0].text == text_of(tokenizer, expected)


async def test_logs_one_line_per_request_without_the_prompt(
    service: TestService, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="services.gateway"):
        answer = await complete(service, max_tokens=3)
    ours = [r for r in caplog.records if r.name.startswith("services.gateway")]
    assert len(ours) == 1
    assert ours[0].request_id == answer.id  # type: ignore[attr-defined]
    line = ours[0].getMessage()
    assert answer.usage is not None
    assert f"finished: {answer.usage.prompt_tokens} prompt tokens, 3 generated" in line
    assert "selection layer off" in line
    assert "on the wire" in line
    assert "fox" not in line
