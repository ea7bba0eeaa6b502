"""What was kept of a document, held against prefill and decode of the library."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evals.turns.kept_document import KeptDocument
from tests.models_in_code import long_rope, save_tiny_model
from tests.winnow.drive import (
    GREEDY,
    UNPRUNED,
    decode_all,
    ids,
    make_engine,
    prefill_all,
    prompt,
    spec,
)
from winnow.decoder import DecoderModel
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings

DOCUMENT, QUESTIONS = prompt(150), (prompt(20, seed=1), prompt(33, seed=2))
RAGGED = PruningSettings(
    method="fastkv",
    fixed_layer=1,
    select_tokens=64,
    kv_budget=40,
    window_size=8,
    compression="adakv",
)


WINDOWS: dict[str, Any] = {
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "use_sliding_window": True,
    "sliding_window": 48,
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> DecoderModel:
    return load_model(tiny_models[request.param])


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    return load_model(save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", **WINDOWS))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    """Of other rotary tables from 100 tokens on."""
    return load_model(save_tiny_model(tmp_path_factory.mktemp("long"), "phi3", **long_rope(100)))


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_of_a_document_that_is_kept_whole_it_is_prefill(model: DecoderModel) -> None:
    layers, _ = prefill_all(model, DOCUMENT + QUESTIONS[0], UNPRUNED)
    kept = KeptDocument(model, layers, len(DOCUMENT))
    for question in reversed(QUESTIONS):
        expected, result = prefill_all(model, DOCUMENT + question, UNPRUNED)
        found, final_hidden = kept.prefill(DOCUMENT + question)
        assert_close(final_hidden, result.final_hidden)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.head_lengths == theirs.head_lengths
            assert torch.equal(ours.positions, theirs.positions)
            assert_close(ours.keys, theirs.keys)
            assert_close(ours.values, theirs.values)


def test_of_a_pruned_document_it_is_decode_that_is_given_the_question(model: DecoderModel) -> None:
    require_is_decode(model, is_long=False)


def test_a_token_sees_nothing_before_its_layers_window(windowed: DecoderModel) -> None:
    settings = replace(RAGGED, fixed_layer=0)
    layers, _ = prefill_all(windowed, DOCUMENT + QUESTIONS[0], settings)
    kept, prompt = KeptDocument(windowed, layers, len(DOCUMENT)), DOCUMENT + QUESTIONS[1]
    _, expected = kept.prefill(prompt)
    last = kept.layers[-1]
    unseen = last.positions <= len(prompt) - 1 - WINDOWS["sliding_window"]
    assert unseen.any()
    last.values[unseen] += 100
    _, found = kept.prefill(prompt)
    assert torch.equal(found, expected)


def test_a_long_sequence_is_rotated_by_the_long_tables(long: DecoderModel) -> None:
    require_is_decode(long, is_long=True)


def require_is_decode(model: DecoderModel, *, is_long: bool) -> None:
    layers, _ = prefill_all(model, DOCUMENT + QUESTIONS[0], RAGGED)
    kept = KeptDocument(model, layers, len(DOCUMENT), is_long=is_long)
    question = QUESTIONS[1]
    assert any(len(set(layer.head_lengths)) > 1 for layer in kept.layers)
    found, final_hidden = kept.prefill(DOCUMENT + question)
    at_once = spec("at once", len(DOCUMENT) + len(question), GREEDY)
    more = replace(GREEDY, max_tokens=GREEDY.max_tokens + len(question))
    one_by_one = spec("one by one", len(DOCUMENT), more, replayed=(tuple(question),))
    answers = []
    for request, kv, hidden in (
        (at_once, found, final_hidden),
        (one_by_one, kept.layers, torch.zeros_like(final_hidden)),
    ):
        engine = make_engine(model)
        reservation = engine.reserve(request)
        for layer in kv:
            reservation.write_layer(layer)
        engine.start(reservation, hidden, request.num_prompt_tokens)
        answers.append(ids(decode_all(engine)[request.request_id]))
    assert answers[0] == answers[1]
    assert len(answers[0]) == GREEDY.max_tokens
