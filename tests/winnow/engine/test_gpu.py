"""The same engines on a CUDA device. Left out where there is none."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models_in_code import FAMILIES
from tests.winnow import reference
from tests.winnow.drive import (
    ASL,
    GREEDY,
    LENGTHS,
    admit,
    assert_empty,
    decode_all,
    ids,
    make_engine,
    prefill_all,
    prompt,
    spec,
)
from winnow.catalog import METHODS
from winnow.engine.prefix.store import PrefixStore
from winnow.models import load_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_on_the_gpu_gets_the_tokens_of_generate(
    tiny_models: dict[str, Path], family: str
) -> None:
    engine = make_engine(load_model(tiny_models[family], device="cuda"))
    prompts = {str(n): prompt(n, seed=n) for n in LENGTHS}
    for name, token_ids in prompts.items():
        admit(engine, spec(name, len(token_ids), GREEDY), token_ids)
    answers = decode_all(engine)
    network = reference.load(tiny_models[family])
    expected = {name: reference.greedy(network, own, 16) for name, own in prompts.items()}
    assert {name: ids(tokens) for name, tokens in answers.items()} == expected
    assert_empty(engine)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gpu_selects_what_the_cpu_selects(
    tiny_models: dict[str, Path], family: str, method: str
) -> None:
    settings = replace(ASL, method=method, fixed_layer=1)
    on_cpu, cpu = prefill_all(load_model(tiny_models[family]), prompt(60), settings)
    on_gpu, gpu = prefill_all(load_model(tiny_models[family], device="cuda"), prompt(60), settings)
    assert gpu.report.selection_layer == cpu.report.selection_layer
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert one.positions.tolist() == other.positions.tolist()


@pytest.mark.parametrize("location", ["device", "host"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_follow_up_on_the_gpu_selects_what_it_selects_from_scratch(
    tiny_models: dict[str, Path], dtype: str, location: str
) -> None:
    model = load_model(tiny_models["qwen2"], device="cuda", dtype=dtype)
    store = PrefixStore(model, 64 << 20, location=location, block_tokens=16)
    for seed, layer_idx in ((1, 2), (2, 2), (3, 1), (4, 3)):
        settings = replace(ASL, method="fastkv", fixed_layer=layer_idx)
        token_ids = prompt(64) + prompt(10, seed)
        layers, result = prefill_all(model, token_ids, settings, store)
        others, expected = prefill_all(model, token_ids, settings)
        assert result.report.num_cached_tokens == (0 if seed == 1 else 64)
        for layer, like in zip(layers, others, strict=True):
            assert layer.positions.tolist() == like.positions.tolist()
        tolerance = 1e-3 if dtype == "float32" else 0.1
        torch.testing.assert_close(
            result.final_hidden, expected.final_hidden, rtol=tolerance, atol=tolerance
        )
    assert store.stats().damaged_blocks == 0
