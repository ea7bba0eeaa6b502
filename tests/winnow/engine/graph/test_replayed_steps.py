"""Steps that are replayed and read one step late give what steps launched one by one give."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.winnow.drive import (
    GREEDY,
    UNPRUNED,
    admit,
    assert_empty,
    make_engine,
    prefill_all,
    prompt,
    spec,
)
from tests.winnow.eager_recorder import EagerRecorder
from tests.winnow.events import Answers, Events, joining, moved, nothing, run
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.outputs import StepOutput
from winnow.engine.sequence import Reservation
from winnow.errors import NotFinite
from winnow.kv import SequenceState
from winnow.models import load_model
from winnow.sampling import SampledBatch
from winnow.sampling_params import SamplingParams
from winnow.tokens import FinishReason, Token

SAMPLED = SamplingParams(max_tokens=20, temperature=0.9, seed=7, ignore_eos=True)
EIGHT_TOKENS = replace(GREEDY, max_tokens=8)


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> DecoderModel:
    return load_model(tiny_models["llama"])


def recorded(model: DecoderModel, **more: Any) -> DecodeEngine:
    engine = make_engine(model, rows=11, new_recorder=EagerRecorder, **more)
    assert engine._runner.reads_late
    return engine


def dies(*_: object) -> None:
    raise RuntimeError("CUDA error")


def require_equal(model: DecoderModel, events: Events) -> Answers:
    """The answers; log-probabilities differ in their last bits, by the padding of the batch."""
    expected = run(make_engine(model, rows=11), events)
    answers = run(recorded(model), events)
    assert {name: without_logprobs(own) for name, own in answers.items()} == {
        name: without_logprobs(own) for name, own in expected.items()
    }
    for name, (tokens, _) in answers.items():
        pairs = zip(tokens, expected[name][0], strict=True)
        for one, other in ((a.logprobs, b.logprobs) for a, b in pairs if a.logprobs):
            assert other is not None
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-4)
    return expected


def without_logprobs(answer: tuple[list[Token], int]) -> tuple[list[Token], int]:
    return [replace(token, logprobs=None) for token in answer[0]], answer[1]


def test_requests_of_every_kind_join_and_end_at_different_steps(model: DecoderModel) -> None:
    penalties = replace(SAMPLED, presence_penalty=0.7, repetition_penalty=1.2, num_logprobs=2)
    answers = require_equal(
        model,
        {
            0: joining("greedy", 40, GREEDY),
            2: joining("sampled", 17, replace(SAMPLED, top_p=0.9), num_sequences=3),
            3: joining("filtered", 5, replace(SAMPLED, top_k=20, min_p=0.01, num_logprobs=3)),
            5: joining("biased", 33, replace(SAMPLED, logit_bias={3: 4.0}, min_tokens=9)),
            9: joining("penalized", 64, penalties, num_sequences=2),
            30: joining("last", 100, replace(GREEDY, max_tokens=1)),
        },
    )
    assert len(answers) == 6


def test_an_end_that_no_count_foretells_costs_nothing_that_is_seen(model: DecoderModel) -> None:
    """Its next step has begun when it is read: KV of freed pages must not be written after."""
    cut = {"decode_budget": 16, "recompress_interval": 2}
    free = run(make_engine(model), {0: joining("b", 20, SAMPLED, **cut)})["b"][0]
    stopping = replace(SAMPLED, stop_token_ids=frozenset({free[7].token_id}), min_tokens=3)
    answers = require_equal(
        model,
        {
            0: joining("a", 30, stopping, num_sequences=2, decode_budget=20, recompress_interval=1),
            1: joining("b", 20, stopping, **cut),
            2: joining("others", 40, SAMPLED, num_sequences=4),
            12: joining("in its row", 50, SAMPLED, num_sequences=3),
        },
    )
    reasons = [token.finish_reason for token in answers["b"][0]]
    assert reasons[-1] is FinishReason.STOP
    assert 3 < len(reasons) <= 8
    assert answers["a"][1] > 0


@pytest.mark.parametrize("method", ["snapkv", "rkv"])
def test_recompression_drops_the_same_entries_at_the_same_steps(
    model: DecoderModel, method: str
) -> None:
    own = {"decode_budget": 30, "recompress_interval": 4, "method": method}
    answers = require_equal(
        model,
        {
            0: joining("long", 100, replace(GREEDY, max_tokens=30), **own),
            3: joining("short", 25, SAMPLED, num_sequences=2, **own),
        },
    )
    assert all(dropped > 0 for _, dropped in answers.values())


def test_a_cancelled_request_says_no_more_and_the_others_go_on(model: DecoderModel) -> None:
    cancelled: list[Reservation] = []

    def cancel(engine: DecodeEngine) -> None:
        engine.release(cancelled.pop())

    def join_briefly(engine: DecodeEngine) -> None:
        cancelled.append(joining("leaves", 60, SAMPLED, num_sequences=2)(engine))

    events: Events = {
        0: joining("stays", 40, SAMPLED),
        1: join_briefly,
        6: cancel,
        8: joining("takes its rows", 20, SAMPLED, num_sequences=4),
    }
    answers = require_equal(model, events)
    assert answers.keys() == {"stays", "takes its rows"}


def test_sequences_that_had_to_wait_get_their_own_tokens(model: DecoderModel) -> None:
    long = replace(SAMPLED, max_tokens=120)
    events: Events = {0: lambda engine: [joining(str(n), 40 + n, long)(engine) for n in range(4)]}
    expected = run(make_engine(model), events)
    page_bytes = 16 * (model.shape.kv_bytes(1) + 4)
    heads = model.shape.num_layers * model.shape.num_kv_heads
    memory = int(1.5 * heads * 11 * page_bytes)
    engine = recorded(model, memory=memory, overcommit=3.5, swap_bytes=1 << 30)
    assert run(engine, events) == expected
    assert engine.preemption_stats.swapped_out >= 2


def test_who_is_given_up_ends_once_and_the_others_go_on(model: DecoderModel) -> None:
    heads = model.shape.num_layers * model.shape.num_kv_heads
    memory = int(2.3 * heads * 11 * 16 * (model.shape.kv_bytes(1) + 4))
    engine = recorded(model, memory=memory, overcommit=2)
    for name in range(3):
        long = replace(SAMPLED, max_tokens=120)
        admit(engine, spec(str(name), 40, long), prompt(40, name))
    finished = []
    while engine.stats().running_sequences:
        finished += [(o.request_id, o.error is None) for o in engine.step() if o.finished]
    assert sorted(finished) == [("0", True), ("1", True), ("2", False)]
    assert_empty(engine)


@pytest.mark.parametrize("decode_budget", [None, 24])
def test_a_request_that_moves_goes_on_with_the_token_after_its_last(
    model: DecoderModel, decode_budget: int | None
) -> None:
    own = {"decode_budget": decode_budget, "recompress_interval": 4}
    request = spec("moves", 40, replace(SAMPLED, presence_penalty=0.5), **own)
    alone = run(make_engine(model), {0: lambda e: admit(e, request, prompt(40))})["moves"][0]
    for first, second in ((recorded, make_engine), (make_engine, recorded)):
        engine = first(model)
        said, state, layers = moved(engine, request, 7)
        assert [token.token_id for token in said] == list(state.token_ids)
        assert_empty(engine)
        engine = second(model)
        reservation = engine.reserve(replace(request, moved=True))
        for layer in layers:
            reservation.write_layer(layer)
        hidden = prefill_all(model, prompt(40), UNPRUNED)[1].final_hidden
        engine.resume(reservation, {0: state}, hidden)
        rest = run(engine, {0: joining("joins", 17, SAMPLED)})["moves"][0]
        assert said + rest == alone


@pytest.mark.parametrize("num_done", [1, 9])
def test_replayed_tokens_are_fed_and_not_said_again(model: DecoderModel, num_done: int) -> None:
    request = spec("lost", 40, SAMPLED, num_sequences=2, decode_budget=30, recompress_interval=4)
    whole = run(make_engine(model), {0: lambda e: admit(e, request, prompt(40))})["lost"][0]
    told = [[t.token_id for t in whole if t.sequence_idx == idx] for idx in range(2)]
    again = replace(request, replayed=(tuple(told[0][:num_done]), tuple(told[1][: num_done + 2])))
    answers = run(
        recorded(model),
        {0: lambda e: admit(e, again, prompt(40)), 4: joining("joins", 20, GREEDY)},
    )
    rest = [[t.token_id for t in answers["lost"][0] if t.sequence_idx == i] for i in range(2)]
    assert rest == [told[0][num_done:], told[1][num_done + 2 :]]


def test_numbers_that_are_not_finite_end_one_request_alone(model: DecoderModel) -> None:
    engine = recorded(model)
    layers, result = prefill_all(model, prompt(20), UNPRUNED)
    broken = engine.reserve(spec("nan", 20, GREEDY))
    for layer in layers:
        broken.write_layer(replace(layer, values=layer.values * float("nan")))
    engine.start(broken, result.final_hidden, 20)
    admit(engine, spec("healthy", 20, GREEDY), prompt(20))
    errors: list[tuple[str, object]] = []
    tokens: list[Token] = []
    while engine.stats().running_sequences:
        for output in engine.step():
            errors += [(output.request_id, output.error)] if output.error else []
            tokens += output.tokens if output.request_id == "healthy" else []
    ((request_id, error),) = errors
    assert (request_id, type(error)) == ("nan", NotFinite)
    healthy = run(make_engine(model), {0: lambda e: admit(e, spec("h", 20, GREEDY), prompt(20))})
    assert tokens == healthy["h"][0]
    assert_empty(engine)


def test_a_step_begins_before_the_last_one_is_read(model: DecoderModel) -> None:
    recorder = EagerRecorder()
    engine = make_engine(model, rows=11, new_recorder=lambda: recorder)
    admit(engine, spec("r", 20, EIGHT_TOKENS), prompt(20))
    counts = [sum(len(output.tokens) for output in engine.step()) for _ in range(9)]
    assert counts == [0, *[1] * 8]
    assert_empty(engine)  # and the ninth step began nothing more
    of_one_row = recorder.recordings[-1]
    assert of_one_row.replays == 2 + 7  # it was tried twice; a first token takes no layer


def test_first_tokens_alone_are_read_at_once(model: DecoderModel) -> None:
    engine = recorded(model)
    admit(engine, spec("running", 20, EIGHT_TOKENS), prompt(20))
    engine.step()
    engine.step()
    admit(engine, spec("new", 30, EIGHT_TOKENS), prompt(30))
    for name in ("running", "new"):  # what was launched before is read first
        outputs = engine.step_first()
        assert [(o.request_id, len(o.tokens)) for o in outputs] == [(name, 1)]
    run(engine, {0: nothing})


@pytest.mark.parametrize("step", [DecodeEngine.step, DecodeEngine.step_first])
def test_a_request_leaves_only_when_its_last_token_has_been_given_out(
    model: DecoderModel, step: Callable[[DecodeEngine], list[StepOutput]]
) -> None:
    engine = recorded(model)
    admit(engine, spec("stays", 20, SAMPLED), prompt(20))
    leaving = admit(engine, spec("leaves", 30, SAMPLED), prompt(30))
    said = [output for _ in range(3) for output in engine.step()]
    taken: list[SequenceState] = []

    def take() -> None:
        with engine.taken_out(leaving, 20) as sequences:
            taken.extend(seq.state() for seq in sequences)

    taking = threading.Thread(target=take)
    taking.start()
    while not engine.scheduler.is_moving(leaving):
        pass
    said += step(engine)
    assert engine.stats().running_sequences == 2
    assert not taken
    others = step(engine)
    taking.join()
    assert "leaves" not in {output.request_id for output in others}
    (state,) = taken
    tokens = [token for output in said if output.request_id == "leaves" for token in output.tokens]
    assert [token.token_id for token in tokens] == list(state.token_ids)
    assert len(tokens) == 3


def test_a_last_token_that_was_read_is_given_out_though_the_next_step_has_no_schedule(
    model: DecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = recorded(model)
    admit(engine, spec("ends", 20, replace(SAMPLED, max_tokens=2)), prompt(20))
    leaving = admit(engine, spec("leaves", 20, SAMPLED), prompt(20))
    engine.step()
    engine.step()
    engine.release(leaving)
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler, "schedule", dies)
        (output,) = engine.step()
        assert (output.request_id, output.finished) == ("ends", True)
        with pytest.raises(RuntimeError, match="CUDA error"):
            engine.step()
    engine.step()
    assert_empty(engine)


@pytest.mark.parametrize("also_unread", [False, True])
def test_a_device_that_fails_ends_every_request_once(
    model: DecoderModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    also_unread: bool,
) -> None:
    """also_unread: the step before it fails as well, of the same error."""
    engine = recorded(model)
    for name in ("a", "b"):
        admit(engine, spec(name, 20, GREEDY), prompt(20))
    engine.step()
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr("winnow.engine.runner.sample_batch", dies)
        if also_unread:
            patch.setattr(SampledBatch, "read", dies)
        outputs = engine.step()
    failed = [output.request_id for output in outputs if output.error]
    assert sorted(failed) == ["a", "b"]
    assert engine.num_failures == len(caplog.records) == 1
    assert_empty(engine)
    assert run(engine, {0: joining("next", 20, EIGHT_TOKENS)})
    assert engine.num_failures == 0
