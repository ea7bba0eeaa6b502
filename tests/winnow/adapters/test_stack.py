"""What adapters add to a layer's products, row by row."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models_in_code import save_tiny_model
from tests.winnow.adapters.made import save_adapter
from winnow.adapters.layers import linear_sizes
from winnow.adapters.ref import AdapterRoom
from winnow.adapters.rows import AdapterRows, applied
from winnow.adapters.stack import AdapterStack
from winnow.attention import AttentionOptions, causal_attention
from winnow.models import load_model

ROOM = AdapterRoom(3, max_rank=4)


@torch.inference_mode()
def test_each_row_gets_its_own_adapters_product_and_others_nothing() -> None:
    torch.manual_seed(0)
    like = torch.empty(0)
    stack = AdapterStack(["q", "k"], [6, 5], 8, ROOM, like)
    pairs = {
        slot: {name: (torch.randn(rank, 8), torch.randn(size, rank)) for name, size in parts}
        for slot, rank, parts in ((1, 4, [("q", 6), ("k", 5)]), (3, 2, [("k", 5)]))
    }
    for slot, own in pairs.items():
        stack.fill(slot, own)
    inputs, slots = torch.randn(7, 8), [0, 1, 3, 0, 3, 2, 1]
    base = torch.randn(7, 11)
    output = base.clone()
    stack.add(output, inputs, AdapterRows.of_each(torch.tensor(slots), ROOM.max_adapters))
    for row, slot in enumerate(slots):
        own = pairs.get(slot, {})
        added = [
            inputs[row] @ (own[name][1] @ own[name][0]).T if name in own else torch.zeros(size)
            for name, size in (("q", 6), ("k", 5))
        ]
        torch.testing.assert_close(output[row], base[row] + torch.cat(added))
        alone = base.clone()
        if slot:
            stack.add(alone, inputs, AdapterRows(slot))
        torch.testing.assert_close(alone[row], output[row])
        if not own:
            assert torch.equal(output[row], base[row])
    stack.fill(1, {})
    again = base.clone()
    stack.add(again, inputs, AdapterRows(1))
    assert torch.equal(again, base)


def test_experts_are_no_layers_for_adapters() -> None:
    layer = nn.ModuleDict({"experts": nn.Linear(2, 3), "shared_experts": nn.Linear(4, 5)})
    network = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([layer])})})
    assert linear_sizes(network) == {"model.layers.0.shared_experts": (5, 4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_rows_of_the_model_are_its_own_to_the_last_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save_tiny_model(tmp_path / "model", dtype=dtype)
    folders = {name: save_adapter(tmp_path / name, path, seed=ord(name)) for name in "ab"}
    model = load_model(path, adapter_room=AdapterRoom(2, 4))
    assert model.adapters is not None
    loaded = model.adapters.preload(folders)
    hidden = torch.randn(5, 1, model.shape.hidden_size, dtype=dtype)
    rope = model.rope(torch.arange(5)[:, None])
    slots = torch.tensor([0, loaded["a"].slot, 0, loaded["b"].slot, 0])

    def attend(
        _: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        return causal_attention(query, key, value, options)

    for layer_idx in range(model.shape.num_layers):
        base = model.layer(layer_idx, hidden, rope, attend)
        with applied(AdapterRows.of_each(slots, 2)):
            mixed = model.layer(layer_idx, hidden, rope, attend)
        same = (base == mixed).flatten(1).all(1)
        assert same.tolist() == (slots == 0).tolist()
        hidden = base
