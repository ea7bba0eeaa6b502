"""Answers keep to their grammar, however their tokens are computed, and others do not notice."""

import json
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.models_in_code import VOCAB_SIZE
from tests.winnow.drive import (
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
from tests.winnow.eager_recorder import EagerRecorder
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.generation_spec import GenerationSpec
from winnow.errors import GrammarFailed, InvalidSetting
from winnow.grammar import Grammar
from winnow.grammar.compiler import GrammarCompiler
from winnow.grammar.constraint import CompiledGrammar
from winnow.grammar.source import schema_grammar
from winnow.kv import LayerKV, SequenceState
from winnow.models import load_model
from winnow.sampling_params import SamplingParams
from winnow.tokenizer import Tokenizer, load_tokenizer
from winnow.tokens import FinishReason, Token

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 500},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}
GREEDY = SamplingParams(max_tokens=80, temperature=0)
SAMPLED = SamplingParams(max_tokens=80, temperature=1.0, seed=5)
PENALIZED = replace(
    SAMPLED, presence_penalty=0.7, repetition_penalty=1.2, num_logprobs=2, logit_bias={9: 3.0}
)
END = 0


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> DecoderModel:
    return load_model(tiny_models["llama"])


@pytest.fixture(scope="module")
def tokenizer(tiny_models: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(tiny_models["llama"])


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, frozenset({END}))
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def grammar(compiler: GrammarCompiler) -> CompiledGrammar:
    return compiler.compile(schema_grammar(SCHEMA))


@pytest.fixture(params=["launched", "recorded"])
def engine(model: DecoderModel, request: pytest.FixtureRequest) -> Iterator[DecodeEngine]:
    """One that launches kernel by kernel, and one that replays steps and reads them late."""
    recorder = EagerRecorder if request.param == "recorded" else None
    engine = make_engine(model, rows=8, new_recorder=recorder)
    yield engine
    assert_empty(engine)
    engine.close()


def answer(engine: DecodeEngine, request: GenerationSpec, sequence_idx: int = 0) -> list[int]:
    admit(engine, request, prompt(request.num_prompt_tokens))
    return ids(decode_all(engine)[request.request_id], sequence_idx)


def require_valid(tokenizer: Tokenizer, tokens: Sequence[int]) -> None:
    assert tokens[-1] == END
    value = json.loads(tokenizer.decode(tokens[:-1]))
    assert list(value) == ["name", "size"]
    assert len(value["name"]) <= 8
    assert 0 <= value["size"] <= 500


def test_every_answer_of_a_mixed_batch_is_json_of_the_schema(
    engine: DecodeEngine, tokenizer: Tokenizer, grammar: CompiledGrammar
) -> None:
    own: dict[str, dict[str, Any]] = {
        "greedy": {"sampling": GREEDY},
        "three": {"sampling": SAMPLED, "num_sequences": 3},
        "penalized": {"sampling": PENALIZED, "num_sequences": 2},
    }
    free = spec("free", 40, replace(SAMPLED, top_p=0.9, ignore_eos=True, max_tokens=30))
    expected = answer(engine, free)
    for name, more in own.items():
        admit(engine, spec(name, 30, grammar=grammar, **more), prompt(30))
    admit(engine, free, prompt(40))
    tokens = decode_all(engine)
    assert ids(tokens["free"]) == expected
    for name, more in own.items():
        answers = [ids(tokens[name], idx) for idx in range(more.get("num_sequences", 1))]
        assert len({tuple(one) for one in answers}) == len(answers)
        for one in answers:
            require_valid(tokenizer, one)
    assert all(token.logprobs for token in tokens["penalized"])


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALIZED])
def test_steps_that_are_read_late_give_the_same_answer(
    model: DecoderModel, grammar: CompiledGrammar, sampling: SamplingParams
) -> None:
    engines = [make_engine(model), make_engine(model, new_recorder=EagerRecorder)]
    request = spec(
        "r", 40, sampling, num_sequences=2, grammar=grammar, prompt_token_ids=tuple(prompt(40))
    )
    answers = []
    for engine in engines:
        admit(engine, request, prompt(40))
        tokens = decode_all(engine)["r"]
        answers.append([ids(tokens, 0), ids(tokens, 1)])
        engine.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("num_done", [1, 5, 12])
def test_goes_on_where_a_lost_worker_was(
    engine: DecodeEngine, grammar: CompiledGrammar, num_done: int
) -> None:
    request = spec("r", 40, SAMPLED, num_sequences=2, grammar=grammar)
    admit(engine, request, prompt(40))
    tokens = decode_all(engine)["r"]
    whole = [ids(tokens, 0), ids(tokens, 1)]
    done = (tuple(whole[0][:num_done]), tuple(whole[1][: num_done + 1]))
    admit(engine, replace(request, replayed=done), prompt(40))
    rest = decode_all(engine)["r"]
    assert [ids(rest, 0), ids(rest, 1)] == [whole[0][num_done:], whole[1][num_done + 1 :]]


def test_goes_on_where_another_worker_gave_it_away(
    engine: DecodeEngine, model: DecoderModel, grammar: CompiledGrammar
) -> None:
    request = spec("r", 40, SAMPLED, grammar=grammar)
    whole = answer(engine, request)
    reservation = admit(engine, request, prompt(40))
    said = [t for _ in range(4) for output in engine.step() for t in output.tokens]
    taken: list[tuple[SequenceState, list[LayerKV]]] = []

    def take() -> None:
        with engine.taken_out(reservation, 20) as (seq,):
            layers = range(model.shape.num_layers)
            taken.append((seq.state(), [seq.read_layer(engine.pool, idx) for idx in layers]))

    taking = threading.Thread(target=take)
    taking.start()
    while taking.is_alive():
        said += [t for output in engine.step() for t in output.tokens]
    (state, layers), other = taken[0], make_engine(model)
    going_on = other.reserve(replace(request, moved=True))
    for layer in layers:
        going_on.write_layer(layer)
    other.resume(going_on, {0: state}, prefill_all(model, prompt(40), UNPRUNED)[1].final_hidden)
    assert ids(said) + ids(decode_all(other)["r"]) == whole


def test_min_tokens_and_stop_tokens_hold_within_a_grammar(
    engine: DecodeEngine, tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    (b,) = tokenizer.encode("b")
    grammar = compiler.compile(Grammar("regex", "[abc]*"))
    sampling = replace(SAMPLED, min_tokens=6, stop_token_ids=frozenset({b}))
    tokens = answer(engine, spec("r", 20, sampling, grammar=grammar))
    assert not {b, END} & {*tokens[:6]}
    assert re.fullmatch("[ac]{6,}b?", tokenizer.decode(tokens[: -1 if tokens[-1] == END else None]))
    short = compiler.compile(Grammar("regex", "ab"))
    tokens = answer(engine, spec("r", 20, replace(GREEDY, min_tokens=20), grammar=short))
    assert tokenizer.decode(tokens[:-1]) == "ab"
    assert tokens[-1] == END


def test_an_answer_that_is_too_long_ends_as_others_do(
    engine: DecodeEngine, compiler: GrammarCompiler
) -> None:
    grammar = compiler.compile(Grammar("regex", "a*b{50}"))
    admit(engine, spec("r", 20, replace(GREEDY, max_tokens=7), grammar=grammar), prompt(20))
    tokens: list[Token] = decode_all(engine)["r"]
    assert len(tokens) == 7
    assert tokens[-1].finish_reason is FinishReason.LENGTH


def test_a_grammar_that_fails_ends_its_request_alone(
    engine: DecodeEngine, tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    """Its replayed tokens are none of the grammar's, as beside a worker of another release."""
    grammar = compiler.compile(Grammar("regex", "[ab]{20,}"))
    replayed = (tuple(tokenizer.encode("abx")),)
    healthy = spec("healthy", 40, replace(SAMPLED, max_tokens=15), grammar=grammar)
    expected = answer(engine, healthy)
    admit(engine, spec("fails", 30, SAMPLED, grammar=grammar, replayed=replayed), prompt(30))
    admit(engine, healthy, prompt(40))
    errors, tokens = {}, []
    while engine.stats().running_sequences:
        for output in engine.step():
            if output.error is not None:
                errors[output.request_id] = output.error
            tokens += ids(output.tokens) if output.request_id == "healthy" else []
    assert {name: type(error) for name, error in errors.items()} == {"fails": GrammarFailed}
    assert "after 3 tokens of the answer" in errors["fails"].message
    assert tokens == expected


def test_a_step_with_a_grammar_begins_before_the_tokens_of_the_last_are_given_out(
    model: DecoderModel, compiler: GrammarCompiler
) -> None:
    grammar = compiler.compile(Grammar("regex", "[ab]{20,}"))
    engine = make_engine(model, new_recorder=EagerRecorder)
    admit(engine, spec("r", 20, replace(GREEDY, max_tokens=8), grammar=grammar), prompt(20))
    counts = [sum(len(output.tokens) for output in engine.step()) for _ in range(9)]
    assert counts == [0, *[1] * 8]
    engine.close()


def test_no_end_may_be_ignored_where_a_grammar_ends_with_it(grammar: CompiledGrammar) -> None:
    with pytest.raises(InvalidSetting, match="ignore_eos") as raised:
        spec("r", 10, replace(GREEDY, ignore_eos=True), grammar=grammar)
    assert raised.value.param == "ignore_eos"


def test_close_ends_the_thread_of_masks(model: DecoderModel, grammar: CompiledGrammar) -> None:
    before = set(threading.enumerate())
    engine = make_engine(model)
    answer(engine, spec("free", 10, replace(GREEDY, max_tokens=2)))
    assert set(threading.enumerate()) <= before  # it has no thread before it needs one
    answer(engine, spec("r", 10, replace(GREEDY, max_tokens=2), grammar=grammar))
    assert len(set(threading.enumerate()) - before) == 1
    engine.close()
    assert set(threading.enumerate()) <= before
