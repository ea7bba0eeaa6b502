"""Layers of few operations, beside transformers' own."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models_in_code import FAMILIES, save_tiny_model
from tests.winnow.layers import TOLERANCES, assert_same_layers, is_fused, theirs
from winnow.fused_layer import FusedLayer, fuse_layers
from winnow.kernels.choice import REFERENCE
from winnow.model_files import describe_model
from winnow.models import load_model


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_each_verified_family_are_fused_and_compute_the_same(
    tiny_models: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    path = tiny_models[family]
    model = load_model(path, dtype=str(dtype).removeprefix("torch."))
    assert is_fused(model)
    network = theirs(path, dtype)
    assert_same_layers(model, network, batch=1, num_tokens=40)
    assert_same_layers(model, network, batch=3, num_tokens=1)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_biases_of_every_product_are_added(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save_tiny_model(tmp_path, "llama", attention_bias=True, mlp_bias=True)
    model = load_model(path, dtype=str(dtype).removeprefix("torch."))
    assert is_fused(model)
    assert_same_layers(model, theirs(path, dtype), batch=2, num_tokens=5)


def test_an_mlp_in_blocks_of_tokens_computes_the_same(tiny_models: dict[str, Path]) -> None:
    path = tiny_models["qwen2"]
    model = load_model(path, mlp_block_tokens=16)
    assert_same_layers(model, theirs(path, torch.float32), batch=1, num_tokens=40)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("phi3", {"partial_rotary_factor": 0.5}, "8 of 16 numbers of a head are rotated"),
        ("llama", {"hidden_act": "gelu"}, "it has mlp.act_fn"),
    ],
)
def test_layers_of_another_pattern_run_as_they_are_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, changes: Any, reason: str
) -> None:
    path = save_tiny_model(tmp_path, family, **changes)
    with caplog.at_level(logging.WARNING):
        model = load_model(path)
    (record,) = caplog.records
    assert f"layers run as transformers has them, since they cannot be fused: {reason}" in (
        record.getMessage()
    )
    assert not is_fused(model)
    assert_same_layers(model, theirs(path, torch.float32), batch=1, num_tokens=40)


def test_a_rank_whose_share_of_the_mlp_is_not_whole_vectors_has_no_kernels(tmp_path: Path) -> None:
    sizes = {"head_dim": 32, "intermediate_size": 24}
    path = save_tiny_model(tmp_path, "llama", dtype=torch.bfloat16, **sizes)
    network = theirs(path, torch.bfloat16)
    for layer in network.model.layers:
        layer.mlp.down_proj.in_features = 2 * 24  # as transformers leaves it when it loads a share
    assert fuse_layers(network, describe_model(path).shape, 2048)
    assert all(layer._kernels is REFERENCE for layer in network.model.layers)


def test_layers_that_something_is_hooked_into_stay(tiny_models: dict[str, Path]) -> None:
    network = theirs(tiny_models["llama"], torch.float32)
    network.model.layers[2].mlp.down_proj.register_forward_hook(lambda *_: None)
    model = load_model(tiny_models["llama"])
    assert not fuse_layers(network, model.shape, 2048)
    assert not any(isinstance(layer, FusedLayer) for layer in network.model.layers)


def test_a_layer_whose_results_differ_is_not_used(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_small(self: FusedLayer, hidden: Tensor, *_: Any) -> Tensor:
        return hidden * 0.9

    monkeypatch.setattr(FusedLayer, "forward", too_small)
    model = load_model(tiny_models["mistral"])
    assert not is_fused(model)
    assert "the first one's results are" in caplog.text


def test_no_weight_is_in_memory_twice(tiny_models: dict[str, Path]) -> None:
    path = tiny_models["llama"]
    size = sum(parameter.nbytes for parameter in theirs(path, torch.float32).parameters())
    model = load_model(path)
    assert sum(parameter.nbytes for parameter in model._model.parameters()) == size
