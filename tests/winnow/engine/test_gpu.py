"""The same engines on a CUDA device. Left out where there is none."""

from dataclasses import replace
from pathlib import Path

import pytest

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
