"""The decode engine with the kernel in the place of gathered pages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.models_in_code import save_tiny_model
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
from winnow.compression.choice import triton_kernels
from winnow.decoder import DecoderModel
from winnow.engine.kv_pool import KVPool
from winnow.kernels.gpu import attention
from winnow.kernels.gpu.attention import append_and_attend
from winnow.kv import KV_DTYPES, KvDtype
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings

KERNEL = "winnow.kernels.gpu.attention:append_and_attend"


def answers(
    model: DecoderModel,
    settings: PruningSettings,
    kv_dtype: KvDtype = "auto",
    **recompression: int,
) -> dict[str, list[int]]:
    engine = make_engine(model, kv_dtype=kv_dtype)
    for num_tokens in (1, 16, 33):
        sampling = replace(GREEDY, max_tokens=5)
        own = spec(str(num_tokens), num_tokens, sampling, **recompression)
        admit(engine, own, prompt(num_tokens, seed=num_tokens), settings)
    tokens = decode_all(engine)
    assert_empty(engine)
    return {name: ids(own) for name, own in tokens.items()}


@pytest.mark.parametrize(
    ("family", "settings", "kv_dtype", "recompression"),
    [
        ("llama", UNPRUNED, "auto", {}),
        ("qwen3", ASL, "auto", {}),
        ("qwen2", ASL, "auto", {"decode_budget": 16, "recompress_interval": 2}),
        ("qwen2", ASL, "int8", {"decode_budget": 16, "recompress_interval": 2}),
    ],
)
def test_a_batch_gets_the_tokens_that_gathered_pages_give(
    tiny_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    settings: PruningSettings,
    kv_dtype: KvDtype,
    recompression: dict[str, int],
) -> None:
    model = load_model(tiny_models[family])
    expected = answers(model, settings, kv_dtype, **recompression)
    built = []

    def backend(pool: KVPool, group: int) -> paged.PagedBackend:
        built.append(paged.PagedBackend(pool, append_and_attend))
        return built[-1]

    monkeypatch.setattr("winnow.engine.step_runner.decode_backend", backend)
    kernels = "winnow.engine.head_cutter.recompression_kernels"
    monkeypatch.setattr(kernels, lambda *_: triton_kernels())
    assert answers(model, settings, kv_dtype, **recompression) == expected
    assert built


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    """Half of the layers have windows of 20 tokens."""
    folder = tmp_path_factory.mktemp("sliding")
    window: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 2,
    }
    return load_model(save_tiny_model(folder, "qwen2", **window))


def test_windows_give_the_tokens_that_gathered_pages_give(
    sliding: DecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(sliding, UNPRUNED)
    monkeypatch.setattr(
        "winnow.engine.step_runner.decode_backend",
        lambda pool, _: paged.PagedBackend(pool, append_and_attend),
    )
    assert answers(sliding, UNPRUNED) == expected


def test_the_trial_before_use_has_windows_too(
    sliding: DecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_engine(sliding).pool
    paged.try_out(KERNEL, pool, 2)
    monkeypatch.setattr(attention, "append_and_attend", lambda *args: append_and_attend(*args[:-1]))
    with pytest.raises(RuntimeError, match=r"the limit is 0\.02"):
        paged.try_out(KERNEL, pool, 2)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_trial_before_use_passes(tiny_models: dict[str, Path], kv_dtype: KvDtype) -> None:
    paged.try_out(KERNEL, make_engine(load_model(tiny_models["llama"]), kv_dtype=kv_dtype).pool, 2)


def test_the_trial_before_use_fails_where_results_differ(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        attention, "append_and_attend", lambda *args: append_and_attend(*args) + 0.1
    )
    pool = make_engine(load_model(tiny_models["llama"])).pool
    with pytest.raises(RuntimeError, match=r"its results are 0\.1 off; the limit is 0\.02"):
        paged.try_out(KERNEL, pool, 2)
