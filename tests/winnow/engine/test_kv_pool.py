from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.winnow.pools import SHAPE, layer_of, make_pool
from winnow.attention import AttentionOptions, GatherBackend
from winnow.engine.kv_manager import KVManager
from winnow.engine.kv_pool import KVPool, KVPoolConfig
from winnow.engine.promises import Promise
from winnow.engine.query_ring import QueryRing, push_queries
from winnow.errors import InvalidSetting
from winnow.kv import KV_DTYPES, KvDtype, LayerKV, ModelShape

PAGE_BYTES = 4 * (SHAPE.kv_bytes(1) + 4)


def make_memory(num_pages: int = 100, rows: int = 4, kv_dtype: KvDtype = "auto") -> KVManager:
    return KVManager(make_pool(num_pages, rows, kv_dtype), rows, overcommit=1.0)


def as_held(layer: LayerKV, pool: KVPool) -> LayerKV:
    return layer.quantized() if pool.kv_dtype == "int8" else layer


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
@given(ACTIONS, st.sampled_from(KV_DTYPES))
def test_pages_are_accounted_and_contents_kept_through_any_history(
    actions: list[tuple[Any, ...]], kv_dtype: KvDtype
) -> None:
    memory = make_memory(num_pages=400, rows=3, kv_dtype=kv_dtype)
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
        assert_same(actual, as_held(expected, pool))
    assert pool.num_used == sum(pages_of(layer.head_lengths) for layer in held.values())
    for row in rows:
        memory.release(row)
    stats = memory.stats()
    assert (stats.pages_used, stats.pages_reserved) == (0, 0)


def assert_same(actual: LayerKV, expected: LayerKV) -> None:
    assert actual.head_lengths == expected.head_lengths
    for name in ("keys", "values", "positions"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert (actual.scales is None) == (expected.scales is None)
    if actual.scales is not None and expected.scales is not None:
        assert torch.equal(actual.scales, expected.scales)


def step(pool: KVPool, rows: list[int], held: dict[tuple[int, int], LayerKV], turn: int) -> None:
    """One decode step of the rows; what it must have added goes into `held`."""
    at = [1000 + turn] * len(rows)
    (sent_rows, positions), longest = pool.begin_step(rows, at, [rows, at])
    plan = pool.plan_step(sent_rows, positions, longest)
    for layer_idx in range(2):
        new = torch.randn(2, len(rows), 2, 4, generator=torch.Generator().manual_seed(turn))
        pool.append(plan.slots[layer_idx], new[0], new[1])
        keys, values = pool.gather(plan.pages[layer_idx, rows])
        for idx, row in enumerate(rows):
            held[row, layer_idx] = extend(held[row, layer_idx], new[:, idx], 1000 + turn)
            expected = as_held(held[row, layer_idx], pool).dequantized(SHAPE.dtype)
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


@pytest.mark.parametrize(("kv_dtype", "pages_per_ring"), [("auto", 5), ("int8", 20)])
def test_queries_lie_in_pages_that_go_with_their_row(
    kv_dtype: KvDtype, pages_per_ring: int
) -> None:
    memory = make_memory(num_pages=60, rows=2, kv_dtype=kv_dtype)
    pool, (first, second) = memory.pool, memory.reserve(2, Promise(30, 30))
    layer = layer_of(0, (9, 5))
    pool.write_layer(first, layer)
    rings = [QueryRing(pool, row, window_size=5) for row in (first, second)]
    queries = torch.randn(2, 2, 4, 7, 4, generator=torch.Generator().manual_seed(1))
    for ring, own, num_seen in zip(rings, queries, (3, 5), strict=True):
        for layer_idx in range(2):
            ring.seed(layer_idx, own[layer_idx, :, :num_seen])
    for step in range(4):  # the second row pauses for two steps, while others share the batch
        new = torch.stack([torch.ones(2, 4, 4), queries[0, :, :, 3 + step]], dim=1)
        going = {1: rings[0]}
        if step in (0, 3):
            new = torch.cat([new, queries[1, :, None, :, 5 + step // 3]], dim=1)
            going[2] = rings[1]
        push_queries(pool, going, new)
    for ring, own in zip(rings, queries, strict=True):
        assert ring.num_tokens == 5
        assert torch.equal(torch.stack([ring.ordered(idx) for idx in range(2)]), own[:, :, 2:])
    assert torch.equal(pool.read_layer(first, 0).keys, as_held(layer, pool).keys)
    per_ring = pool.pages_for_queries(2 * 4 * 5)
    assert (per_ring, pool.num_used) == (pages_per_ring, 5 + 2 * per_ring)
    pool.clear(first)
    assert pool.num_used == per_ring
    memory.release(first, second)
    assert pool.num_used == 0


@pytest.mark.parametrize(
    ("head_dim", "dtype", "share"),
    [(64, torch.bfloat16, 66 / 128), (128, torch.float16, 130 / 256), (128, torch.float32, 0.254)],
)
def test_int8_takes_a_byte_per_number_and_two_per_vector(
    head_dim: int, dtype: torch.dtype, share: float
) -> None:
    shape = ModelShape(2, 4, 2, head_dim, 16, dtype)
    assert shape.kv_bytes(7, "int8") / shape.kv_bytes(7) == pytest.approx(share, abs=1e-4)
    pools = [KVPoolConfig(1 << 24, kv_dtype=kv_dtype).num_pages(shape) for kv_dtype in KV_DTYPES]
    assert pools[1] / pools[0] == pytest.approx(
        (2 * head_dim * dtype.itemsize + 4) / (2 * head_dim + 8), rel=0.01
    )


def test_a_pool_takes_layers_of_either_kind_and_keeps_its_own() -> None:
    layer = layer_of(0, (5, 9))
    for kv_dtype in KV_DTYPES:
        pool = make_pool(kv_dtype=kv_dtype)
        pool.write_layer(0, layer.quantized())
        assert_same(
            pool.read_layer(0, 0), as_held(layer.quantized().dequantized(SHAPE.dtype), pool)
        )


def test_an_int8_page_without_room_for_whole_queries_is_refused() -> None:
    config = KVPoolConfig(1 << 20, page_size=6, kv_dtype="int8")
    with pytest.raises(InvalidSetting, match="page_size is 6; with int8 KV it must be a multiple"):
        KVPool(SHAPE, config, 1, torch.device("cpu"))


def test_nan_in_freed_int8_pages_reaches_no_later_row() -> None:
    pool = make_pool(num_pages=4, rows=1, kv_dtype="int8")
    nan = torch.full((8, 4), torch.nan)
    positions = torch.arange(4, dtype=torch.int32).repeat(2)
    pool.write_layer(0, LayerKV(0, nan, nan, positions, (4, 4), torch.empty(4, 0, 4)))
    pool.clear(0)
    pool.write_layer(0, layer_of(0, (3, 1)))
    (rows, positions), longest = pool.begin_step([0], [5], [[0], [5]])
    plan = pool.plan_step(rows, positions, longest)
    pool.append(plan.slots[0], torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    for part in pool.gather(plan.pages[0, [0], :, :1]):
        assert part.isfinite().all()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_nan_in_the_pages_that_a_row_had_once_reaches_no_head_of_it(kv_dtype: KvDtype) -> None:
    """What the device's table names behind a head's last page may be another row's by now."""
    pool = make_pool(rows=2, kv_dtype=kv_dtype)
    nan = torch.full((120, 4), torch.nan)
    positions = torch.arange(60, dtype=torch.int32).repeat(2)
    pool.write_layer(0, layer_of(0, (60, 60)))
    pool.begin_step([0], [60], [0])
    pool.clear(0)
    pool.write_layer(1, LayerKV(0, nan, nan, positions, (60, 60), torch.empty(4, 0, 4)))
    pool.write_layer(0, layer_of(0, (3, 30)))
    (rows, at), longest = pool.begin_step([0], [60], [[0], [60]])
    backend = GatherBackend(pool)
    plan = backend.plan(pool.plan_step(rows, at, longest))
    new = torch.ones(1, 2, 4)
    output = backend.attend(0, plan, torch.ones(1, 4, 1, 4), new, new, AttentionOptions(0.5))
    assert output.isfinite().all()
