from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.engine.kv_manager import KVManager
from winnow.engine.kv_pool import KVPool, KVPoolConfig
from winnow.engine.promises import Promise
from winnow.engine.query_ring import QueryRing
from winnow.errors import InvalidSetting
from winnow.kv import LayerKV, ModelShape

SHAPE = ModelShape(
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, hidden_size=16, dtype=torch.float32
)
PAGE_BYTES = 4 * (SHAPE.kv_bytes(1) + 4)


def make_pool(num_pages: int = 100, rows: int = 4) -> KVPool:
    config = KVPoolConfig(memory_bytes=(num_pages + 1) * PAGE_BYTES, page_size=4)
    return KVPool(SHAPE, config, rows, torch.device("cpu"))


def make_memory(num_pages: int = 100, rows: int = 4) -> KVManager:
    return KVManager(make_pool(num_pages, rows), rows, overcommit=1.0)


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


def pages_of(lengths: tuple[int, ...]) -> int:
    return sum(-(-length // 4) for length in lengths)


LENGTHS = st.tuples(st.integers(0, 13), st.integers(0, 13))
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 2), st.integers(0, 1), LENGTHS),
        st.tuples(st.just("step"), st.sets(st.integers(0, 2), min_size=1)),
        st.tuples(st.just("clear"), st.integers(0, 2)),
    ),
    max_size=30,
)


@settings(max_examples=200)
@given(ACTIONS)
def test_pages_are_accounted_and_contents_kept_through_any_history(
    actions: list[tuple[Any, ...]],
) -> None:
    memory = make_memory(num_pages=400, rows=3)
    pool, rows = memory.pool, memory.reserve(3, Promise(100, 100))
    held = {(row, layer): layer_of(layer, (0, 0)) for row in rows for layer in range(2)}
    for turn, (action, target, *rest) in enumerate(actions):
        if action == "write":
            layer = layer_of(rest[0], rest[1], seed=turn)
            pool.write_layer(rows[target], layer)
            held[rows[target], rest[0]] = layer
        elif action == "clear":
            pool.clear(rows[target])
            held |= {(rows[target], layer): layer_of(layer, (0, 0)) for layer in range(2)}
        else:
            step(pool, [rows[i] for i in sorted(target)], held, turn)
    for (row, layer_idx), expected in held.items():
        actual = pool.read_layer(row, layer_idx, expected.window_queries)
        assert actual.head_lengths == expected.head_lengths
        for name in ("keys", "values", "positions"):
            assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert pool.num_used == sum(pages_of(layer.head_lengths) for layer in held.values())
    for row in rows:
        memory.release(row)
    stats = memory.stats()
    assert (stats.pages_used, stats.pages_reserved) == (0, 0)


def step(pool: KVPool, rows: list[int], held: dict[tuple[int, int], LayerKV], turn: int) -> None:
    """One decode step of the rows; what it must have added goes into `held`."""
    plan = pool.plan_step(rows, torch.full((len(rows),), 1000 + turn))
    for layer_idx in range(2):
        new = torch.randn(2, len(rows), 2, 4, generator=torch.Generator().manual_seed(turn))
        pool.append(layer_idx, plan, new[0], new[1])
        keys, values = pool.gather(layer_idx, plan)
        for idx, row in enumerate(rows):
            held[row, layer_idx] = extend(held[row, layer_idx], new[:, idx], 1000 + turn)
            expected = held[row, layer_idx]
            entry = torch.arange(keys.shape[2])
            visible = entry < plan.lengths[layer_idx, idx][:, None]
            assert torch.equal(keys[idx][visible], expected.keys)
            assert torch.equal(values[idx][visible], expected.values)


def extend(layer: LayerKV, new: torch.Tensor, position: int) -> LayerKV:
    """new: [2, H_kv, D], one key and one value per head, appended."""

    def appended(old: torch.Tensor, per_head: torch.Tensor) -> torch.Tensor:
        pairs = zip(layer.head_slices(), per_head, strict=True)
        return torch.cat([torch.cat([old[rows], one]) for rows, one in pairs])

    return LayerKV(
        layer_idx=layer.layer_idx,
        keys=appended(layer.keys, new[0][:, None]),
        values=appended(layer.values, new[1][:, None]),
        positions=appended(layer.positions, torch.full((2, 1), position, dtype=torch.int32)),
        head_lengths=tuple(length + 1 for length in layer.head_lengths),
        window_queries=layer.window_queries,
    )


def test_a_promise_shrinks_to_what_the_heads_can_reach() -> None:
    memory = make_memory()
    (row,) = memory.reserve(1, Promise(80, 80))
    for layer_idx in range(2):
        memory.pool.write_layer(row, layer_of(layer_idx, (5, 30)))
    memory.settle(row, extra_entries=10, cap=1000)
    assert memory.stats().pages_reserved == 2 * (4 + 10)  # 15 and 40 entries in pages of 4
    memory.settle(row, extra_entries=10, cap=12)
    assert memory.stats().pages_reserved == 2 * (
        3 + 8
    )  # 12, and 31: a head over the cap grows by 1


def test_a_pool_too_small_for_the_model_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="kv_memory_bytes is 144; this model needs at least"):
        KVPool(SHAPE, KVPoolConfig(PAGE_BYTES, 4), 1, torch.device("cpu"))


def test_rows_that_cannot_be_cleared_are_free_for_others_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dies(*_: object) -> None:
        raise RuntimeError("CUDA error")

    memory = make_memory(num_pages=30, rows=2)
    pool, rows = memory.pool, memory.reserve(2, Promise(15, 15))
    for row in rows:
        pool.write_layer(row, layer_of(0, (20, 20)))
    with monkeypatch.context() as patch:
        patch.setattr(KVPool, "clear", dies)
        with pytest.raises(RuntimeError, match="CUDA error"):
            memory.release(*rows)
    assert memory.stats().pages_reserved == 0
    assert sorted(memory.reserve(2, Promise(15, 15))) == sorted(rows)
    for row in rows:
        pool.write_layer(row, layer_of(0, (20, 20)))
    assert memory.stats().pages_used == 20
    memory.release(*rows)
    assert memory.stats().pages_used == 0


def test_queries_lie_in_pages_that_go_with_their_row() -> None:
    memory = make_memory(num_pages=30, rows=2)
    pool, (first, second) = memory.pool, memory.reserve(2, Promise(15, 15))
    layer = layer_of(0, (9, 5))
    pool.write_layer(first, layer)
    rings = [QueryRing(pool, row, window_size=5) for row in (first, second)]
    queries = torch.randn(2, 2, 4, 7, 4, generator=torch.Generator().manual_seed(1))
    for ring, own in zip(rings, queries, strict=True):
        for layer_idx in range(2):
            ring.seed(layer_idx, own[layer_idx, :, :3])
        for idx in range(3, 7):
            ring.push(own[:, :, idx])
    for ring, own in zip(rings, queries, strict=True):
        assert torch.equal(torch.stack([ring.ordered(idx) for idx in range(2)]), own[:, :, 2:])
    assert torch.equal(pool.read_layer(first, 0).keys, layer.keys)
    per_ring = pool.pages_for_queries(2 * 4 * 5)
    assert (per_ring, pool.num_used) == (5, 5 + 2 * per_ring)
    pool.clear(first)
    assert pool.num_used == per_ring
    memory.release(first, second)
    assert pool.num_used == 0
