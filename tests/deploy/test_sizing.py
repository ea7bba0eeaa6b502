"""The sizes of docs/gpu.md are those that the code has."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from deploy.sizing import (
    GPUS,
    KV_DTYPES,
    Model,
    capacity_table,
    deployments,
    describe,
    render,
    usual_models,
)
from tests.docs.pages import ROOT
from winnow.engine.kv_pool import KVPoolConfig
from winnow.kv import KvDtype


@pytest.fixture(scope="module")
def models() -> list[Model]:
    return usual_models()


def test_the_page_shows_what_the_command_prints(models: list[Model]) -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    for table in render(models).split("\n\n"):
        assert table.strip() in page


def test_weights_are_those_of_llama(models: list[Model]) -> None:
    assert [model.weight_bytes // 2 for model in models] == [8_030_261_248, 70_553_706_496]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES.values())
def test_a_pool_holds_as_many_tokens_as_its_pages_have_room_for(
    models: list[Model], kv_dtype: KvDtype
) -> None:
    for model in models:
        config, shape = KVPoolConfig(40 << 30, kv_dtype=kv_dtype), model.shape
        room = config.num_pages(shape) * config.page_size // (shape.num_layers * shape.num_kv_heads)
        assert room == pytest.approx(config.memory_bytes / model.token_bytes(kv_dtype), rel=1e-3)


def test_no_request_is_in_two_pools(models: list[Model]) -> None:
    """The table's numbers of requests are those that the pages of each pool have room for."""
    table = iter(capacity_table(models))
    for model, deployment, gpu_bytes in (
        (one, each, gpu_bytes)
        for one in models
        for each in deployments(one)
        for gpu_bytes in GPUS.values()
    ):
        row, pool = next(table), int(deployment.pool_bytes(model, gpu_bytes))
        num_ranks = deployment.tensor_parallel
        shape = model.shape.part(model.shape.num_kv_heads // num_ranks)
        dtypes = KV_DTYPES.values() if pool > 0 else ()
        pages = [KVPoolConfig(pool, 16, 1, dtype, num_ranks).num_pages(shape) for dtype in dtypes]
        for column, tokens in zip(list(row)[-2:], (32_768 + 512, 2048 + 512), strict=True):
            of_request = tokens // 16 * shape.total_kv_heads
            held = [f"{deployment.pairs * (of_pool // of_request):,}" for of_pool in pages]
            assert row[column] == (" / ".join(held) or "–")


@pytest.mark.parametrize("is_tied", [True, False])
def test_every_rank_has_the_embeddings_alone(is_tied: bool) -> None:
    sizes: Any = {"vocab_size": 100, "hidden_size": 8, "num_hidden_layers": 1}
    model = describe("x", LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=is_tied))
    whole = 100 * 8 * torch.bfloat16.itemsize
    assert model.weights_per_gpu(4) == whole + (model.weight_bytes - whole) / 4
    assert model.weights_per_gpu(1) == model.weight_bytes


def test_layers_with_windows_hold_no_more_than_those() -> None:
    sizes: Any = {"vocab_size": 100, "hidden_size": 8, "num_hidden_layers": 4}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    window: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 512,
        "max_window_layers": 1,
    }
    model = describe("x", Qwen2Config(**sizes, **heads, **window))
    entry = 2 * 4 * 2 + 4
    assert model.held_bytes(100, "auto") == 4 * 100 * entry
    assert model.held_bytes(32_768, "auto") == (32_768 + 3 * 512) * entry
