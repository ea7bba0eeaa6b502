"""A layer's entries in their slots, against the reference."""

import pytest
import torch
from torch import Tensor

from winnow.engine.kv_pool import KVPool, KVPoolConfig
from winnow.kernels import scatter as reference
from winnow.kernels.gpu import scatter as on_gpu
from winnow.kv import LayerKV, ModelShape

Parts = tuple[Tensor, Tensor, Tensor]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("num_entries", [0, 1, 31, 32, 33, 100])
def test_equals_the_reference_bit_for_bit(
    num_entries: int, head_dim: int, dtype: torch.dtype
) -> None:
    keys, values = torch.randn(2, num_entries, head_dim).to(dtype)
    positions = torch.arange(num_entries, dtype=torch.int32) * 3
    slots = torch.randperm(160)[:num_entries]
    pools = [
        (*torch.zeros(2, 160, head_dim).to(dtype), torch.zeros(160, dtype=torch.int32))
        for _ in range(2)
    ]
    on_gpu.scatter((keys, values, positions), slots, pools[0])
    reference.scatter((keys, values, positions), slots, pools[1])
    for own, expected in zip(*pools, strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_trial_before_use_passes(dtype: torch.dtype) -> None:
    on_gpu.try_out(pool_of(dtype))


def test_the_trial_before_use_fails_where_results_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    write = on_gpu.scatter

    def backwards(entries: Parts, slots: Tensor, pool: Parts) -> None:
        write(entries, slots.flip(0), pool)

    monkeypatch.setattr(on_gpu, "scatter", backwards)
    with pytest.raises(RuntimeError, match="it writes other keys than it is given"):
        on_gpu.try_out(pool_of(torch.float32))


def test_a_layer_that_arrives_is_written_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("winnow.engine.page_storage.scatter_for", lambda _: on_gpu.scatter)
    shape = ModelShape(2, 4, 2, 64, 256, torch.float32)
    pool = KVPool(shape, KVPoolConfig(1 << 20), 2, torch.device("cpu"))
    for row, lengths in enumerate([(1, 40), (17, 0)]):
        total = sum(lengths)
        keys, values = torch.randn(2, total, 64)
        positions = torch.arange(total, dtype=torch.int32)
        layer = LayerKV(1, keys, values, positions, lengths, torch.empty(4, 0, 64))
        pool.write_layer(row, layer)
        found = pool.read_layer(row, 1)
        assert found.head_lengths == lengths
        for name in ("keys", "values", "positions"):
            assert torch.equal(getattr(found, name), getattr(layer, name))


def pool_of(dtype: torch.dtype) -> Parts:
    keys, values = torch.empty(2, 64, 96, dtype=dtype)
    return keys, values, torch.empty(64, dtype=torch.int32)
