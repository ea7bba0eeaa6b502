import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models_in_code import FAMILIES
from tests.winnow import reference
from tests.winnow.drive import (
    ASL,
    GREEDY,
    LENGTHS,
    UNPRUNED,
    admit,
    assert_empty,
    decode_all,
    ids,
    make_engine,
    prefill_all,
    prompt,
    spec,
)
from winnow.catalog import RECOMPRESSIONS
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.kv_pool import KVPool
from winnow.engine.sequence import Reservation, Sequence
from winnow.errors import InvalidSetting, Overloaded
from winnow.kv import LayerKV, SequenceState
from winnow.models import load_model
from winnow.sampling_params import SamplingParams
from winnow.tokens import FinishReason, Token


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_prompts_in_one_batch_get_the_tokens_of_generate(
    tiny_models: dict[str, Path], family: str
) -> None:
    engine = make_engine(load_model(tiny_models[family]))
    prompts = {str(n): prompt(n, seed=n) for n in LENGTHS}
    for name, token_ids in prompts.items():
        admit(engine, spec(name, len(token_ids), GREEDY), token_ids)
    answers = decode_all(engine)
    network = reference.load(tiny_models[family])
    expected = {name: reference.greedy(network, own, 16) for name, own in prompts.items()}
    assert {name: ids(tokens) for name, tokens in answers.items()} == expected
    assert_empty(engine)


def test_a_long_prompt_in_the_batch_makes_no_other_as_long(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[int] = []
    gather = KVPool.gather

    def counted(pool: KVPool, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = gather(pool, pages)
        gathered.append(keys.shape[0] * keys.shape[2])
        return keys, values

    engine = make_engine(load_model(tiny_models["llama"]))
    monkeypatch.setattr(KVPool, "gather", counted)
    long, sampling = prompt(1100, 1), replace(GREEDY, max_tokens=4)
    admit(engine, spec("long", len(long), sampling), long)
    for name in range(8):
        admit(engine, spec(str(name), 10, sampling), prompt(10, name))
    answers = decode_all(engine)
    network = reference.load(tiny_models["llama"])
    assert ids(answers["long"]) == reference.greedy(network, long, 4)
    for name in range(8):
        assert ids(answers[str(name)]) == reference.greedy(network, prompt(10, name), 4)
    num_passes = 3 * 4  # steps and layers
    assert sum(gathered) == num_passes * (69 * 16 + 8 * 16)


def test_a_sequence_that_joins_later_gets_its_own_tokens(tiny_models: dict[str, Path]) -> None:
    engine = make_engine(load_model(tiny_models["qwen2"]))
    first, second = prompt(40, 1), prompt(23, 2)
    admit(engine, spec("first", 40, GREEDY), first)
    early = [
        token.token_id for _ in range(5) for output in engine.step() for token in output.tokens
    ]
    admit(engine, spec("second", 23, GREEDY), second)
    rest = decode_all(engine)
    network = reference.load(tiny_models["qwen2"])
    assert early + ids(rest["first"]) == reference.greedy(network, first, 16)
    assert ids(rest["second"]) == reference.greedy(network, second, 16)


def test_ends_at_max_tokens_at_an_end_token_and_at_the_last_position(
    tiny_models: dict[str, Path],
) -> None:
    model = load_model(tiny_models["llama"])
    engine = make_engine(model)
    token_ids = prompt(30)
    admit(engine, spec("length", 30, GREEDY), token_ids)
    tokens = decode_all(engine)["length"]
    assert [token.finish_reason for token in tokens] == [None] * 15 + [FinishReason.LENGTH]
    end = next(iter(model.eos_token_ids))
    biased = SamplingParams(max_tokens=16, temperature=0, logit_bias={end: 100})
    admit(engine, spec("stop", 30, biased), token_ids)
    tokens = decode_all(engine)["stop"]
    assert [(t.token_id, t.finish_reason) for t in tokens] == [(end, FinishReason.STOP)]
    long = SamplingParams(max_tokens=10**6, temperature=0, ignore_eos=True)
    last = model.max_positions - 3
    admit(engine, spec("context", last, long), prompt(last))
    assert len(decode_all(engine)["context"]) == 3
    assert_empty(engine)


@pytest.mark.parametrize("compression", ["snapkv", "top_p"])
def test_decodes_from_pruned_ragged_caches_alike_alone_and_in_a_batch(
    tiny_models: dict[str, Path], compression: str
) -> None:
    config = replace(ASL, compression=compression, kv_top_p=0.7)
    engine = make_engine(load_model(tiny_models["llama"]))
    prompts = {str(n): prompt(n, n) for n in (40, 90, 200)}
    alone: dict[str, list[Token]] = {}
    for name, token_ids in prompts.items():
        admit(engine, spec(name, len(token_ids), GREEDY), token_ids, config)
        alone |= decode_all(engine)
    for name, token_ids in prompts.items():
        admit(engine, spec(name, len(token_ids), GREEDY), token_ids, config)
    assert decode_all(engine) == alone
    assert_empty(engine)


@pytest.mark.parametrize("recompression", RECOMPRESSIONS)
def test_memory_stays_flat_over_2000_tokens_at_a_decode_budget_of_256(
    tiny_models: dict[str, Path], recompression: str
) -> None:
    engine = make_engine(load_model(tiny_models["qwen2"]))
    sampling = SamplingParams(max_tokens=2000, temperature=0, ignore_eos=True)
    request = spec(
        "long",
        400,
        sampling,
        decode_budget=256,
        recompress_interval=32,
        method=recompression,
    )
    reservation = admit(engine, request, prompt(400))
    pages, longest, dropped = [], [], 0
    while engine.stats().running_sequences:
        longest.append(int(engine.pool.lengths(reservation.rows).max()))
        for output in engine.step():
            dropped = output.recompressed_entries
            if not output.finished:
                stats = engine.stats().pool
                pages.append(stats.pages_used)
                assert stats.pages_used <= stats.pages_reserved
    heads = 4 * 2
    assert max(longest[2:]) == 256 + 32
    assert max(pages[1:]) <= heads * -(-(256 + 33) // 16)
    assert dropped == heads * (400 + 1999 - longest[-1] - 1)
    assert_empty(engine)


def test_recompression_keeps_what_its_method_and_weight_say(tiny_models: dict[str, Path]) -> None:
    engine = make_engine(load_model(tiny_models["llama"]))
    forms = [("snapkv", 0.1), ("rkv", 0.0), ("rkv", 1.0)]
    kept = set()
    for method, weight in forms:
        more = {"method": method, "redundancy_weight": weight}
        request = spec("r", 100, GREEDY, decode_budget=40, recompress_interval=1, **more)
        reservation = admit(engine, request, prompt(100))
        for _ in range(3):
            engine.step()
        layer = engine.pool.read_layer(reservation.rows[0], 0, torch.empty(0))
        assert layer.head_lengths in ((40, 40), (41, 41))
        kept.add(tuple(layer.positions.tolist()))
        engine.release(reservation)
    assert len(kept) == len(forms)


def test_the_last_queries_count_as_memory_of_their_request(tiny_models: dict[str, Path]) -> None:
    """A window is the client's choice, and may be larger than all KV."""
    engine = make_engine(load_model(tiny_models["llama"]), memory=2 << 20)
    page_bytes = 16 * engine.model.shape.kv_bytes(1)
    window_bytes = 4 * 4 * 256 * 16 * 4  # layers, heads, queries, their size, float32

    def wide(request_id: str, **more: object) -> GenerationSpec:
        return spec(request_id, 20, GREEDY, window_size=256, decode_floor=300, **more)

    wanted = replace(UNPRUNED, window_size=256)
    reservation = admit(engine, wide("wide"), prompt(20), wanted)
    stats = engine.stats().pool
    assert stats.kv_bytes_used >= window_bytes
    assert stats.pages_used <= stats.pages_reserved <= reservation.num_pages
    assert reservation.num_pages * page_bytes >= window_bytes + 36 * engine.model.shape.kv_bytes(8)
    with pytest.raises(Overloaded, match="KV pages"):
        for idx in range(8):
            engine.reserve(wide(str(idx)))
    with pytest.raises(InvalidSetting, match="KV pages; the worker has"):
        engine.reserve(wide("never", num_sequences=8))


def test_queries_that_are_not_recorded_change_nothing(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows shorter and longer than the interval."""
    answers = []
    sampling = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    for _ in range(2):
        engine = make_engine(load_model(tiny_models["qwen2"]))
        for window in (8, 12, 30):
            more = {"window_size": window, "decode_budget": 40, "recompress_interval": 12}
            admit(engine, spec(str(window), 50, sampling, **more), prompt(50, seed=window))
        answers.append({name: ids(tokens) for name, tokens in decode_all(engine).items()})
        monkeypatch.setattr(Sequence, "may_be_cut", lambda *_: True)
    assert answers[0] == answers[1]


def test_a_decode_budget_above_the_length_changes_nothing(tiny_models: dict[str, Path]) -> None:
    engine = make_engine(load_model(tiny_models["qwen3"]))
    token_ids = prompt(100)
    admit(engine, spec("plain", 100, GREEDY), token_ids)
    admit(engine, spec("budget", 100, GREEDY, decode_budget=500), token_ids)
    answers = decode_all(engine)
    assert answers["plain"] == answers["budget"]


def test_several_sequences_of_one_prompt_sample_with_their_own_seeds(
    tiny_models: dict[str, Path],
) -> None:
    engine = make_engine(load_model(tiny_models["llama"]))
    token_ids = prompt(50)
    sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True)
    admit(engine, spec("three", 50, sampling, num_sequences=3, decode_budget=40), token_ids)
    three = decode_all(engine)["three"]
    for idx in range(3):
        one = SamplingParams(max_tokens=12, temperature=1.0, seed=7 + idx, ignore_eos=True)
        admit(engine, spec("one", 50, one, decode_budget=40), token_ids)
        assert ids(three, idx) == ids(decode_all(engine)["one"])
    assert len({tuple(ids(three, idx)) for idx in range(3)}) == 3
    assert_empty(engine)


def test_refuses_at_once_what_does_not_fit_now_or_ever(tiny_models: dict[str, Path]) -> None:
    engine = make_engine(load_model(tiny_models["llama"]), rows=2, memory=4 << 20)
    total = engine.stats().pool.pages_total
    held = engine.reserve(spec("held", 1000, GREEDY))
    with pytest.raises(Overloaded, match=rf"KV pages; {total - held.num_pages:,} are free"):
        engine.reserve(spec("more", 3000, GREEDY))
    with pytest.raises(InvalidSetting, match=rf"KV pages; the worker has {total:,} in all"):
        engine.reserve(spec("never", 8000, GREEDY))
    engine.reserve(spec("second", 10, GREEDY))
    with pytest.raises(Overloaded, match="needs 1 places in the batch; 0 are free"):
        engine.reserve(spec("third", 10, GREEDY))
    with pytest.raises(InvalidSetting, match=r"n is 3; the allowed range is \[1, 2\]"):
        engine.reserve(spec("n", 10, GREEDY, num_sequences=3))


def test_release_frees_pages_at_every_stage(tiny_models: dict[str, Path]) -> None:
    model = load_model(tiny_models["llama"])
    engine = make_engine(model)
    token_ids = prompt(64)
    layers, result = prefill_all(model, token_ids, UNPRUNED)

    engine.release(engine.reserve(spec("reserved", 64, GREEDY)))
    assert_empty(engine)

    partly = engine.reserve(spec("partly", 64, GREEDY))
    partly.write_layer(layers[0])
    engine.release(partly)
    partly.write_layer(layers[1])  # a late frame takes nothing
    engine.start(partly, result.final_hidden, result.report.next_position)
    assert_empty(engine)

    running = admit(engine, spec("running", 64, GREEDY), token_ids)
    engine.step()
    engine.release(running)
    engine.release(running)
    assert engine.step() == []
    assert_empty(engine)


def test_a_release_between_the_start_and_the_batch_is_not_lost(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequences exist, but the engine has not been told; it steps meanwhile."""
    model = load_model(tiny_models["llama"])
    engine = make_engine(model)
    reservation = engine.reserve(spec("race", 20, GREEDY))
    layers, result = prefill_all(model, prompt(20), UNPRUNED)
    for layer in layers:
        reservation.write_layer(layer)
    begin = reservation.begin

    def begin_then_release(hidden: torch.Tensor, next_position: int) -> object:
        sequences = begin(hidden, next_position)
        engine.release(reservation)
        engine.step()
        return sequences

    monkeypatch.setattr(reservation, "begin", begin_then_release)
    engine.start(reservation, result.final_hidden, result.report.next_position)
    assert engine.step() == []
    assert_empty(engine)


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("part", ["_copy_first", "_resumed"])
def test_a_request_whose_start_fails_leaves_nothing_behind(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    engine = make_engine(load_model(tiny_models["llama"]), rows=2)
    reservation = engine.reserve(spec("two", 20, GREEDY, num_sequences=2, decode_budget=30))
    layers, result = prefill_all(engine.model, prompt(20), UNPRUNED)
    for layer in layers:
        reservation.write_layer(layer)
    monkeypatch.setattr(Reservation, part, out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        if part == "_copy_first":
            engine.start(reservation, result.final_hidden, 20)
        else:
            engine.resume(reservation, {1: SequenceState((), 20)}, result.final_hidden)
    assert_empty(engine)
    engine.release(reservation)
    assert not engine.step()
    engine.release(engine.reserve(spec("next", 20, GREEDY, num_sequences=2)))


def test_a_failure_to_free_ended_sequences_frees_those_that_would_go_on(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(load_model(tiny_models["llama"]), rows=2)
    reservation = engine.reserve(spec("two", 20, GREEDY, num_sequences=2))
    _, result = prefill_all(engine.model, prompt(20), UNPRUNED)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(KVPool, "clear", out_of_memory)
        engine.resume(reservation, {1: SequenceState((), 20)}, result.final_hidden)
    assert_empty(engine)
    engine.release(engine.reserve(spec("next", 20, GREEDY, num_sequences=2)))


def test_reset_lets_another_attempt_write_again(tiny_models: dict[str, Path]) -> None:
    model = load_model(tiny_models["llama"])
    engine = make_engine(model)
    token_ids = prompt(64)
    reservation = engine.reserve(spec("again", 64, GREEDY))
    wrong, _ = prefill_all(model, prompt(60, 9), UNPRUNED)
    reservation.write_layer(wrong[0])
    reservation.reset()
    assert engine.stats().pool.pages_used == 0
    layers, result = prefill_all(model, token_ids, UNPRUNED)
    for layer in layers:
        reservation.write_layer(layer)
    engine.start(reservation, result.final_hidden, result.report.next_position)
    network = reference.load(tiny_models["llama"])
    assert ids(decode_all(engine)["again"]) == reference.greedy(network, token_ids, 16)


def test_kv_that_is_not_finite_ends_in_an_error_and_frees_its_pages(
    tiny_models: dict[str, Path],
) -> None:
    model = load_model(tiny_models["llama"])
    engine = make_engine(model)
    token_ids = prompt(20)
    reservation = engine.reserve(spec("nan", 20, GREEDY))
    layers, result = prefill_all(model, token_ids, UNPRUNED)
    for layer in layers:
        reservation.write_layer(layer)
    engine.start(reservation, result.final_hidden * float("nan"), len(token_ids))
    admit(engine, spec("healthy", 20, GREEDY), token_ids)
    broken, healthy = sorted(engine.step(), key=lambda output: output.error is None)
    assert (broken.request_id, broken.finished, broken.tokens) == ("nan", True, ())
    assert "not finite" in str(broken.error)
    assert healthy.tokens
    decode_all(engine)
    assert_empty(engine)


def test_kv_that_is_not_finite_does_not_outlive_its_request(tiny_models: dict[str, Path]) -> None:
    model = load_model(tiny_models["llama"])
    engine = make_engine(model, rows=1, memory=1 << 20)
    token_ids = prompt(20)
    whole_pool = engine.reserve(spec("nan", 900, GREEDY))
    for layer_idx in range(4):
        nan = torch.full((2 * 900, 16), float("nan"))
        positions = torch.arange(900, dtype=torch.int32).repeat(2)
        queries = torch.empty(4, 0, 16)
        whole_pool.write_layer(LayerKV(layer_idx, nan, nan, positions, (900, 900), queries))
    assert engine.stats().pool.pages_used > 0.9 * engine.stats().pool.pages_total
    engine.release(whole_pool)
    admit(engine, spec("next", 20, GREEDY), token_ids)
    expected = reference.greedy(reference.load(tiny_models["llama"]), token_ids, 16)
    assert ids(decode_all(engine)["next"]) == expected


def test_a_thread_that_waits_for_work_wakes_when_a_sequence_starts(
    tiny_models: dict[str, Path],
) -> None:
    engine = make_engine(load_model(tiny_models["llama"]))
    assert not engine.wait_for_work(0)
    woken: list[bool] = []
    waiter = threading.Thread(target=lambda: woken.append(engine.wait_for_work(30)))
    waiter.start()
    admit(engine, spec("work", 8, GREEDY), prompt(8))
    waiter.join(30)
    assert woken == [True]


def test_writes_of_one_request_never_touch_another(tiny_models: dict[str, Path]) -> None:
    """Threads write, read back and free rows at once; every row holds its own bytes."""
    engine = make_engine(load_model(tiny_models["llama"]), rows=8)
    failures: list[str] = []

    def churn(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for turn in range(20):
            reservation = engine.reserve(spec(f"{seed}-{turn}", 100, GREEDY))
            for layer_idx in range(4):
                layer = _random_layer(layer_idx, generator)
                reservation.write_layer(layer)
                back = engine.pool.read_layer(reservation.rows[0], layer_idx, layer.window_queries)
                if not (
                    torch.equal(back.keys, layer.keys) and torch.equal(back.values, layer.values)
                ):
                    failures.append(f"{seed} {turn} {layer_idx}")
            engine.release(reservation)

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert_empty(engine)


def _random_layer(layer_idx: int, generator: torch.Generator) -> LayerKV:
    lengths = tuple(torch.randint(0, 100, (2,), generator=generator).tolist())
    total = sum(lengths)
    return LayerKV(
        layer_idx=layer_idx,
        keys=torch.randn(total, 16, generator=generator),
        values=torch.randn(total, 16, generator=generator),
        positions=torch.arange(total, dtype=torch.int32),
        head_lengths=lengths,
        window_queries=torch.empty(4, 0, 16),
    )
