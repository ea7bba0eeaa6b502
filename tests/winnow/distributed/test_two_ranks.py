"""What two ranks compute is token for token what one process computes."""

import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.deadlines import SOON_S
from tests.winnow.distributed.answers import answer, both
from tests.winnow.distributed.conftest import TwoRanks
from tests.winnow.drive import (
    ASL,
    GREEDY,
    UNPRUNED,
    all_layers,
    assert_empty,
    decode_all,
    ids,
    prefill_all,
    prompt,
    spec,
)
from winnow.decoder import DecoderModel
from winnow.distributed import split_view
from winnow.distributed.exchange import gather_heads, take
from winnow.engine.decode import DecodeEngine
from winnow.engine.prefill import PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.engine.prompt_logprobs import PromptLogprobsRun
from winnow.errors import EngineFailed, WinnowError
from winnow.kv import KvDtype, LayerKV
from winnow.pruning_settings import PruningSettings
from winnow.sampling_params import SamplingParams
from winnow.tokens import PromptLogprobs

ADAKV = PruningSettings(
    method="snapkv", compression="adakv", window_size=8, kernel_size=3, kv_budget=24
)
ADAKV_WIDE = replace(ADAKV, kv_budget=50)
TOP_P = PruningSettings(
    method="snapkv", compression="top_p", window_size=8, kernel_size=3, kv_top_p=0.6
)
H2O = PruningSettings(method="h2o", window_size=8, kernel_size=3, kv_budget=24)
GEMFILTER = PruningSettings(
    method="gemfilter", window_size=8, kernel_size=3, fixed_layer=1, select_tokens=30
)
PYRAMID = PruningSettings(method="pyramidinfer", window_size=8, kernel_size=3, kv_budget=24)
SETTINGS = {
    "full": UNPRUNED,
    "asl": ASL,
    "adakv": ADAKV,
    "top_p": TOP_P,
    "h2o": H2O,
    "gemfilter": GEMFILTER,
    "pyramidinfer": PYRAMID,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_answer_as_one_process(two: TwoRanks, name: str) -> None:
    single, split = both(two, SETTINGS[name])
    assert split == single


@pytest.mark.parametrize("name", ["asl", "adakv"])
def test_prefill_keeps_the_same_entries_of_the_same_tokens(two: TwoRanks, name: str) -> None:
    (single, one), (split, other) = (
        prefill_all(model, prompt(100), SETTINGS[name]) for model in (two.single, two.split)
    )
    assert other.report == one.report
    for ours, theirs in zip(split, single, strict=True):
        assert ours.head_lengths == theirs.head_lengths
        assert torch.equal(ours.positions, theirs.positions)
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.window_queries, theirs.window_queries)


def test_rank_0_gets_of_other_heads_their_scores_and_what_is_kept(
    two: TwoRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    packed: list[int] = []

    def gather_scores(own: Tensor, dim: int) -> Tensor:
        scored.append(own.nbytes)
        return gather_heads(own, dim)

    def take_packed(rank: int, shape: Sequence[int], like: Tensor) -> Tensor:
        packed.append(like.itemsize * math.prod(shape))
        return take(rank, shape, like)

    monkeypatch.setattr(split_view, "gather_heads", gather_scores)
    monkeypatch.setattr(split_view, "take", take_packed)
    layers, _ = prefill_all(two.split, prompt(100), ADAKV)
    shape = two.split.shape
    assert scored == [shape.num_heads // 2 * 100 * 4] * len(layers)
    own_queries = shape.num_heads // 2 * 8 * shape.head_dim * 4
    others = [sum(layer.head_lengths[shape.num_kv_heads // 2 :]) for layer in layers]
    assert packed[0::2] == [shape.kv_bytes(entries) for entries in others]
    assert packed[1::2] == [own_queries] * len(layers)


@pytest.mark.parametrize(
    ("rule", "kv_dtype"), [("snapkv", "auto"), ("rkv", "auto"), ("snapkv", "int8")]
)
def test_each_rank_recompresses_its_heads_as_one_process_does(
    two: TwoRanks, rule: str, kv_dtype: KvDtype
) -> None:
    sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    recompression = {
        "decode_budget": 24,
        "recompress_interval": 8,
        "method": rule,
        "sampling": sampling,
    }
    single, split = both(two, TOP_P, kv_dtype, **recompression)
    assert split == single


def test_sequences_of_one_prompt_sample_their_own_tokens(two: TwoRanks) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=0.8, seed=3, ignore_eos=True)
    single, split = both(two, ASL, sampling=sampling, num_sequences=2, decode_budget=30)
    assert split == single
    assert split["100/0"] != split["100/1"]


def test_sequences_swapped_out_for_want_of_memory_go_on(two: TwoRanks) -> None:
    sampling = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    wide = two.engine(is_split=False)
    expected = answer(two.single, wide, UNPRUNED, sampling, (60, 70, 80), decode_budget=200)
    page_bytes = 16 * (wide.pool.shape.kv_bytes(1) + 4)
    tight = two.engine(
        is_split=True, memory=2 * 70 * page_bytes, overcommit=3.0, swap_bytes=64 << 20
    )
    found = answer(two.split, tight, UNPRUNED, sampling, (60, 70, 80), decode_budget=200)
    assert tight.preemption_stats.swapped_out > 0
    assert found == expected


def test_int8_heads_arrive_and_are_swapped_out_and_in_on_two_ranks(two: TwoRanks) -> None:
    sampling = SamplingParams(max_tokens=60, temperature=0.8, seed=3, ignore_eos=True)
    request = {"num_sequences": 2, "decode_budget": 200}
    wide = two.engine(is_split=False, kv_dtype="int8")
    expected = answer(two.single, wide, ADAKV_WIDE, sampling, (60, 70), **request)
    page_bytes = 16 * (wide.pool.shape.kv_bytes(1, "int8") + 4)
    tight = two.engine(
        is_split=True,
        kv_dtype="int8",
        memory=2 * 110 * page_bytes,
        overcommit=4.0,
        swap_bytes=64 << 20,
    )
    found = answer(two.split, tight, ADAKV_WIDE, sampling, (60, 70), **request)
    assert tight.preemption_stats.swapped_out > 0
    assert found == expected
    assert found["70/0"] != found["70/1"]


def test_ragged_heads_are_counted_by_the_rank_that_has_most(two: TwoRanks) -> None:
    engine = two.engine(is_split=True)
    layers, result = prefill_all(two.split, prompt(100), UNPRUNED)
    asked = spec("ragged", 100, GREEDY, decode_budget=40, recompress_interval=4)
    reservation = engine.reserve(asked)
    for layer in layers:
        reservation.write_layer(only_the_last_of_head_0(layer))
    engine.start(reservation, result.final_hidden, result.report.next_position)
    num_layers, query_pages = len(layers), -(-len(layers) * 2 * 8 // 32)
    assert engine.stats().pool.pages_used == num_layers * 7 + query_pages  # 100 of 16 each
    engine.step()
    engine.step()
    assert engine.pool.lengths(reservation.rows).tolist() == [[[6, 40]] * num_layers]
    assert engine.stats().pool.pages_used == num_layers * 3 + query_pages
    decode_all(engine)
    assert_empty(engine)


def test_a_sequence_leaves_with_all_its_heads_and_goes_on_elsewhere(two: TwoRanks) -> None:
    """As when a worker drains: from two ranks to one process, and back."""
    recompression: dict[str, Any] = {"decode_budget": 24, "recompress_interval": 8}
    expected = both(two, ASL, lengths=(100,), **recompression)[0]
    asked = spec("100", 100, GREEDY, **recompression)
    for away, home in ((True, False), (False, True)):
        origin, goal = two.engine(is_split=away), two.engine(is_split=home)
        layers, result = prefill_all(two.split, prompt(100), ASL)
        reservation = origin.reserve(asked)
        for layer in layers:
            reservation.write_layer(layer)
        origin.start(reservation, result.final_hidden, result.report.next_position)
        for _ in range(6):
            origin.step()
        (seq,) = reservation.sequences
        state = seq.state()
        moved = [seq.read_layer(origin.pool, idx) for idx in range(len(layers))]
        origin.release(reservation)
        origin.step()
        assert_empty(origin)
        _resume(goal, asked, moved, result.final_hidden, state)
        rest = decode_all(goal)["100"]
        assert [*state.token_ids, *ids(rest)] == expected["100/0"]


def only_the_last_of_head_0(layer: LayerKV) -> LayerKV:
    """The first head with its last 5 entries, the second with all 100."""
    rows = slice(95, None)
    return replace(
        layer,
        keys=layer.keys[rows],
        values=layer.values[rows],
        positions=layer.positions[rows],
        head_lengths=(5, 100),
    )


def _resume(
    goal: DecodeEngine, asked: Any, layers: list[LayerKV], hidden: torch.Tensor, state: Any
) -> None:
    reservation = goal.reserve(asked)
    for layer in layers:
        reservation.write_layer(layer)
    goal.resume(reservation, {0: state}, hidden)


def test_cached_beginnings_are_shared_out_to_the_ranks(two: TwoRanks) -> None:
    """Selected tokens of a beginning that is cached deeper are computed alone."""
    first, second = prompt(96) + prompt(20, seed=1), prompt(96) + prompt(30, seed=2)
    reports = []
    for model in (two.single, two.split):
        store = PrefixStore(model, 16 << 20, block_tokens=16)
        prefill_all(model, first, UNPRUNED, store)
        layers, result = prefill_all(model, second, ASL, store)
        reports.append((result.report, [layer.positions.tolist() for layer in layers]))
    assert reports[0][0].num_cached_tokens == 96
    assert reports[0][0].num_recomputed_tokens > 0
    assert reports[1] == reports[0]


def test_a_prompts_log_probabilities_are_those_of_one_process(two: TwoRanks) -> None:
    single, split = (scored(model, prompt(30)) for model in (two.single, two.split))
    assert split.top_ids == single.top_ids
    assert split.logprobs == pytest.approx(single.logprobs, abs=1e-4)


def scored(model: DecoderModel, token_ids: list[int]) -> PromptLogprobs:
    """In blocks of 10 tokens."""
    run = PrefillRun(model, token_ids, UNPRUNED, is_long=False)
    all_layers(run)
    hidden = run.result(keep_hidden=True).hidden
    assert hidden is not None
    scoring = PromptLogprobsRun(model, hidden, token_ids, 3, max_logits=10 * model.vocab_size)
    while not scoring.finished:
        scoring.compute_block()
    return scoring.result()


def test_prompts_take_turns_layer_by_layer(two: TwoRanks) -> None:
    runs = [PrefillRun(two.split, prompt(n, seed=n), ASL, is_long=False) for n in (50, 90)]
    while not all(run.finished for run in runs):
        for run in runs:
            if not run.finished:
                run.compute_layer()
    for run, num_tokens in zip(runs, (50, 90), strict=True):
        alone = PrefillRun(two.single, prompt(num_tokens, seed=num_tokens), ASL, is_long=False)
        all_layers(alone)
        found, expected = run.result().final_hidden, alone.result().final_hidden
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_each_rank_has_half_of_each_product(two: TwoRanks) -> None:
    own, whole = two.own._model.model.layers[0], two.single._model.model.layers[0]
    heads = (two.own._model.lm_head, two.single._model.lm_head)
    halves = (own.qkv, own.output.product, own.gate_up, own.down.product, heads[0])
    wholes = (whole.qkv, whole.output, whole.gate_up, whole.down, heads[1])
    for half, full in zip(halves, wholes, strict=True):
        assert type(half.weight) is torch.nn.Parameter
        assert 2 * half.weight.numel() == full.weight.numel()
    assert two.lost == []


def test_a_killed_rank_is_told_at_once_and_no_step_waits_for_it(two: TwoRanks) -> None:
    """The last test of this module: there are no two ranks afterwards."""
    engine = two.engine(is_split=True)
    layers, result = prefill_all(two.split, prompt(30), UNPRUNED)
    reservation = engine.reserve(spec("1", 30, GREEDY))
    for layer in layers:
        reservation.write_layer(layer)
    engine.start(reservation, result.final_hidden, result.report.next_position)
    engine.step()
    engine.step()
    os.kill(two.ranks.process_ids[0], signal.SIGKILL)
    started_s = time.monotonic()
    error = next(filter(None, (_step_fails(engine) for _ in range(100))))
    assert isinstance(error, EngineFailed)
    assert time.monotonic() - started_s < SOON_S
    with pytest.raises(EngineFailed, match="rank"):
        PrefillRun(two.split, prompt(5), UNPRUNED, is_long=False).compute_layer()
    assert len(two.lost) == 1


def _step_fails(engine: DecodeEngine) -> WinnowError | None:
    """The error of a step, raised or of its request."""
    try:
        return next((output.error for output in engine.step()), None)
    except EngineFailed as error:
        return error
