"""A model's layers with the kernels between their products."""

from pathlib import Path

import pytest
import torch

from tests.winnow.layers import assert_same_layers, is_fused, theirs
from winnow.kernels import choice
from winnow.models import load_model


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_layers_compute_what_transformers_do(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    kernels = choice._from("gpu")
    monkeypatch.setattr("winnow.fused_layer.layer_kernels", lambda *_: kernels)
    model = load_model(tiny_models[family])
    assert is_fused(model)
    network = theirs(tiny_models[family], torch.float32)
    assert_same_layers(model, network, batch=1, num_tokens=7)
    assert_same_layers(model, network, batch=3, num_tokens=1)
