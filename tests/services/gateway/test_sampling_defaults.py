"""What a request gets that says nothing about sampling: what the model's generation config says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from services.common.settings import Settings
from services.gateway.grpc.requests import request_from_proto
from services.gateway.rest.requests import RequestReader
from tests.services.gateway.rest.readers import reader_of
from tests.services.gateway.service import MODEL_NAME, running_service
from winnow.errors import InvalidSetting, UnusableModel
from winnow.sampling_params import SamplingParams
from winnow.v1 import inference_pb2 as pb

GIVEN = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.2,
    "max_new_tokens": 40,
}


@pytest.fixture
def folder(model_path: Path, tmp_path: Path) -> Path:
    """A model whose generation config has something to say."""
    shutil.copytree(model_path, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(GIVEN))
    return tmp_path / "model"


def reader(folder: Path, source: str = "auto", **changes: Any) -> RequestReader:
    return reader_of(
        Settings(
            model=str(folder),
            model_name=MODEL_NAME,
            generation_config=source,
            pruning={"method": "full", "window_size": 8},
            **changes,
        )
    )


def sampled(sampling: SamplingParams) -> tuple[float, ...]:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return tuple(getattr(sampling, name) for name in names)


def chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL_NAME, "messages": [{"role": "user", "content": "a"}]} | more


def completion(**more: Any) -> dict[str, Any]:
    return {"model": MODEL_NAME, "prompt": "a"} | more


def test_a_request_gets_the_models_defaults(folder: Path) -> None:
    ours = reader(folder)
    expected = (0.6, 0.9, 20, 0.05, 1.2)
    assert sampled(ours.chat(chat()).generation.sampling) == expected
    assert sampled(ours.completion(completion()).generation.sampling) == expected


def test_each_is_overridden_by_itself_and_null_means_the_default(folder: Path) -> None:
    ours = reader(folder)
    own = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    for idx, (name, value) in enumerate(own.items()):
        got = sampled(ours.chat(chat(**{name: value})).generation.sampling)
        expected = [0.6, 0.9, 20, 0.05, 1.2]
        expected[idx] = value
        assert list(got) == expected
    nulls = dict.fromkeys(own)
    assert sampled(ours.completion(completion(**nulls)).generation.sampling) == (
        0.6,
        0.9,
        20,
        0.05,
        1.2,
    )


def test_max_new_tokens_is_the_length_of_an_answer_that_is_given_none(folder: Path) -> None:
    ours = reader(folder)
    assert ours.chat(chat()).generation.prompts[0].max_tokens == 40
    assert ours.chat(chat(max_tokens=500)).generation.prompts[0].max_tokens == 500
    assert (
        ours.completion(completion()).generation.prompts[0].max_tokens == 16
    )  # OpenAI's own default
    assert reader(folder, max_new_tokens=30).chat(chat()).generation.prompts[0].max_tokens == 30


@pytest.mark.parametrize("word", ["none", "vllm"])
def test_an_operator_may_want_openais_defaults(folder: Path, word: str) -> None:
    ask = reader(folder, word, max_new_tokens=77).chat(chat()).generation
    assert sampled(ask.sampling) == (1, 1, 0, 0, 1)
    assert ask.prompts[0].max_tokens == 77


def test_an_operator_may_want_another_folders(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text('{"temperature": 0.3}')
    assert sampled(reader(folder, str(other)).chat(chat()).generation.sampling) == (0.3, 1, 0, 0, 1)


def test_what_cannot_be_used_is_refused_at_the_start(folder: Path) -> None:
    with pytest.raises(InvalidSetting, match="generation_config is '/nowhere'"):
        reader(folder, "/nowhere")
    (folder / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(UnusableModel, match=r"generation_config\.json: top_p is 7"):
        reader(folder)
    assert sampled(reader(folder, "none").chat(chat()).generation.sampling) == (1, 1, 0, 0, 1)


async def test_over_grpc_what_is_unset_is_the_default_and_zero_is_off(
    folder: Path, redis_url: str
) -> None:
    async with running_service(folder, redis_url, num_workers=0) as service:
        messages = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="a")])
        request = pb.CompleteRequest(model=MODEL_NAME, messages=messages)
        ask = request_from_proto(service.gateway, request)
        assert sampled(ask.sampling) == (0.6, 0.9, 20, 0.05, 1.2)
        assert ask.prompts[0].max_tokens == 40
        request = pb.CompleteRequest(model=MODEL_NAME, messages=messages, top_k=0, min_p=0)
        assert sampled(request_from_proto(service.gateway, request).sampling)[2:4] == (0, 0)


async def test_the_models_card_shows_them(folder: Path, redis_url: str) -> None:
    async with running_service(folder, redis_url, num_workers=0) as service:
        card = (await service.http.get(f"/v1/models/{MODEL_NAME}")).json()
        expected = {k: v for k, v in GIVEN.items() if k != "max_new_tokens"} | {"max_tokens": 40}
        assert card["sampling_defaults"] == expected
