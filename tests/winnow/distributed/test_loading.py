from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models_in_code import save_tiny_model
from winnow.distributed.loading import load_on_ranks, require_splittable
from winnow.errors import InvalidSetting, WinnowError
from winnow.model_files import describe_model


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("phi3", {}, "family phi3 cannot be split over ranks by its heads"),
        ("llama", {"num_key_value_heads": 1}, "4 attention heads and its 1 KV heads"),
    ],
)
def test_refuses_a_model_that_cannot_be_split(
    tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    model = save_tiny_model(tmp_path, family, **changes)
    with pytest.raises(WinnowError, match=said):
        require_splittable(describe_model(model), 2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_accepts_the_families_whose_plan_is_by_heads(
    tiny_models: dict[str, Path], family: str
) -> None:
    require_splittable(describe_model(tiny_models[family]), 2)


def test_refuses_more_ranks_than_the_process_sees_gpus(tiny_models: dict[str, Path]) -> None:
    found = torch.cuda.device_count()
    num_ranks = max(2, found + 1)
    said = f"tensor_parallel is {num_ranks}, .* this process sees {found}"
    with pytest.raises(InvalidSetting, match=said):
        load_on_ranks(tiny_models["llama"], num_ranks, print, device="cuda")


def test_refuses_another_gpu_than_the_first_for_rank_0(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(InvalidSetting, match=r"device is cuda:1; .*CUDA_VISIBLE_DEVICES=1"):
        load_on_ranks(tiny_models["llama"], 2, print, device="cuda:1")
