from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.winnow.drive import assert_empty, make_engine
from tests.winnow.eager_recorder import EagerRecorder
from winnow import BatchJob, PruningSettings, SamplingParams, Winnow
from winnow.errors import InvalidRequest, InvalidSetting, PromptTooLong

TEXT = "the quick brown fox jumps over the lazy dog " * 8
FULL = PruningSettings(method="full", observed_layers=1, min_layer=1)
SNAPKV = PruningSettings(
    method="snapkv", window_size=8, kv_budget=24, observed_layers=1, min_layer=1
)


@pytest.fixture
def winnow(tiny_models: dict[str, Path]) -> Winnow:
    return Winnow.load(tiny_models["llama"], max_batch_size=3, method="full")


def jobs(winnow: Winnow) -> list[BatchJob]:
    """Prompts of different lengths, methods, and numbers of tokens to generate."""
    token_ids = winnow.tokenizer.encode(TEXT)
    return [
        BatchJob(
            token_ids[: 40 + 20 * i],
            SNAPKV if i % 2 else FULL,
            SamplingParams(max_tokens=3 + i, temperature=0, ignore_eos=True),
        )
        for i in range(7)
    ]


def test_answers_every_job_as_it_would_be_answered_alone(
    winnow: Winnow, tiny_models: dict[str, Path]
) -> None:
    asked = jobs(winnow)
    results = {result.job_idx: result.completion for result in winnow.generate_many(asked)}
    assert sorted(results) == list(range(7))
    for idx, job in enumerate(asked):
        alone = Winnow.load(tiny_models["llama"])
        alone.pruning = job.pruning
        assert alone.generate(job.token_ids, job.sampling) == results[idx]
    assert_empty(winnow._engine)


@pytest.mark.parametrize("new_recorder", [None, EagerRecorder])
def test_asks_for_jobs_only_as_places_become_free(
    winnow: Winnow, new_recorder: type[EagerRecorder] | None
) -> None:
    winnow._engine = make_engine(winnow.model, rows=3, new_recorder=new_recorder)
    made = 0

    def make() -> Iterator[BatchJob]:
        nonlocal made
        for job in jobs(winnow):
            made += 1
            yield job

    results = winnow.generate_many(make())
    next(results)
    assert made == 4  # three places and the one that waits
    results.close()  # type: ignore[attr-defined]
    assert_empty(winnow._engine)


def test_waits_for_memory_and_gives_it_back(tiny_models: dict[str, Path]) -> None:
    winnow = Winnow.load(tiny_models["llama"], max_batch_size=8, kv_memory_bytes=400_000)
    asked = jobs(winnow)
    assert len(list(winnow.generate_many(asked))) == len(asked)
    assert_empty(winnow._engine)


def test_ends_an_answer_before_its_stop_string(tiny_models: dict[str, Path]) -> None:
    winnow = Winnow.load(tiny_models["llama"], max_batch_size=1)
    token_ids = tuple(winnow.tokenizer.encode(TEXT))
    sampling = SamplingParams(max_tokens=40, temperature=1, seed=5, ignore_eos=True)
    (whole,) = winnow.generate_many([BatchJob(token_ids, FULL, sampling)])
    stop = whole.completion.text[10:13]
    cut = BatchJob(token_ids, FULL, sampling, (stop,))
    for result in winnow.generate_many([cut, cut]):
        text = result.completion.text
        assert text == whole.completion.text[: whole.completion.text.index(stop)]
    assert_empty(winnow._engine)


def test_a_job_that_can_never_run_is_refused_and_frees_the_others(winnow: Winnow) -> None:
    broken = BatchJob((), FULL, SamplingParams(max_tokens=1))
    with pytest.raises(InvalidRequest, match="0 tokens"):
        list(winnow.generate_many([*jobs(winnow)[:2], broken]))
    assert_empty(winnow._engine)


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("logit_bias", SamplingParams(logit_bias={500: 100.0})),
        ("logit_bias", SamplingParams(logit_bias={-1: 1.0})),
        ("stop_token_ids", SamplingParams(min_tokens=2, stop_token_ids=frozenset({3, 500}))),
    ],
)
def test_a_token_that_the_model_lacks_is_refused(
    winnow: Winnow, name: str, sampling: SamplingParams
) -> None:
    first = BatchJob(winnow.tokenizer.encode(TEXT)[:40], FULL, sampling)
    with pytest.raises(InvalidSetting, match=rf"{name} has token (500|-1); the vocabulary has"):
        list(winnow.generate_many([first, *jobs(winnow)[:1]]))
    assert_empty(winnow._engine)


def test_says_beforehand_what_would_be_refused(tiny_models: dict[str, Path]) -> None:
    winnow = Winnow.load(tiny_models["llama"], kv_memory_bytes=400_000)
    sampling = SamplingParams(max_tokens=8)
    winnow.require_fits(100, FULL, sampling)
    winnow.require_fits(8000, SNAPKV, sampling)
    with pytest.raises(PromptTooLong, match="9,000 tokens; the limit is 8,191"):
        winnow.require_fits(9000, SNAPKV, sampling)
    with pytest.raises(InvalidSetting, match="KV pages; the worker has"):
        winnow.require_fits(8000, FULL, sampling)
    with pytest.raises(InvalidSetting, match="fixed_layer is 9"):
        deep = PruningSettings(method="fastkv", fixed_layer=9)
        winnow.require_fits(4000, deep, sampling)
    assert_empty(winnow._engine)
