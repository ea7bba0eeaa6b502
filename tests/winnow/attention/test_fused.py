"""Which kernel a GPU takes first, and how long a prompt in float32 may be."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from winnow.attention import fused, most_prompt_tokens
from winnow.decoder import DecoderModel
from winnow.engine.prefill import require_prompt
from winnow.errors import PromptTooLong
from winnow.kv import ModelShape
from winnow.models import load_model

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SHAPE = ModelShape(32, 32, 8, 128, 4096, torch.float32)


@pytest.mark.parametrize(
    ("capability", "first"),
    [
        ((8, 0), SDPBackend.FLASH_ATTENTION),
        ((8, 9), SDPBackend.FLASH_ATTENTION),
        ((9, 0), SDPBackend.CUDNN_ATTENTION),
        ((10, 0), SDPBackend.CUDNN_ATTENTION),
    ],
)
def test_cudnn_comes_first_from_hopper_on_and_the_plain_one_last(
    capability: tuple[int, int], first: SDPBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    before = torch._C._get_sdp_priority_order()
    with fused.fused_kernels(CUDA):
        order = torch._C._get_sdp_priority_order()
    assert order[0] == first.value
    assert order[3] == SDPBackend.MATH.value
    assert torch._C._get_sdp_priority_order() == before


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
