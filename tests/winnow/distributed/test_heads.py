from dataclasses import replace

import pytest
import torch
from torch import Tensor

from winnow.distributed.heads import Split, join_heads, require_divides, split_heads
from winnow.errors import InvalidSetting
from winnow.kv import KVSize, LayerKV, ModelShape
from winnow.layers import FULL, Layer

SHAPE = ModelShape(2, 8, 4, 16, 128, torch.float32)


def ragged_layer(lengths: tuple[int, ...]) -> LayerKV:
    total = sum(lengths)
    return LayerKV(
        layer_idx=1,
        keys=torch.randn(total, 16),
        values=torch.randn(total, 16),
        positions=torch.arange(total, dtype=torch.int32),
        head_lengths=lengths,
        window_queries=torch.randn(8, 3, 16),
    )


def tensors(layer: LayerKV) -> list[Tensor]:
    scales = [] if layer.scales is None else [layer.scales]
    return [layer.keys, layer.values, layer.positions, layer.window_queries, *scales]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_ragged_layer_split_and_joined_is_the_same(num_ranks: int, is_quantized: bool) -> None:
    layer = ragged_layer((3, 0, 7, 1))
    layer = layer.quantized() if is_quantized else layer
    parts = split_heads(layer, num_ranks)
    assert [len(part.head_lengths) for part in parts] == [4 // num_ranks] * num_ranks
    assert all(part.num_entries == sum(part.head_lengths) for part in parts)
    if layer.scales is not None:
        scales = [part.scales for part in parts if part.scales is not None]
        assert [own.shape for own in scales] == [(part.num_entries, 2) for part in parts]
        assert torch.equal(torch.cat(scales), layer.scales)
    joined = join_heads(parts)
    assert (joined.layer_idx, joined.head_lengths) == (1, (3, 0, 7, 1))
    for found, expected in zip(tensors(joined), tensors(layer), strict=True):
        assert torch.equal(found, expected)


def test_each_rank_has_as_many_heads() -> None:
    shape = Split(1, 4).shape(SHAPE)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (2, 1, 16)


@pytest.mark.parametrize("num_ranks", [3, 5, 8])
def test_refuses_ranks_that_heads_cannot_share_equally(num_ranks: int) -> None:
    said = rf"tensor_parallel is {num_ranks}; .* 8 attention heads and its 4 KV heads"
    with pytest.raises(InvalidSetting, match=said):
        require_divides(num_ranks, SHAPE)


def test_refuses_to_share_layers_of_several_sizes() -> None:
    shape = replace(SHAPE, own_sizes=(KVSize(4, 16, 16), KVSize(2, 16, 16)))
    require_divides(1, shape)
    with pytest.raises(InvalidSetting, match=r"it must be 1 .* layer 1 has smaller ones"):
        require_divides(2, shape)


def test_refuses_to_share_recurrent_layers() -> None:
    shape = replace(SHAPE, layers=(FULL, Layer(None, is_recurrent=True)))
    require_divides(1, shape)
    with pytest.raises(InvalidSetting, match=r"it must be 1 .* layer 1 is the first"):
        require_divides(2, shape)
