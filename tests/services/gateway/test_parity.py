"""The cornerstone: with pruning off, the whole service gives the tokens of transformers."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from tests.models_in_code import FAMILIES, long_rope, save_tiny_model
from tests.services.gateway.service import MODEL_NAME, running_service
from tests.winnow import reference
from tests.winnow.drive import prompt
from winnow.decoder import MLP_BLOCK_TOKENS
from winnow.v1 import inference_pb2 as pb
from winnow.v1.inference_pb2_grpc import InferenceStub

LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 150, 300, MLP_BLOCK_TOKENS + 52)
NUM_NEW = 12


async def answer(stub: InferenceStub, token_ids: list[int]) -> list[int]:
    """One greedy completion's tokens, over gRPC."""
    request = pb.CompleteRequest(
        model=MODEL_NAME,
        token_ids=pb.TokenIds(ids=token_ids),
        max_tokens=NUM_NEW,
        temperature=0,
        ignore_eos=True,
    )
    tokens: list[int] = []
    async for chunk in stub.Complete(request, timeout=60):
        for choice in chunk.choices:
            tokens += choice.token_ids
    return tokens


async def assert_as_generate(model: Path, redis_url: str, lengths: Sequence[int]) -> None:
    """Prompts of these lengths at once get the tokens of `generate`."""
    prompts = [prompt(num_tokens, seed=num_tokens) for num_tokens in lengths]
    network = reference.load(model)
    expected = [reference.greedy(network, token_ids, NUM_NEW) for token_ids in prompts]
    async with (
        running_service(model, redis_url) as service,
        grpc.aio.insecure_channel(service.grpc_address) as channel,
    ):
        stub = InferenceStub(channel)
        answers = await asyncio.gather(*(answer(stub, token_ids) for token_ids in prompts))
        assert answers == expected
        await service.until_idle()


@pytest.mark.parametrize("family", FAMILIES)
async def test_sixteen_prompts_at_once_get_the_tokens_of_generate(
    tiny_models: dict[str, Path], redis_url: str, family: str
) -> None:
    await assert_as_generate(tiny_models[family], redis_url, LENGTHS)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {}),  # every layer slides
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}),
    ],
)
async def test_prompts_of_several_windows_get_the_tokens_of_generate(
    tmp_path: Path, redis_url: str, family: str, changes: dict[str, Any]
) -> None:
    path = save_tiny_model(tmp_path, family, sliding_window=24, **changes)
    await assert_as_generate(path, redis_url, (1, 20, 24, 65, 300))


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1"])
async def test_models_with_recurrent_layers_get_the_tokens_of_generate(
    tmp_path: Path, redis_url: str, family: str
) -> None:
    path = save_tiny_model(tmp_path, family)
    await assert_as_generate(path, redis_url, (1, 3, 17, 64, 150))


async def test_short_and_long_sequences_at_once_are_rotated_by_tables_of_their_own(
    tmp_path: Path, redis_url: str
) -> None:
    path = save_tiny_model(tmp_path, "phi3", **long_rope(original=100))
    await assert_as_generate(path, redis_url, (3, 40, 101, 300))


async def test_64_streaming_clients_each_get_all_of_their_own_answer(
    tiny_models: dict[str, Path], redis_url: str
) -> None:
    texts = [f"{number} brown foxes jump over the lazy dog " * 3 for number in range(64)]
    async with running_service(
        tiny_models["qwen2"], redis_url, kv_memory_bytes=128 << 20
    ) as service:

        async def stream(text: str) -> tuple[str, str | None]:
            chunks = await service.openai.completions.create(
                model=MODEL_NAME,
                prompt=text,
                max_tokens=24,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            pieces: list[str] = []
            reason: str | None = None
            async for chunk in chunks:
                pieces.append(chunk.choices[0].text)
                reason = chunk.choices[0].finish_reason or reason
            return "".join(pieces), reason

        together = await asyncio.gather(*(stream(text) for text in texts))
        alone = [await stream(text) for text in texts[::8]]
        assert together[::8] == alone
        assert {reason for _, reason in together} == {"length"}
        assert len({text for text, _ in together}) > 32, "different prompts, different answers"
        await service.until_idle()
