from pathlib import Path

import pytest

from tests.winnow import reference
from tests.winnow.drive import assert_empty
from winnow import SamplingParams, Winnow
from winnow.errors import InvalidRequest, InvalidSetting
from winnow.request import FinishReason

TEXT = "the quick brown fox jumps over the lazy dog " * 12


@pytest.fixture
def winnow(tiny_models: dict[str, Path]) -> Winnow:
    return Winnow.load(tiny_models["llama"], method="full")


def test_answers_as_transformers_does(winnow: Winnow, tiny_models: dict[str, Path]) -> None:
    sampling = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    completion = winnow.generate(TEXT, sampling)
    token_ids = winnow.tokenizer.encode(TEXT)
    expected = reference.greedy(reference.load(tiny_models["llama"]), token_ids, 20)
    assert list(completion.token_ids) == expected
    assert completion.text == winnow.tokenizer.decode(expected, skip_special_tokens=True)
    assert completion.finish_reason is FinishReason.LENGTH
    assert_empty(winnow._engine)


def test_streams_the_same_text_in_pieces_and_stops_at_a_stop_string(winnow: Winnow) -> None:
    sampling = SamplingParams(max_tokens=40, temperature=1, seed=5, ignore_eos=True)
    whole = winnow.generate(TEXT, sampling)
    stream = winnow.stream(TEXT, sampling)
    assert "".join(stream) == whole.text
    stop = whole.text[10:13]
    cut = winnow.generate(TEXT, sampling, stop=(stop,))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    assert len(cut.token_ids) < 40


def test_a_stream_closed_early_frees_its_memory(winnow: Winnow) -> None:
    stream = winnow.stream(TEXT, SamplingParams(max_tokens=40, ignore_eos=True))
    pieces = iter(stream)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert_empty(winnow._engine)


def test_prunes_as_told_and_reports_it(tiny_models: dict[str, Path]) -> None:
    winnow = Winnow.load(
        tiny_models["qwen2"], method="fastkv", fixed_layer=1, select_tokens=64, kv_budget=48
    )
    report = winnow.generate(TEXT, SamplingParams(max_tokens=4)).report
    assert (report.selection_layer, report.num_selected_tokens) == (1, 64)
    assert report.layer_entries == (96, 96, 96, 96)


def test_refuses_bad_settings_and_empty_prompts(
    winnow: Winnow, tiny_models: dict[str, Path]
) -> None:
    with pytest.raises(InvalidRequest, match="0 tokens"):
        winnow.generate("")
    with pytest.raises(InvalidSetting, match="kv_bugdet is not a pruning setting"):
        Winnow.load(tiny_models["llama"], kv_bugdet=3)
    with pytest.raises(InvalidSetting, match="fixed_layer is 7"):
        Winnow.load(tiny_models["llama"], method="fastkv", fixed_layer=7)
    assert_empty(winnow._engine)
