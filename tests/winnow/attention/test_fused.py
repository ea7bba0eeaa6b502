"""Which kernel a GPU takes first, and how long a prompt in float32 may be."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend

from winnow.attention import (
    AttentionOptions,
    causal_attention,
    fused,
    most_prompt_tokens,
    prefill,
)
from winnow.decoder import DecoderModel
from winnow.engine.prefill import require_prompt
from winnow.errors import PromptTooLong
from winnow.kv import ModelShape
from winnow.models import load_model

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SHAPE = ModelShape(32, 32, 8, 128, 4096, torch.float32)


@pytest.mark.parametrize(
    ("capability", "num_tokens", "dtype", "is_taken"),
    [
        ((8, 0), 32_768, torch.bfloat16, False),
        ((9, 0), 32_768, torch.bfloat16, True),
        ((9, 0), 8191, torch.bfloat16, False),
        ((9, 0), 32_768, torch.float32, False),
        ((10, 0), 8192, torch.float16, True),
        ((12, 0), 32_768, torch.bfloat16, False),
    ],
)
def test_cudnn_takes_long_prompts_where_it_is_the_fastest(
    capability: tuple[int, int],
    num_tokens: int,
    dtype: torch.dtype,
    is_taken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    size = (1, 32, num_tokens, 128)
    with FakeTensorMode():
        query = torch.empty(size, dtype=dtype, device="cuda")
    assert fused.takes_cudnn(query) is is_taken
    assert not fused.takes_cudnn(torch.empty(size, dtype=dtype, device="meta"))


@pytest.mark.parametrize("cudnn_first", [True, False])
def test_cudnn_is_first_or_before_the_plain_one(cudnn_first: bool) -> None:
    before = torch._C._get_sdp_priority_order()
    with fused.fused_kernels(CUDA, cudnn_first=cudnn_first):
        order = torch._C._get_sdp_priority_order()
    assert order.index(SDPBackend.CUDNN_ATTENTION.value) == (0 if cudnn_first else 2)
    assert order[3] == SDPBackend.MATH.value
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9])
def test_a_prompt_that_is_filled_up_for_cudnn_is_attended_to_as_it_is(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(num_tokens)
    query = torch.randn(1, 6, num_tokens, 16)
    key, value = torch.randn(2, 1, 2, num_tokens, 16)
    expected = causal_attention(query, key, value, AttentionOptions(0.3))
    monkeypatch.setattr(prefill, "takes_cudnn", lambda _: True)
    monkeypatch.setattr(prefill, "CUDNN_TOKENS", 8)
    filled = causal_attention(query, key, value, AttentionOptions(0.3))
    torch.testing.assert_close(filled, expected)


def test_a_cpu_keeps_its_order() -> None:
    before = torch._C._get_sdp_priority_order()
    with fused.fused_kernels(CPU):
        assert torch._C._get_sdp_priority_order() == before


def test_only_grouped_heads_in_float32_on_a_gpu_limit_a_prompt() -> None:
    assert most_prompt_tokens(SHAPE, CUDA) == 5792  # 4 GiB of scores in 32 heads
    assert most_prompt_tokens(SHAPE, CPU) is None
    assert most_prompt_tokens(replace(SHAPE, dtype=torch.bfloat16), CUDA) is None
    assert most_prompt_tokens(replace(SHAPE, num_kv_heads=32), CUDA) is None


def test_refuses_a_prompt_that_is_longer(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(tiny_models["llama"])
    model = DecoderModel(loaded._model, loaded.description, CUDA)
    monkeypatch.setattr(fused, "_SCORES_BYTES", 40**2 * 4 * model.shape.num_heads)
    require_prompt(model, [1] * 40)
    with pytest.raises(PromptTooLong, match=r"41 tokens; the limit in float32 .* is 40"):
        require_prompt(model, [1] * 41)
    require_prompt(loaded, [1] * 41)
