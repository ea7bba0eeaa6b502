"""Methods that choose tokens in one pass and prefill them on their own in another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models_in_code import FAMILIES
from tests.winnow import naive, reference
from tests.winnow.drive import UNPRUNED, all_layers, prefill_all, prompt
from tests.winnow.methods.small_runs import SMALL, answer
from winnow.engine.prefill import PrefillRun
from winnow.errors import InvalidSetting
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings

GEMFILTER = replace(SMALL, method="gemfilter")
ASL_2PASS = replace(SMALL, method="asl-2pass")


def asl_by_the_formulas(
    path: Path, token_ids: list[int], settings: PruningSettings, latest_layer: int
) -> naive.Asl:
    network = reference.load(path, "eager")
    masses = reference.attention_masses(network, token_ids, settings.window_size)
    return naive.Asl(
        [naive.as_lists(mass) for mass in masses],
        window=settings.window_size,
        kernel_size=settings.kernel_size,
        select_tokens=settings.select_tokens,
        observed_layers=settings.observed_layers,
        min_layer=settings.min_layer,
        threshold=settings.threshold,
        latest_layer=latest_layer,
    )


def picked(token_ids: list[int], kept: list[int]) -> list[int]:
    return [token_ids[idx] for idx in kept]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fixed_layer", [0, 2, 3])
def test_gemfilter_answers_as_transformers_does_to_the_picked_tokens(
    tiny_models: dict[str, Path], family: str, fixed_layer: int
) -> None:
    token_ids = prompt(60, seed=fixed_layer)
    raw = reference.last_query_scores(tiny_models[family], token_ids)[fixed_layer]
    kept = naive.gemfilter(naive.as_lists(raw), 24)
    expected = reference.greedy(
        reference.load(tiny_models[family]), picked(token_ids, kept), num_new=8
    )
    settings = replace(GEMFILTER, fixed_layer=fixed_layer)
    assert answer(load_model(tiny_models[family]), token_ids, settings) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_asl_2pass_answers_as_transformers_does_to_the_picked_tokens(
    tiny_models: dict[str, Path], family: str
) -> None:
    token_ids = prompt(60)
    asl = asl_by_the_formulas(tiny_models[family], token_ids, ASL_2PASS, latest_layer=2)
    assert asl.kept is not None
    network = reference.load(tiny_models[family])
    expected = reference.greedy(network, picked(token_ids, asl.kept), num_new=8)
    model = load_model(tiny_models[family])
    assert answer(model, token_ids, ASL_2PASS) == expected
    report = prefill_all(model, token_ids, ASL_2PASS)[1].report
    assert report.selection_layer == asl.selection_layer
    assert [value for _, value in report.rho] == pytest.approx([value for _, value in asl.rho])


def test_asl_2pass_selects_at_the_last_layer_if_the_threshold_is_never_met(
    tiny_models: dict[str, Path],
) -> None:
    token_ids = prompt(60)
    settings = replace(ASL_2PASS, threshold=0.0, latest_layer=None)
    asl = asl_by_the_formulas(tiny_models["llama"], token_ids, settings, latest_layer=3)
    model = load_model(tiny_models["llama"])
    report = prefill_all(model, token_ids, settings)[1].report
    assert report.selection_layer == asl.selection_layer == 3
    assert report.computed_share == pytest.approx((4 * 60 + 4 * 24) / (4 * 60))
    assert asl.kept is not None
    plain = answer(model, picked(token_ids, asl.kept), UNPRUNED)
    assert answer(model, token_ids, settings) == plain


@pytest.mark.parametrize("settings", [GEMFILTER, ASL_2PASS], ids=lambda given: given.method)
def test_pass_two_starts_again_at_position_0(
    tiny_models: dict[str, Path], settings: PruningSettings
) -> None:
    layers, result = prefill_all(load_model(tiny_models["llama"]), prompt(60), settings)
    report = result.report
    assert report.selection_layer is not None
    assert (report.num_selected_tokens, report.next_position) == (24, 24)
    assert report.layer_entries == (48, 48, 48, 48)
    computed = (report.selection_layer + 1) * 60 + 4 * 24
    assert report.computed_share == pytest.approx(computed / (4 * 60))
    assert all(layer.positions.tolist() == [*range(24)] * 2 for layer in layers)


def test_layers_of_pass_one_give_way_between_them(tiny_models: dict[str, Path]) -> None:
    """Whoever drives the prefill may stop it, or turn to another prompt, after each layer."""
    run = PrefillRun(load_model(tiny_models["llama"]), prompt(60), GEMFILTER, is_long=False)
    assert [None if layer is None else layer.layer_idx for layer in all_layers(run)] == [
        *(None, None),
        *range(4),
    ]


@pytest.mark.parametrize("settings", [GEMFILTER, ASL_2PASS], ids=lambda given: given.method)
def test_bfloat16_stays_bfloat16(tiny_models: dict[str, Path], settings: PruningSettings) -> None:
    model = load_model(tiny_models["qwen2"], dtype="bfloat16")
    layers, result = prefill_all(model, prompt(60), settings)
    tensors = [result.final_hidden, layers[0].keys, layers[0].values, layers[0].window_queries]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (replace(GEMFILTER, fixed_layer=4), r"fixed_layer is 4; .* \[0, 3\]"),
        (replace(ASL_2PASS, latest_layer=4), r"latest_layer is 4; .* \[0, 3\]"),
        (replace(ASL_2PASS, min_layer=4, latest_layer=4), r"min_layer is 4; .* \[0, 3\]"),
    ],
)
def test_refuses_a_layer_the_model_does_not_have(
    tiny_models: dict[str, Path], settings: PruningSettings, message: str
) -> None:
    with pytest.raises(InvalidSetting, match=message):
        PrefillRun(load_model(tiny_models["llama"]), prompt(60), settings, is_long=False)
