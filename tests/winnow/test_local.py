import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.winnow import reference
from tests.winnow.drive import assert_empty, make_engine
from tests.winnow.eager_recorder import EagerRecorder
from winnow import BatchJob, Grammar, SamplingParams, Winnow
from winnow.completion import run_to_end
from winnow.engine.decode import DecodeEngine
from winnow.engine.prefix.hashes import BLOCK_TOKENS
from winnow.errors import InvalidGrammar, InvalidRequest, InvalidSetting
from winnow.tokens import FinishReason

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


def test_control_tokens_are_part_of_the_text_if_they_are_to_be_shown(winnow: Winnow) -> None:
    user = winnow.tokenizer.added_token_id("<|user|>")
    assert user is not None
    sampling = SamplingParams(max_tokens=2, ignore_eos=True, logit_bias={user: 100.0})
    for shown, text in ((frozenset({user}), "<|user|>" * 2), (frozenset[int](), "")):
        steps = winnow.stream_by_layer(TEXT, sampling, shown_token_ids=shown)
        assert "".join(run_to_end(steps)) == text


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


def test_texts_keep_to_a_grammar_one_by_one_and_in_a_batch(winnow: Winnow) -> None:
    sampling = SamplingParams(max_tokens=40, temperature=1, seed=5)
    grammars = [
        Grammar("json_schema", '{"enum": ["one", "two", [3, null]]}'),
        Grammar("regex", "(quick|lazy) [a-f]{3}"),
        None,
    ]
    alone = [winnow.generate(TEXT, sampling, grammar=grammar) for grammar in grammars]
    assert json.loads(alone[0].text) in ("one", "two", [3, None])
    assert re.fullmatch("(quick|lazy) [a-f]{3}", alone[1].text)
    assert [one.finish_reason for one in alone[:2]] == [FinishReason.STOP] * 2
    jobs = [
        BatchJob(winnow.tokenizer.encode(TEXT), winnow.pruning, sampling, grammar=grammar)
        for grammar in grammars
    ]
    together = {one.job_idx: one.completion for one in winnow.generate_many(jobs)}
    assert [together[idx] for idx in range(3)] == alone
    with pytest.raises(InvalidGrammar, match=r"grammar.items cannot be enforced"):
        winnow.generate(TEXT, grammar=Grammar("json_schema", '{"items": {"not": {}}}'))
    assert_empty(winnow._engine)


def test_a_step_that_reads_two_tokens_ends_at_the_same_stop_string(
    winnow: Winnow, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(max_tokens=41, temperature=1, seed=5, ignore_eos=True)
    whole = winnow.generate(TEXT, sampling).text
    stops = [whole[at : at + 3] for at in range(10, 14)]
    expected = [winnow.generate(TEXT, sampling, (stop,)) for stop in stops]
    assert {len(one.token_ids) % 2 for one in expected} == {0, 1}
    step = DecodeEngine.step
    monkeypatch.setattr(DecodeEngine, "step", lambda engine: step(engine) + step(engine))
    assert [winnow.generate(TEXT, sampling, (stop,)) for stop in stops] == expected
    jobs = [BatchJob(winnow.tokenizer.encode(TEXT), winnow.pruning, sampling, (s,)) for s in stops]
    many = {one.job_idx: one.completion for one in winnow.generate_many(jobs)}
    assert [many[idx] for idx in range(len(stops))] == expected
    assert_empty(winnow._engine)


def test_what_ends_an_answer_ends_it_here_too(winnow: Winnow) -> None:
    sampling = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    token_ids = winnow.generate(TEXT, sampling).token_ids
    late = next(i for i in token_ids[3:] if i not in token_ids[:3])
    ends = replace(sampling, stop_token_ids=frozenset({late}))
    stopped = winnow.generate(TEXT, ends)
    assert stopped.token_ids == token_ids[: token_ids.index(late) + 1]
    assert stopped.finish_reason is FinishReason.STOP
    delayed = winnow.generate(TEXT, replace(ends, min_tokens=20))
    assert len(delayed.token_ids) == 20 and late not in delayed.token_ids
    text = winnow.generate(TEXT, replace(sampling, min_tokens=5), stop=("a", "e", " ", "o", "t"))
    assert len(text.token_ids) > 5


def test_options_of_the_chat_template_are_given_when_it_is_loaded(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_models["llama"], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}{{ x }}")
    messages = [{"role": "user", "content": "<|end|>"}]
    kwargs: dict[str, Any] = {"chat_template_kwargs": {"x": "<|user|>"}}
    loaded = Winnow.load(tmp_path / "model", method="full", **kwargs)
    assert loaded.tokenizer.render_chat(messages)[-1] == 2
    assert len(loaded.tokenizer.render_chat(messages)) == len("<|end|>") + 1
    trusting = Winnow.load(tmp_path / "model", method="full", allow_special_tokens=True, **kwargs)
    assert trusting.tokenizer.render_chat(messages) == [0, 2]


@pytest.mark.parametrize("new_recorder", [None, EagerRecorder])
def test_a_stream_closed_early_frees_its_memory(
    winnow: Winnow, new_recorder: type[EagerRecorder] | None
) -> None:
    winnow._engine = make_engine(winnow.model, rows=1, new_recorder=new_recorder)
    stream = winnow.stream(TEXT, SamplingParams(max_tokens=40, ignore_eos=True))
    pieces = iter(stream)
    next(pieces)
    pieces.close()
    assert_empty(winnow._engine)


def test_a_prefill_closed_between_two_layers_frees_its_memory(winnow: Winnow) -> None:
    layers = winnow.stream_by_layer(TEXT, SamplingParams(max_tokens=4))
    next(layers)
    layers.close()
    assert_empty(winnow._engine)
    assert winnow.generate(TEXT, SamplingParams(max_tokens=4)).token_ids


def test_questions_about_one_text_compute_it_once(tiny_models: dict[str, Path]) -> None:
    plain = Winnow.load(tiny_models["llama"], max_batch_size=2)
    winnow = Winnow.load(tiny_models["llama"], max_batch_size=2, prefix_cache_bytes=8 << 20)
    assert plain.prefix_store is None and winnow.prefix_store is not None
    text = winnow.tokenizer.encode(TEXT * 3)
    assert len(text) > 2 * BLOCK_TOKENS
    sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    jobs = [
        BatchJob([*text, *range(idx, idx + 40)], replace(winnow.pruning, method=method), sampling)
        for idx, method in enumerate(("full", "asl", "gemfilter", "snapkv"))
    ]
    expected = {one.job_idx: one.completion for one in plain.generate_many(jobs)}
    found = {one.job_idx: one.completion for one in winnow.generate_many(jobs)}
    cached = len(text) // BLOCK_TOKENS * BLOCK_TOKENS
    for idx, completion in found.items():
        assert completion.token_ids == expected[idx].token_ids
        assert completion.report.num_cached_tokens == (cached if idx else 0)
        assert expected[idx].report.no_prefix_reason == "off"
    assert winnow.prefix_store.stats().num_blocks_in_use == 0


def test_the_next_turn_computes_what_is_new(tiny_models: dict[str, Path]) -> None:
    winnow = Winnow.load(
        tiny_models["qwen2"], method="full", prefix_cache_bytes=8 << 20, prefix_cache_device="host"
    )
    plain = Winnow.load(tiny_models["qwen2"], method="full")
    sampling = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    token_ids = winnow.tokenizer.encode(TEXT)
    for turn in range(3):
        completion = winnow.generate(token_ids, sampling, cache_salt="one")
        assert completion.token_ids == plain.generate(token_ids, sampling).token_ids
        known = 0 if turn == 0 else len(token_ids) - len(completion.token_ids) - 20
        assert completion.report.num_cached_tokens == known // BLOCK_TOKENS * BLOCK_TOKENS
        assert winnow.generate(token_ids, sampling, cache_salt=f"{turn}").report == replace(
            completion.report, num_cached_tokens=0, saved_layer_tokens=0, computed_share=1.0
        )
        token_ids += [*completion.token_ids, *range(20)]


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
    with pytest.raises(InvalidSetting, match="prefix_cache_bytes is 9; one layer of 128 tokens"):
        Winnow.load(tiny_models["llama"], prefix_cache_bytes=9)
    with pytest.raises(InvalidSetting, match="prefix_cache_device is 'disk'"):
        Winnow.load(tiny_models["llama"], prefix_cache_device="disk")
    with pytest.raises(InvalidSetting, match="fixed_layer is 7"):
        Winnow.load(tiny_models["llama"], method="fastkv", fixed_layer=7)
    assert_empty(winnow._engine)


def test_another_gpu_than_the_first_is_refused(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(InvalidSetting, match=r"device is cuda:2; .*CUDA_VISIBLE_DEVICES=2"):
        Winnow.load(tiny_models["llama"], device="cuda:2")
