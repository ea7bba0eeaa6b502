"""Cutting sequences of any lengths and settings at once, against the formulas of each head."""

from collections.abc import Mapping
from collections.abc import Sequence as Several
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.winnow.drive import GREEDY, spec
from tests.winnow.naive_recompression import assert_cut
from tests.winnow.no_waiting import META, no_waiting
from winnow.attention import AttentionOptions
from winnow.catalog import RECOMPRESSIONS
from winnow.engine import head_cutter
from winnow.engine.kv_manager import KVManager
from winnow.engine.kv_pool import KVPool, KVPoolConfig
from winnow.engine.query_ring import QueryRing, push_queries
from winnow.engine.recompressor import RecompressionStats, Recompressor
from winnow.engine.runner import StepQueries
from winnow.engine.sequence import Reservation, Sequence
from winnow.kv import KV_DTYPES, KvDtype, LayerKV, ModelShape

OPTIONS = [AttentionOptions(8**-0.5)] * 2  # of two layers


def make_memory(device: torch.device, num_layers: int = 2, kv_dtype: KvDtype = "auto") -> KVManager:
    shape = ModelShape(num_layers, 4, 2, 8, 32, torch.float32)
    config = KVPoolConfig(4 << 20, page_size=4, kv_dtype=kv_dtype)
    pool = KVPool(shape, config, 8, device)
    return KVManager(pool, 8, overcommit=1.0)


def running(
    memory: KVManager, lengths: Several[Several[int]], *, budget: int, window: int, **more: Any
) -> Sequence:
    """A sequence whose heads have these lengths [L][H_kv].  more: as of `spec`."""
    own = {"decode_budget": budget, "window_size": window, "recompress_interval": 1} | more
    longest = max(map(max, lengths))
    reservation = Reservation(memory, spec("", max(longest, 1), GREEDY, **own), 0)
    for layer_idx, heads in enumerate(lengths):
        total = sum(heads)
        layer = LayerKV(
            layer_idx=layer_idx,
            keys=torch.randn(total, 8),
            values=torch.randn(total, 8),
            positions=torch.cat([torch.arange(length, dtype=torch.int32) for length in heads]),
            head_lengths=tuple(heads),
            window_queries=torch.randn(4, window, 8),
        )
        reservation.write_layer(layer)
    started = reservation.begin(torch.empty(32, device=memory.pool.device), longest)
    assert started is not None
    return started[0]


LENGTHS = st.lists(st.lists(st.integers(0, 24), min_size=2, max_size=2), min_size=2, max_size=2)
ROWS = st.lists(
    st.tuples(
        LENGTHS,
        st.integers(5, 14),  # budget
        st.integers(1, 4),  # window
        st.sampled_from([1, 3]),  # kernel size
        st.sampled_from([("snapkv", 0.1), ("rkv", 0.1), ("rkv", 0.9)]),
        st.integers(0, 3),  # steps
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=30)
@given(
    ROWS,
    st.sampled_from([1, 4000, 1 << 20]),
    st.sampled_from(KV_DTYPES),
    st.integers(0, 2**32),
)
def test_each_head_of_each_row_keeps_what_its_own_settings_say(
    rows: list[Any], pass_bytes: int, kv_dtype: KvDtype, seed: int
) -> None:
    """However many heads one pass takes; heads within the budget, empty ones too, stay whole."""
    torch.manual_seed(seed)
    memory = make_memory(torch.device("cpu"), kv_dtype=kv_dtype)
    pool, several, cutter = memory.pool, [], Recompressor(memory)
    for lengths, budget, window, kernel_size, (method, weight), steps in rows:
        own = {"method": method, "kernel_size": kernel_size, "redundancy_weight": weight}
        several.append(running(memory, lengths, budget=budget, window=window, **own))
        push(pool, several[-1:], steps)
    before = [[seq.read_layer(pool, idx) for idx in range(2)] for seq in several]
    cutter.options = OPTIONS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_cutter, "_CPU_PASS_BYTES", pass_bytes)
        cutter.cut(several)
    for seq, layers in zip(several, before, strict=True):
        assert seq.budget is not None
        for layer in layers:
            after = seq.read_layer(pool, layer.layer_idx)
            assert torch.equal(after.window_queries, layer.window_queries)
            assert_cut(layer, after, seq.spec.recompression, seq.budget)
    rows_held = [seq.row for seq in several]
    assert pool.num_used == sum(map(pool.table.pages_held, rows_held))
    assert pool.num_used <= memory.stats().pages_reserved
    dropped = [seq.reservation.recompressed_entries for seq in several]
    totals = [sum(layer.num_entries for layer in layers) for layers in before]
    kept = pool.lengths(rows_held).sum((1, 2)).tolist()
    assert dropped == [total - own for total, own in zip(totals, kept, strict=True)]
    assert cutter.stats == RecompressionStats(len(several), sum(kept), sum(dropped))
    memory.release(*rows_held)
    assert pool.num_used == 0


def push(pool: KVPool, sequences: list[Sequence], steps: int) -> None:
    rings = {idx: seq.ring for idx, seq in enumerate(sequences) if seq.ring}
    for _ in range(steps):
        queries = torch.randn(pool.shape.num_layers, len(sequences), 4, 8, device=pool.device)
        push_queries(pool, rings, queries)


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what PyTorch runs."""

    num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operations += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", RECOMPRESSIONS)
def test_a_cut_takes_no_more_operations_for_many_rows_and_layers_than_for_one(
    method: str,
) -> None:
    counts = []
    for num_layers, num_rows in ((1, 1), (6, 4)):
        memory = make_memory(META, num_layers)
        lengths = [(40, 30 + idx) for idx in range(num_layers)]
        several = [
            running(memory, lengths, budget=20 + idx, window=4, method=method)
            for idx in range(num_rows)
        ]
        layers = list(torch.empty(num_layers, num_rows, 4, 8, device=META))
        cutter = Recompressor(memory)
        with no_waiting(), Counting() as counting:  # type: ignore[no-untyped-call]
            cutter.observe(StepQueries(several, layers, OPTIONS[:1] * num_layers))
        assert cutter.stats.recompressions == num_rows
        counts.append(counting.num_operations)
    assert counts[1] <= counts[0]


def test_only_queries_that_a_cut_may_see_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that may shrink to a floor at any time records all of them."""
    recorded: list[list[int]] = []

    def record(pool: KVPool, rings: Mapping[int, QueryRing], queries: Tensor) -> None:
        recorded.append(list(rings))
        push_queries(pool, rings, queries)

    monkeypatch.setattr("winnow.engine.recompressor.push_queries", record)
    memory = make_memory(torch.device("cpu"))
    lengths = [(12, 9), (10, 12)]
    own = {"budget": 12, "window": 3, "recompress_interval": 8}
    several = [running(memory, lengths, **own), running(memory, lengths, decode_floor=6, **own)]
    cutter = Recompressor(memory)
    for _ in range(9):
        memory.pool.table.add_entries([seq.row for seq in several], [99, 99])
        cutter.observe(StepQueries(several, list(torch.randn(2, 2, 4, 8)), OPTIONS))
    assert cutter.stats.recompressions == 2, "at 21 entries"
    assert recorded == [[1]] * 6 + [[0, 1]] * 3


def test_what_falls_free_is_taken_by_others_and_what_stays_is_not() -> None:
    memory = make_memory(torch.device("cpu"))
    cutter = Recompressor(memory)
    first = running(memory, [(40, 9), (0, 23)], budget=10, window=4)
    cutter.options = OPTIONS
    cutter.cut([first])
    left = [first.read_layer(memory.pool, idx) for idx in range(2)]
    used = memory.pool.num_used
    others = [running(memory, [(40, 40), (40, 40)], budget=10, window=4) for _ in range(3)]
    assert memory.pool.num_used > used
    for idx, layer in enumerate(left):
        after = first.read_layer(memory.pool, idx)
        assert after.head_lengths == ((10, 9), (0, 10))[idx]
        assert torch.equal(after.keys, layer.keys)
    memory.release(first.row, *(seq.row for seq in others))
    assert memory.pool.num_used == 0


@pytest.mark.parametrize("method", RECOMPRESSIONS)
def test_a_sequence_that_is_not_finite_changes_nothing_of_the_others(method: str) -> None:
    kept = []
    for num_rows in (1, 2):
        torch.manual_seed(4)
        memory = make_memory(torch.device("cpu"))
        several = [
            running(memory, [(40, 30), (20, 50)], budget=12, window=4, method=method)
            for _ in range(num_rows)
        ]
        for seq in several[1:]:
            layer = seq.read_layer(memory.pool, 0)
            layer.keys[::2] = torch.nan
            layer.keys[1::4] = torch.inf
            memory.pool.write_layer(seq.row, layer)
        cutter = Recompressor(memory)
        cutter.options = OPTIONS
        cutter.cut(several)
        assert (memory.pool.lengths([seq.row for seq in several]) == 12).all()
        kept.append([several[0].read_layer(memory.pool, idx).positions for idx in range(2)])
    assert all(map(torch.equal, *kept))


def test_a_head_is_scored_by_its_layers_attention_with_a_softcap_and_its_sinks() -> None:
    memory = make_memory(torch.device("cpu"))
    seq = running(memory, [(20, 9), (12, 30)], budget=7, window=3, kernel_size=1)
    before = [seq.read_layer(memory.pool, idx) for idx in range(2)]
    cutter = Recompressor(memory)
    cutter.options = [AttentionOptions(0.9, softcap=0.7, sinks=4 * torch.randn(4)) for _ in "ab"]
    cutter.cut([seq])
    for layer, options in zip(before, cutter.options, strict=True):
        assert options.sinks is not None
        after = seq.read_layer(memory.pool, layer.layer_idx)
        heads = zip(
            layer.head_slices(),
            after.head_slices(),
            layer.window_queries.chunk(2),
            options.sinks.chunk(2),
            strict=True,
        )
        for own, left, queries, sinks in heads:
            keys = layer.keys[own].double()
            weights = ((queries.double() @ keys.mT * 0.9 / 0.7).tanh() * 0.7).exp()
            weights *= torch.ones(3, len(keys)).tril(len(keys) - 3)
            total = weights.sum(-1, keepdim=True) + sinks.double().exp()[:, None, None]
            best = (weights / total).sum((0, 1))[:-3].topk(4).indices.sort().values
            assert after.positions[left].tolist()[:4] == best.tolist()


def test_rkv_weighs_attention_with_the_layers_softcap() -> None:
    memory = make_memory(torch.device("cpu"))
    own: dict[str, Any] = {"method": "rkv", "redundancy_weight": 1.0, "kernel_size": 1}
    seq = running(memory, [(20, 9), (12, 30)], budget=7, window=3, **own)
    before = [seq.read_layer(memory.pool, idx) for idx in range(2)]
    cutter = Recompressor(memory)
    cutter.options = [AttentionOptions(0.9, softcap=0.7)] * 2
    cutter.cut([seq])
    for layer in before:
        after = seq.read_layer(memory.pool, layer.layer_idx)
        heads = zip(
            layer.head_slices(), after.head_slices(), layer.window_queries.chunk(2), strict=True
        )
        for own_rows, left, queries in heads:
            keys = layer.keys[own_rows].double()[:-3]
            logits = (queries.double() @ keys.mT).amax(0) * 0.9
            weights = ((logits / 0.7).tanh() * 0.7).softmax(-1).mean(0)
            best = weights.topk(4).indices.sort().values
            assert after.positions[left].tolist()[:4] == best.tolist()
