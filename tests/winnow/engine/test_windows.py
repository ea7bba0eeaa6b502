"""The pages of layers with windows, against lists of all entries that ever came."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.winnow.pools import SHAPE
from winnow.engine.generation_spec import GenerationSpec, promise_for
from winnow.engine.kv_manager import KVManager
from winnow.engine.kv_pool import KVPool, KVPoolConfig
from winnow.kv import KV_DTYPES, KvDtype, LayerKV
from winnow.layers import FULL, Layer
from winnow.pruning_settings import Recompression
from winnow.sampling_params import SamplingParams

SLIDING, CHUNKED = Layer("sliding", 7), Layer("chunked", 6)
LAYERS = (SLIDING, FULL, CHUNKED)
WINDOWED = replace(SHAPE, num_layers=3, layers=LAYERS, states=())
PAGE = 4

# Of a head: the positions of all entries that ever came.
Positions = list[int]


def make_pool(rows: int = 2, kv_dtype: KvDtype = "auto") -> KVPool:
    config = KVPoolConfig(1 << 17, page_size=PAGE, kv_dtype=kv_dtype)
    return KVPool(WINDOWED, config, rows, torch.device("cpu"))


def keys_of(positions: Positions) -> torch.Tensor:
    """Such that each tells its position, as int8 too."""
    return torch.tensor(positions, dtype=torch.float32)[:, None].expand(-1, 4)


def layer_of(layer_idx: int, heads: list[Positions]) -> LayerKV:
    positions = [position for head in heads for position in head]
    return LayerKV(
        layer_idx=layer_idx,
        keys=keys_of(positions).contiguous(),
        values=-keys_of(positions),
        positions=torch.tensor(positions, dtype=torch.int32),
        head_lengths=tuple(map(len, heads)),
        window_queries=torch.empty(4, 0, 4),
    )


def visible(layer: Layer, positions: Positions, at: int) -> Positions:
    return [position for position in positions if position >= layer.first_visible(at)]


def step(pool: KVPool, rows: list[int], at: list[int]) -> None:
    """A token for each row; its keys tell its position."""
    (sent_rows, positions), longest = pool.begin_step(rows, at, [rows, at])
    plan = pool.plan_step(sent_rows, positions, longest)
    for layer_idx in range(3):
        new = keys_of(at)[:, None].expand(-1, 2, -1)
        pool.append(plan.slots[layer_idx], new, -new)
        keys, _ = pool.gather(plan.pages[layer_idx, rows])
        for idx, row in enumerate(rows):
            held = pool.read_layer(row, layer_idx).dequantized(SHAPE.dtype)
            seen = torch.arange(keys.shape[2]) < plan.lengths[layer_idx, idx][:, None]
            assert torch.equal(keys[idx][seen], held.keys), "the device has the host's pages"


def held_by(pool: KVPool, row: int, layer_idx: int) -> list[Positions]:
    layer = pool.read_layer(row, layer_idx)
    keys = layer.dequantized(SHAPE.dtype).keys
    torch.testing.assert_close(keys, keys_of(layer.positions.tolist()), rtol=1e-3, atol=0.1)
    return [layer.positions[rows].tolist() for rows in layer.head_slices()]


PROMPTS = st.tuples(st.integers(1, 40), st.integers(0, 2**30))
STEPS = st.lists(st.sets(st.integers(0, 1), min_size=1), max_size=30)


def kept_of(num_tokens: int, layer: Layer, generator: np.random.Generator) -> Positions:
    """What prefill may send of a head: some of what the next token sees, with gaps."""
    seen = visible(layer, list(range(num_tokens)), num_tokens)
    return [position for position in seen if generator.random() < 0.7]


@settings(max_examples=60)
@given(st.lists(PROMPTS, min_size=2, max_size=2), STEPS, st.sampled_from(KV_DTYPES))
def test_a_head_holds_what_its_window_sees_and_less_than_a_page_more(
    prompts: list[tuple[int, int]], steps: list[set[int]], kv_dtype: KvDtype
) -> None:
    pool = make_pool(kv_dtype=kv_dtype)
    came: dict[tuple[int, int], list[Positions]] = {}
    next_positions = [num_tokens for num_tokens, _ in prompts]
    for row, (num_tokens, seed) in enumerate(prompts):
        generator = np.random.default_rng(seed)
        for layer_idx, layer in enumerate(LAYERS):
            heads = [kept_of(num_tokens, layer, generator) for _ in range(2)]
            came[row, layer_idx] = heads
            pool.write_layer(row, layer_of(layer_idx, heads))
    for going in steps:
        rows = sorted(going)
        at = [next_positions[row] for row in rows]
        most = pool.table.pages_after_step(rows)
        step(pool, rows, at)
        for row, position in zip(rows, at, strict=True):
            assert pool.table.pages_held(row) <= most[row]
            next_positions[row] += 1
            for layer_idx, layer in enumerate(LAYERS):
                for own, held in zip(
                    came[row, layer_idx], held_by(pool, row, layer_idx), strict=True
                ):
                    own.append(position)
                    seen = visible(layer, own, position)
                    assert held == own[len(own) - len(held) :]
                    assert len(held) >= len(seen)
                    if layer.window is not None:
                        width = position + 1 - layer.first_visible(position)
                        assert len(held) < width + PAGE
    for row in range(2):
        pool.clear(row)
    assert pool.num_used == 0


def test_all_pages_of_a_chunk_are_freed_when_the_next_one_begins() -> None:
    pool = make_pool(rows=1)
    for layer_idx in range(3):
        pool.write_layer(0, layer_of(layer_idx, [[6, 7, 8, 9, 10], [6, 7, 8, 9, 10]]))
    step(pool, [0], [11])
    assert held_by(pool, 0, 2) == [[6, 7, 8, 9, 10, 11]] * 2
    step(pool, [0], [12])
    assert held_by(pool, 0, 2) == [[10, 11, 12]] * 2, "the last page is kept until it can be freed"


def spec(**changes: Any) -> GenerationSpec:
    values: dict[str, Any] = {
        "request_id": "a",
        "num_prompt_tokens": 30,
        "max_prompt_entries": 30,
        "sampling": SamplingParams(max_tokens=50),
    }
    return GenerationSpec(**values | changes)


def test_a_reservation_counts_windows_and_not_the_whole_sequence() -> None:
    pool = make_pool()
    in_windows = 2 * 3 + 2 * 3  # 7 + 3 entries and 6 + 3 of two heads each
    promise = promise_for(pool, spec())
    assert promise.most == 2 * 80 / PAGE + in_windows
    assert promise.sure == 2 * 32 / PAGE + in_windows


def test_a_budget_bounds_full_layers_and_windows_the_others() -> None:
    pool = make_pool()
    budget = Recompression(window_size=2, decode_budget=3, recompress_interval=1, kernel_size=1)
    promise = promise_for(pool, spec(max_prompt_entries=3, recompression=budget))
    rings = pool.pages_for_queries(2 * 4)  # of the full layer
    assert promise.most == 2 * 2 + 2 * 3 + 2 * 3 + rings


@pytest.mark.parametrize("num_tokens", [3, 9, 30])
def test_a_promise_shrinks_to_what_windows_can_hold(num_tokens: int) -> None:
    pool = make_pool()
    memory = KVManager(pool, 2, overcommit=1.0)
    (row,) = memory.reserve(1, promise_for(pool, spec()))
    for layer_idx, layer in enumerate(LAYERS):
        seen = visible(layer, list(range(num_tokens)), num_tokens)
        pool.write_layer(row, layer_of(layer_idx, [seen, seen]))
    memory.settle(row, extra_entries=20, cap=2**62)
    for position in range(num_tokens, num_tokens + 20):
        assert memory.claim([row])
        step(pool, [row], [position])
        assert pool.table.pages_held(row) <= memory.promised(row).sure
        assert memory.promised(row).sure <= memory.promised(row).most


def test_a_layer_that_moves_on_has_no_more_entries_than_its_window() -> None:
    layer = layer_of(0, [list(range(9)), [3, 5], []])
    newest = layer.newest(4)
    assert newest.head_lengths == (4, 2, 0)
    assert newest.positions.tolist() == [5, 6, 7, 8, 3, 5]
    assert torch.equal(newest.keys, keys_of([5, 6, 7, 8, 3, 5]))
    assert layer.newest(9) is layer
