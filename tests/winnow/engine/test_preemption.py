"""What gives way when promises exceed the pool and sequences really grow."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.winnow import drive, reference
from tests.winnow.drive import (
    UNPRUNED,
    admit,
    assert_empty,
    ids,
    make_engine,
    prefill_all,
    prompt,
    spec,
)
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.sequence import Reservation
from winnow.errors import Overloaded, Preempted
from winnow.kv import LayerKV, SequenceState
from winnow.models import load_model
from winnow.sampling_params import SamplingParams
from winnow.tokens import Token

LONG = SamplingParams(max_tokens=160, temperature=0, ignore_eos=True)
PROMPT_TOKENS = 40


Moved = tuple[SequenceState, list[LayerKV]]


def require_backed(engine: DecodeEngine) -> None:
    """What is kept for rows is there, and covers what they hold."""
    pool = engine.pool
    promises = engine.scheduler._memory._promises._by_row
    kept = {row: promise.sure for row, promise in promises.items()}
    assert sum(kept.values()) <= pool.num_pages
    held = -(-pool.lengths(list(kept)) // pool.page_size) if kept else None
    for row_idx, row in enumerate(kept):
        assert held is not None and int(held[row_idx].sum()) <= kept[row]


def decode_all(engine: DecodeEngine) -> dict[str, list[Token]]:
    """As drive.decode_all; every page stays accounted for."""
    return drive.decode_all(engine, after_step=require_backed)


@pytest.fixture
def model(tiny_models: dict[str, Path]) -> DecoderModel:
    return load_model(tiny_models["qwen2"])


def tight_engine(
    model: DecoderModel, num_sequences: float, swap_bytes: int = 1 << 30, **more: object
) -> DecodeEngine:
    """Memory for so many of the sequences below at their longest, promised to four."""
    return make_engine(
        model,
        memory=memory_for(model, spec("", PROMPT_TOKENS, LONG, **more), num_sequences),
        overcommit=4 / num_sequences + 0.01,
        swap_bytes=swap_bytes,
    )


def memory_for(model: DecoderModel, request: GenerationSpec, times: float) -> int:
    shape = model.shape
    num_pages = shape.num_layers * shape.num_kv_heads * -(-request.max_entries // 16)
    if request.recompression.observes:
        window_size = request.recompression.window_size
        num_pages += -(-shape.num_layers * shape.num_heads * window_size // 32)
    return int((times * num_pages + 1) * 16 * (shape.kv_bytes(1) + 4))


def admit_four(engine: DecodeEngine, **more: object) -> dict[str, list[int]]:
    prompts = {str(seed): prompt(PROMPT_TOKENS, seed) for seed in range(4)}
    for name, token_ids in prompts.items():
        admit(engine, spec(name, PROMPT_TOKENS, LONG, **more), token_ids)
    return prompts


@pytest.mark.parametrize("num_sequences", [1.3, 1.5, 2.3])
def test_sequences_that_had_to_wait_get_their_own_tokens_all_the_same(
    model: DecoderModel, tiny_models: dict[str, Path], num_sequences: float
) -> None:
    engine = tight_engine(model, num_sequences)
    prompts = admit_four(engine)
    answers = decode_all(engine)
    network = reference.load(tiny_models["qwen2"])
    for name, token_ids in prompts.items():
        assert ids(answers[name]) == reference.greedy(network, token_ids, LONG.max_tokens), name
    assert engine.preemption_stats.swapped_out >= 2
    assert engine.preemption_stats.given_up == 0
    assert_empty(engine)


def test_the_youngest_waits_and_the_oldest_never_does(model: DecoderModel) -> None:
    engine = tight_engine(model, 1.5)
    admit_four(engine)
    ended = []
    while engine.stats().running_sequences:
        outputs = engine.step()
        if engine.stats().swapped_sequences and "0" not in ended:
            assert "0" in {output.request_id for output in outputs}
        ended += [output.request_id for output in outputs if output.finished]
    assert ended == ["0", "1", "2", "3"]


def test_the_oldest_does_not_wait_for_kv_that_is_on_the_way(model: DecoderModel) -> None:
    engine = tight_engine(model, 1.5, swap_bytes=0)
    admit(engine, spec("old", PROMPT_TOKENS, LONG), prompt(PROMPT_TOKENS))
    for _ in range(15):
        engine.step()
    reserved = 0
    with pytest.raises(Overloaded, match="too few would be left"):
        while True:
            engine.reserve(spec(f"young {reserved}", PROMPT_TOKENS, LONG))
            reserved += 1
    assert reserved == 2
    assert len(ids(decode_all(engine)["old"])) == LONG.max_tokens - 15


def test_a_request_is_as_old_as_its_reservation_not_as_its_kv(model: DecoderModel) -> None:
    engine = tight_engine(model, 1.5)
    old = engine.reserve(spec("old", PROMPT_TOKENS, LONG))  # its prefill takes long
    admit(engine, spec("young", PROMPT_TOKENS, LONG), prompt(PROMPT_TOKENS, 2))
    engine.step()
    layers, result = prefill_all(model, prompt(PROMPT_TOKENS, 1), UNPRUNED)
    write(old, layers)
    engine.start(old, result.final_hidden, result.report.next_position)
    while not engine.stats().swapped_sequences:
        ran = {output.request_id for output in engine.step()}
    assert ran == {"old"}
    assert decode_all(engine).keys() == {"old", "young"}


def test_nothing_new_is_let_in_before_those_who_wait(model: DecoderModel) -> None:
    engine = tight_engine(model, 1.5)
    admit_four(engine)
    while not engine.stats().swapped_sequences:
        engine.step()
    with pytest.raises(Overloaded, match="wait for KV memory already"):
        engine.reserve(spec("new", 1, replace(LONG, max_tokens=1)))
    decode_all(engine)
    engine.release(engine.reserve(spec("new", 1, LONG)))
    assert_empty(engine)


def test_who_waits_keeps_the_queries_that_its_next_cut_is_judged_by(model: DecoderModel) -> None:
    cut = {"decode_budget": 100, "recompress_interval": 16}
    engines = [make_engine(model), tight_engine(model, 1.8, **cut)]
    for engine in engines:
        admit_four(engine, **cut)
    expected, got = map(decode_all, engines)
    assert {name: ids(own) for name, own in got.items()} == {
        name: ids(own) for name, own in expected.items()
    }
    assert engines[1].preemption_stats.swapped_out
    for engine in engines:
        assert_empty(engine)


def test_without_host_memory_the_youngest_is_given_up_and_the_rest_go_on(
    model: DecoderModel,
) -> None:
    engine = tight_engine(model, 2.3, swap_bytes=0)
    prompts = admit_four(engine)
    errors = {}
    ended = set()
    while engine.stats().running_sequences:
        for output in engine.step():
            if output.error is not None:
                errors[output.request_id] = output.error
            if output.finished:
                ended.add(output.request_id)
    assert ended == prompts.keys()
    assert errors.keys() == {"2", "3"}
    assert all(isinstance(error, Preempted) for error in errors.values())
    assert engine.preemption_stats.given_up == 2
    assert_empty(engine)


def test_who_has_its_memory_assured_never_gives_way(model: DecoderModel) -> None:
    engine = tight_engine(model, 2.3, swap_bytes=0)
    admit(engine, spec("old", PROMPT_TOKENS, LONG), prompt(PROMPT_TOKENS, 1))
    admit(engine, spec("other", PROMPT_TOKENS, LONG), prompt(PROMPT_TOKENS, 2))
    admit(engine, spec("young", PROMPT_TOKENS, LONG, assured=True), prompt(PROMPT_TOKENS, 3))
    failed = set()
    while engine.stats().running_sequences:
        failed |= {output.request_id for output in engine.step() if output.error}
    assert failed == {"other"}
    assert_empty(engine)


def test_one_of_several_answers_may_wait_while_the_others_end(model: DecoderModel) -> None:
    engine = tight_engine(model, 2.3)
    alone = make_engine(model)
    for each in (engine, alone):
        admit(each, spec("n", PROMPT_TOKENS, LONG, num_sequences=2), prompt(PROMPT_TOKENS, 1))
        admit(each, spec("m", PROMPT_TOKENS, LONG, num_sequences=2), prompt(PROMPT_TOKENS, 2))
    expected, got = decode_all(alone), decode_all(engine)
    for name in ("n", "m"):
        for idx in range(2):
            assert ids(got[name], idx) == ids(expected[name], idx)
    assert engine.preemption_stats.swapped_out
    assert_empty(engine)


def test_who_leaves_while_it_waits_takes_its_memory_along(model: DecoderModel) -> None:
    engine = tight_engine(model, 1.5)
    admit(engine, spec("stays", PROMPT_TOKENS, LONG), prompt(PROMPT_TOKENS))
    goes = admit(engine, spec("goes", PROMPT_TOKENS, LONG), prompt(PROMPT_TOKENS))
    while not engine.stats().swapped_sequences:
        engine.step()
    engine.release(goes)
    engine.step()
    assert engine.stats().swapped_bytes == 0
    assert len(ids(decode_all(engine)["stays"])) > 10
    assert_empty(engine)


def test_sequences_with_a_floor_shrink_before_any_has_to_wait(model: DecoderModel) -> None:
    frugal = {"decode_floor": 32, "recompress_interval": 16}
    engine = tight_engine(model, 2.3, **frugal)
    admit_four(engine, **frugal)
    answers = decode_all(engine)
    assert all(len(tokens) == LONG.max_tokens for tokens in answers.values())
    counts = engine.preemption_stats
    assert counts.shrunk >= 2
    assert counts.swapped_out == 0
    assert_empty(engine)


def test_a_floor_changes_nothing_while_there_is_memory(
    model: DecoderModel, tiny_models: dict[str, Path]
) -> None:
    engine = make_engine(model)
    prompts = admit_four(engine, decode_floor=32)
    answers = decode_all(engine)
    network = reference.load(tiny_models["qwen2"])
    for name, token_ids in prompts.items():
        assert ids(answers[name]) == reference.greedy(network, token_ids, LONG.max_tokens)
    assert engine.preemption_stats.shrunk == engine.recompression_stats.recompressions == 0


def test_sequences_shrink_for_a_request_that_would_be_refused(model: DecoderModel) -> None:
    big = spec("big", PROMPT_TOKENS, replace(LONG, max_tokens=3000))
    engine = make_engine(model, memory=memory_for(model, big, 1.5))
    frugal = replace(big.recompression, decode_floor=32, recompress_interval=16)
    admit(engine, replace(big, recompression=frugal), prompt(PROMPT_TOKENS))
    for _ in range(20):
        engine.step()
    other = replace(big, request_id="other")
    with pytest.raises(Overloaded, match="pages"):
        engine.reserve(other)
    made: list[bool] = []
    assert engine.request_room(other, lambda: made.append(True))
    engine.step()
    assert made == [True]
    engine.release(engine.reserve(other))
    assert not engine.request_room(other, lambda: made.append(True))  # nobody can give more


def test_nobody_shrinks_for_a_request_that_would_not_fit_all_the_same(model: DecoderModel) -> None:
    small = spec("small", PROMPT_TOKENS, LONG, decode_floor=32, recompress_interval=16)
    large = spec("large", PROMPT_TOKENS, replace(LONG, max_tokens=3000))
    engine = make_engine(model, memory=memory_for(model, large, 1.0))
    kept = admit(
        engine,
        replace(large, request_id="kept", max_prompt_entries=PROMPT_TOKENS),
        prompt(PROMPT_TOKENS),
    )
    engine.step()
    engine.release(kept)
    engine.step()
    admit(
        engine,
        replace(large, request_id="other", sampling=replace(LONG, max_tokens=2000)),
        prompt(PROMPT_TOKENS),
    )
    admit(engine, small, prompt(PROMPT_TOKENS))
    for _ in range(10):
        engine.step()
    made: list[bool] = []
    assert engine.request_room(large, lambda: made.append(True))
    engine.step()
    assert made == [True]
    assert engine.preemption_stats.shrunk == 0


def test_who_has_its_memory_assured_does_not_shrink_for_others(model: DecoderModel) -> None:
    big = spec("big", PROMPT_TOKENS, LONG, decode_floor=32, recompress_interval=16, assured=True)
    engine = make_engine(model, memory=memory_for(model, big, 1.5), overcommit=2)
    admit(engine, big, prompt(PROMPT_TOKENS))
    for _ in range(20):
        engine.step()
    with pytest.raises(Overloaded):
        engine.reserve(replace(big, request_id="other"))
    assert not engine.request_room(replace(big, request_id="other"), lambda: None)
    engine.step()
    assert engine.preemption_stats.shrunk == 0


def running_at(engine: DecodeEngine, request: GenerationSpec, num_steps: int) -> Moved:
    """What a request holds after some steps, taken out of another engine."""
    reservation = admit(engine, request, prompt(request.num_prompt_tokens))
    for _ in range(num_steps):
        engine.step()
    taken = threading.Thread(target=lambda: result.append(take(engine, reservation)))
    result: list[Moved] = []
    taken.start()
    while not engine.scheduler.is_moving(reservation):
        pass
    while taken.is_alive():
        engine.step()
    return result[0]


def take(engine: DecodeEngine, reservation: Reservation) -> Moved:
    with engine.taken_out(reservation, 20) as (seq,):
        layers = range(engine.model.shape.num_layers)
        return seq.state(), [seq.read_layer(engine.pool, layer_idx) for layer_idx in layers]


def write(reservation: Reservation, layers: list[LayerKV]) -> None:
    for layer in layers:
        reservation.write_layer(layer)


def test_a_request_that_moves_in_takes_no_page_that_others_were_promised(
    model: DecoderModel,
) -> None:
    """It holds more than its prompt, and arrives while others do."""
    moving = spec("moved", 4, replace(LONG, max_tokens=64), decode_floor=16)
    state, layers = running_at(make_engine(model), moving, 50)
    engine = make_engine(model, memory=memory_for(model, moving, 2.0), overcommit=4)
    moved = engine.reserve(replace(moving, moved=True))
    others = []
    with pytest.raises(Overloaded):
        for name in "abcdef":
            others.append(engine.reserve(spec(name, 16, replace(LONG, max_tokens=40))))
    write(moved, layers)
    require_backed(engine)
    arriving, result = prefill_all(model, prompt(16), UNPRUNED)
    for other in others:
        write(other, arriving)
    require_backed(engine)
    engine.resume(moved, {0: state}, result.final_hidden)
    for other in others:
        engine.release(other)
    assert len(ids(decode_all(engine)["moved"])) == 64 - len(state.token_ids)
    assert_empty(engine)


def test_what_a_worker_has_just_taken_over_can_give_way_before_it_has_done_a_step(
    model: DecoderModel,
) -> None:
    moving = spec("moved", PROMPT_TOKENS, LONG, decode_floor=16)
    state, layers = running_at(make_engine(model), moving, 57)  # its pages are full
    engine = make_engine(
        model, memory=memory_for(model, moving, 2.0), overcommit=4, swap_bytes=1 << 30
    )
    for name in ("older", "younger"):
        moved = engine.reserve(replace(moving, request_id=name, moved=True))
        write(moved, layers)
        engine.resume(moved, {0: state}, torch.zeros(model.shape.hidden_size))
    filler = engine.reserve(spec("filler", 200, replace(LONG, max_tokens=1)))
    engine.step()
    require_backed(engine)
    assert engine.preemption_stats.swapped_out == 1
    engine.release(filler)
    assert decode_all(engine).keys() == {"older", "younger"}
    assert_empty(engine)


def test_a_request_can_be_taken_out_while_it_is_still_being_started(model: DecoderModel) -> None:
    engine = make_engine(model)
    reservation = engine.reserve(spec("early", PROMPT_TOKENS, LONG))
    layers, result = prefill_all(model, prompt(PROMPT_TOKENS), UNPRUNED)
    write(reservation, layers)
    with ThreadPoolExecutor(1) as thread:
        taking = thread.submit(take, engine, reservation)
        while not engine.scheduler.is_moving(reservation):
            pass
        engine.start(reservation, result.final_hidden, result.report.next_position)
        engine.step()
        state, _ = taking.result()
    assert state.token_ids == ()
    assert_empty(engine)


def test_a_request_that_ends_while_it_is_started_and_taken_out_leaves_nothing_behind(
    model: DecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model)
    reservation = engine.reserve(spec("early", PROMPT_TOKENS, LONG))
    layers, result = prefill_all(model, prompt(PROMPT_TOKENS), UNPRUNED)
    write(reservation, layers)
    begin = reservation.begin

    def begin_then_take(hidden: torch.Tensor, next_position: int) -> object:
        sequences = begin(hidden, next_position)
        engine.release(reservation)
        with engine.taken_out(reservation, 20) as taken:
            assert taken == []
        return sequences

    monkeypatch.setattr(reservation, "begin", begin_then_take)
    engine.start(reservation, result.final_hidden, result.report.next_position)
    assert engine.step() == []
    assert_empty(engine)
