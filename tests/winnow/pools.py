"""A small KV pool, and layers to write into it."""

import torch

from winnow.engine.kv_pool import KVPool, KVPoolConfig
from winnow.kv import KvDtype, LayerKV, ModelShape

SHAPE = ModelShape(
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, hidden_size=16, dtype=torch.float32
)


def make_pool(num_pages: int = 100, rows: int = 4, kv_dtype: KvDtype = "auto") -> KVPool:
    page_bytes = 4 * (SHAPE.kv_bytes(1, kv_dtype) + 4)
    config = KVPoolConfig((num_pages + 1) * page_bytes, page_size=4, kv_dtype=kv_dtype)
    return KVPool(SHAPE, config, rows, torch.device("cpu"))


def layer_of(layer_idx: int, lengths: tuple[int, int], seed: int = 0) -> LayerKV:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return LayerKV(
        layer_idx=layer_idx,
        keys=torch.randn(total, 4, generator=generator),
        values=torch.randn(total, 4, generator=generator),
        positions=torch.arange(total, dtype=torch.int32) * 3,
        head_lengths=lengths,
        window_queries=torch.empty(4, 0, 4),
    )
