from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models_in_code import FAMILIES, VOCAB_SIZE, save_tiny_model
from tests.winnow import naive, reference
from tests.winnow.drive import ASL, UNPRUNED, prefill_all, prompt
from winnow.engine.prefill import PrefillRun
from winnow.errors import InvalidRequest, InvalidSetting, PromptTooLong
from winnow.models import load_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_tokens", [1, 2, 70])
def test_unpruned_prefill_gives_the_logits_of_transformers(
    tiny_models: dict[str, Path], family: str, num_tokens: int
) -> None:
    model = load_model(tiny_models[family], mlp_block_tokens=32)  # 70 tokens are three blocks
    layers, result = prefill_all(model, prompt(num_tokens), UNPRUNED)
    ours = model.logits(result.final_hidden[None])[0]
    with torch.no_grad():
        theirs = reference.load(tiny_models[family])(torch.tensor([prompt(num_tokens)])).logits
    torch.testing.assert_close(ours, theirs[0, -1], rtol=1e-4, atol=1e-4)
    assert [layer.head_lengths for layer in layers] == [(num_tokens, num_tokens)] * 4
    assert result.report.computed_share == 1.0
    assert result.report.kv_bytes_kept == result.report.kv_bytes_full


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_asl_and_snapkv_choose_what_the_formulas_choose_on_transformers_attention(
    tiny_models: dict[str, Path], family: str, seed: int
) -> None:
    token_ids = prompt(60, seed)
    masses = reference.attention_masses(
        reference.load(tiny_models[family], "eager"), token_ids, ASL.window_size
    )
    expected = naive.Asl(
        [naive.as_lists(mass) for mass in masses],
        window=8,
        kernel_size=3,
        select_tokens=24,
        observed_layers=2,
        min_layer=1,
        threshold=1.2,
    )
    layers, result = prefill_all(load_model(tiny_models[family]), token_ids, ASL)
    assert result.report.selection_layer == expected.selection_layer == 1
    assert [value for _, value in result.report.rho] == pytest.approx(
        [value for _, value in expected.rho]
    )
    for layer, mass in zip(layers[:2], masses, strict=False):  # up to the selection layer
        kept = naive.snapkv(naive.as_lists(mass), 2, 8, 3, 20)
        assert layer.positions.tolist() == kept[0] + kept[1]
    assert expected.kept is not None
    for layer in layers[2:]:  # above it, only selected tokens at their original positions
        assert set(layer.positions.tolist()) <= set(expected.kept)


@pytest.mark.parametrize("method", ["snapkv", "fastkv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_snapkv_and_fastkv_choose_what_the_formulas_choose_on_transformers_attention(
    tiny_models: dict[str, Path], family: str, method: str
) -> None:
    token_ids, last = prompt(60), 2
    masses = reference.attention_masses(
        reference.load(tiny_models[family], "eager"), token_ids, ASL.window_size
    )
    settings = replace(ASL, method=method, fixed_layer=last)
    layers, result = prefill_all(load_model(tiny_models[family]), token_ids, settings)
    num_whole = 4 if method == "snapkv" else last + 1
    for layer, mass in zip(layers[:num_whole], masses, strict=False):
        kept = naive.snapkv(naive.as_lists(mass), 2, 8, 3, 20)
        assert layer.positions.tolist() == kept[0] + kept[1]
    if method == "snapkv":
        assert (result.report.no_selection_reason, result.report.computed_share) == ("off", 1.0)
        return
    chosen = naive.Asl(
        [naive.as_lists(masses[last])],
        window=8,
        kernel_size=3,
        select_tokens=24,
        observed_layers=1,
        min_layer=0,
        threshold=2.0,
    ).kept
    assert chosen is not None
    above = prefill_all(
        load_model(tiny_models[family]), token_ids, replace(settings, compression="none")
    )[0][last + 1]
    assert above.positions.tolist() == chosen * 2


def test_layers_above_the_selection_compute_only_kept_tokens(tiny_models: dict[str, Path]) -> None:
    model = load_model(tiny_models["llama"])
    config = replace(ASL, method="fastkv", fixed_layer=1, compression="none")
    layers, result = prefill_all(model, prompt(60), config)
    assert [layer.num_entries for layer in layers] == [120, 120, 48, 48]
    report = result.report
    assert (report.selection_layer, report.num_selected_tokens) == (1, 24)
    assert report.computed_share == pytest.approx((60 + 60 + 24 + 24) / 240)
    assert report.layer_entries == (120, 120, 48, 48)
    assert report.kv_bytes_kept == 336 * 2 * 16 * 4
    positions = layers[3].positions[:24]
    assert positions[-8:].tolist() == list(range(52, 60)), "the window stays"
    assert layers[3].window_queries.shape == (4, 8, 16)


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 20, 24])
@pytest.mark.parametrize("method", ["asl", "fastkv"])
def test_short_prompts_are_computed_as_if_nothing_were_pruned(
    tiny_models: dict[str, Path], num_tokens: int, method: str
) -> None:
    model = load_model(tiny_models["qwen2"])
    config = replace(ASL, method=method, fixed_layer=2, kv_budget=24)
    layers, pruned = prefill_all(model, prompt(num_tokens), config)
    plain_layers, plain = prefill_all(model, prompt(num_tokens), UNPRUNED)
    assert torch.equal(pruned.final_hidden, plain.final_hidden)
    for layer, other in zip(layers, plain_layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
    assert pruned.report.no_selection_reason == "short_prompt"


def test_top_p_gives_heads_of_different_length(tiny_models: dict[str, Path]) -> None:
    config = replace(ASL, method="snapkv", compression="top_p", kv_top_p=0.5)
    layers, _ = prefill_all(load_model(tiny_models["llama"]), prompt(80), config)
    assert any(len(set(layer.head_lengths)) > 1 for layer in layers)
    assert all(8 <= length < 80 for layer in layers for length in layer.head_lengths)


def test_bfloat16_prefill_stays_bfloat16(tmp_path: Path) -> None:
    model = load_model(save_tiny_model(tmp_path, "qwen2", dtype=torch.bfloat16))
    layers, result = prefill_all(model, prompt(60), ASL)
    tensors = [result.final_hidden, layers[0].keys, layers[0].values, layers[0].window_queries]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("token_ids", "error", "message"),
    [
        ([], InvalidRequest, "0 tokens"),
        ([1] * 8192, PromptTooLong, "8,192 tokens; the limit is 8,191"),
        ([1, VOCAB_SIZE], InvalidRequest, "token id 320 is outside the vocabulary, 0 to 319"),
        ([-1], InvalidRequest, "token id -1 "),
    ],
)
def test_refuses_prompts_that_cannot_be(
    tiny_models: dict[str, Path], token_ids: list[int], error: type, message: str
) -> None:
    model = load_model(tiny_models["llama"])
    with pytest.raises(error, match=message):
        PrefillRun(model, token_ids, UNPRUNED, is_long=False)


def test_refuses_a_layer_the_model_does_not_have(tiny_models: dict[str, Path]) -> None:
    config = replace(ASL, method="fastkv", fixed_layer=4)
    with pytest.raises(InvalidSetting, match=r"fixed_layer is 4; .* \[0, 3\]"):
        PrefillRun(load_model(tiny_models["llama"]), prompt(60), config, is_long=False)
