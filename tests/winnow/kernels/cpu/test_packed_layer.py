"""A layer in two calls, beside the same layer operation by operation."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models_in_code import save_tiny_model
from tests.winnow.layers import attend
from winnow.models import load_model


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {}), ("qwen3", {})],
)
def test_a_layer_in_two_calls_gives_the_same_bits_as_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr("winnow.linear.has_amx", lambda: False)
    path = save_tiny_model(tmp_path, family, dtype=torch.bfloat16, head_dim=32, **changes)
    model = load_model(path, mlp_block_tokens=16)
    layer = model._model.model.layers[0]
    for num_tokens in (1, 40):
        positions = torch.arange(num_tokens)[None]
        hidden, rope = model.embed(positions), model.rope(positions)
        assert layer._packed is not None
        together = model.layer(0, hidden, rope, attend)
        with monkeypatch.context() as patch:
            patch.setattr(layer, "_packed", None)
            assert torch.equal(model.layer(0, hidden, rope, attend), together)
