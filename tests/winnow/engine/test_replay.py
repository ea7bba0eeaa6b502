"""A sequence that moves to another engine goes on as it would have."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.winnow.drive import admit, assert_empty, decode_all, ids, make_engine, spec
from winnow.engine.decode import DecodeEngine
from winnow.models import load_model
from winnow.sampling_params import SamplingParams

PROMPT = tuple(range(5, 45))
SAMPLING = SamplingParams(
    max_tokens=40, temperature=0.9, seed=7, presence_penalty=0.5, ignore_eos=True
)


@pytest.fixture(scope="module")
def engine(tiny_models: dict[str, Path]) -> DecodeEngine:
    return make_engine(load_model(tiny_models["llama"]))


@pytest.mark.parametrize("num_done", [0, 1, 17, 39])
@pytest.mark.parametrize("decode_budget", [None, 24])
def test_goes_on_where_the_lost_worker_was(
    engine: DecodeEngine, num_done: int, decode_budget: int | None
) -> None:
    request = spec(
        "r1",
        len(PROMPT),
        SAMPLING,
        num_sequences=2,
        decode_budget=decode_budget,
        recompress_interval=4,
    )
    admit(engine, request, PROMPT)
    tokens = decode_all(engine)["r1"]
    whole = [ids(tokens, 0), ids(tokens, 1)]
    done = (tuple(whole[0][:num_done]), tuple(whole[1][: num_done + 1]))
    admit(engine, replace(request, replayed=done), PROMPT)
    rest = decode_all(engine)["r1"]
    assert [ids(rest, 0), ids(rest, 1)] == [whole[0][num_done:], whole[1][num_done + 1 :]]
    assert_empty(engine)


def test_a_sequence_that_had_ended_says_nothing_more(engine: DecodeEngine) -> None:
    request = spec("r1", len(PROMPT), replace(SAMPLING, max_tokens=5), num_sequences=2)
    admit(engine, request, PROMPT)
    tokens = decode_all(engine)["r1"]
    admit(engine, replace(request, replayed=(tuple(ids(tokens, 0)), ())), PROMPT)
    rest = decode_all(engine)["r1"]
    assert (ids(rest, 0), ids(rest, 1)) == ([], ids(tokens, 1))
    assert_empty(engine)


@pytest.mark.parametrize("num_done", [0, 3, 6])
def test_what_ends_a_sequence_and_what_may_not_goes_on_too(
    engine: DecodeEngine, num_done: int
) -> None:
    free = spec("r1", len(PROMPT), replace(SAMPLING, max_tokens=8))
    admit(engine, free, PROMPT)
    first, *_, last = ids(decode_all(engine)["r1"])
    ends = replace(SAMPLING, max_tokens=20, min_tokens=7, stop_token_ids=frozenset({first, last}))
    request = spec("r1", len(PROMPT), ends)
    admit(engine, request, PROMPT)
    tokens = decode_all(engine)["r1"]
    assert not set(ids(tokens)[:7]) & ends.stop_token_ids
    admit(engine, replace(request, replayed=(tuple(ids(tokens)[:num_done]),)), PROMPT)
    assert decode_all(engine)["r1"] == tokens[num_done:]


def test_log_probabilities_go_on_too(engine: DecodeEngine) -> None:
    request = spec("r1", len(PROMPT), replace(SAMPLING, num_logprobs=2, max_tokens=6))
    admit(engine, request, PROMPT)
    tokens = decode_all(engine)["r1"]
    admit(engine, replace(request, replayed=(tuple(ids(tokens)[:3]),)), PROMPT)
    assert decode_all(engine)["r1"] == tokens[3:]
