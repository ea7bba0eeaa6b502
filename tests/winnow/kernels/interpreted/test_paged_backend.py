"""The decode engine with the kernel in the place of gathered pages."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.winnow.drive import (
    ASL,
    GREEDY,
    UNPRUNED,
    admit,
    assert_empty,
    decode_all,
    ids,
    make_engine,
    prompt,
    spec,
)
from winnow.attention import paged
from winnow.decoder import DecoderModel
from winnow.engine.kv_pool import KVPool
from winnow.kernels.gpu.attention import append_and_attend
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings


def answers(
    model: DecoderModel, settings: PruningSettings, **recompression: int
) -> dict[str, list[int]]:
    engine = make_engine(model)
    for num_tokens in (1, 16, 33):
        sampling = replace(GREEDY, max_tokens=5)
        own = spec(str(num_tokens), num_tokens, sampling, **recompression)
        admit(engine, own, prompt(num_tokens, seed=num_tokens), settings)
    tokens = decode_all(engine)
    assert_empty(engine)
    return {name: ids(own) for name, own in tokens.items()}


@pytest.mark.parametrize(
    ("family", "settings", "recompression"),
    [
        ("llama", UNPRUNED, {}),
        ("qwen3", ASL, {}),
        ("qwen2", ASL, {"decode_budget": 16, "recompress_interval": 2}),
    ],
)
def test_a_batch_gets_the_tokens_that_gathered_pages_give(
    tiny_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    settings: PruningSettings,
    recompression: dict[str, int],
) -> None:
    model = load_model(tiny_models[family])
    expected = answers(model, settings, **recompression)
    built = []

    def backend(pool: KVPool, group: int) -> paged.PagedBackend:
        built.append(paged.PagedBackend(pool))
        return built[-1]

    monkeypatch.setattr("winnow.engine.runner.decode_backend", backend)
    assert answers(model, settings, **recompression) == expected
    assert built


def test_the_trial_before_use_passes(tiny_models: dict[str, Path]) -> None:
    paged.try_out(make_engine(load_model(tiny_models["llama"])).pool, 2)


def test_the_trial_before_use_fails_where_results_differ(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "append_and_attend", lambda *args: append_and_attend(*args) + 0.1)
    pool = make_engine(load_model(tiny_models["llama"])).pool
    with pytest.raises(RuntimeError, match=r"its results are 0\.1 off; the limit is 0\.02"):
        paged.try_out(pool, 2)
