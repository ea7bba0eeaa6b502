"""What is tried over a recorded prompt is what the engine makes of it alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evals.calibrate.recording import RecordedModel
from tests.winnow.drive import prefill_all
from winnow.attention import AttentionCall
from winnow.decoder import DecoderModel
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings
from winnow.rotary import RotaryTables

TOKENS = torch.randint(0, 300, (90,), generator=torch.Generator().manual_seed(1)).tolist()
SMALL: dict[str, Any] = {"select_tokens": 40, "kv_budget": 24, "observed_layers": 2, "min_layer": 1}
TRIED = {
    "full": PruningSettings(method="full"),
    "snapkv": PruningSettings(method="snapkv", window_size=4, kernel_size=15, **SMALL),
    "a wide window": PruningSettings(method="snapkv", window_size=16, **SMALL),
    "fastkv": PruningSettings(method="fastkv", fixed_layer=1, window_size=8, **SMALL),
    "asl": PruningSettings(window_size=8, threshold=0.9, latest_layer=2, **SMALL),
    "a window wider than recorded": PruningSettings(window_size=20, latest_layer=2, **SMALL),
    "all queries": PruningSettings(method="h2o", window_size=8, **SMALL),
    "a first pass": PruningSettings(method="gemfilter", fixed_layer=2, window_size=8, **SMALL),
    "another first pass": PruningSettings(method="asl-2pass", window_size=8, **SMALL),
    "fewer tokens a layer": PruningSettings(method="pyramidinfer", window_size=8, **SMALL),
}


class CountedModel(RecordedModel):
    """Counts the layers that really compute."""

    computed = 0

    def _compute(self, layer_idx: int, hidden: Tensor, rope: RotaryTables) -> object:  # type: ignore[override]
        self.computed += 1
        return super()._compute(layer_idx, hidden, rope)


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> DecoderModel:
    return load_model(tiny_models["qwen3"])


@pytest.mark.parametrize("case", TRIED)
def test_a_recorded_prompt_is_pruned_as_the_engine_prunes_it(
    case: str, model: DecoderModel
) -> None:
    recorded = RecordedModel(model, 16)
    prefill_all(recorded, TOKENS, TRIED["full"])
    layers, result = prefill_all(recorded, TOKENS, TRIED[case])
    expected_layers, expected = prefill_all(model, TOKENS, TRIED[case])
    assert result.report == expected.report
    assert torch.equal(result.final_hidden, expected.final_hidden)
    for layer, other in zip(layers, expected_layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)


def test_a_prompt_is_computed_once(model: DecoderModel) -> None:
    recorded = CountedModel(model, 16)
    for case in ("snapkv", "full", "fastkv", "asl", "a wide window"):
        prefill_all(recorded, TOKENS, TRIED[case])
    assert recorded.computed == model.shape.num_layers


def test_another_prompt_is_not_answered_from_the_recording(model: DecoderModel) -> None:
    recorded = RecordedModel(model, 16)
    other = [*TOKENS[:-1], 7]
    prefill_all(recorded, TOKENS, TRIED["full"])
    assert torch.equal(
        prefill_all(recorded, other, TRIED["snapkv"])[1].final_hidden,
        prefill_all(model, other, TRIED["snapkv"])[1].final_hidden,
    )


def test_one_token_at_a_time_goes_to_the_model(model: DecoderModel) -> None:
    recorded = RecordedModel(model, 16)
    prefill_all(recorded, TOKENS, TRIED["full"])
    token = torch.tensor([[5]])

    def last(model: DecoderModel) -> torch.Tensor:
        call: AttentionCall = lambda _, q, k, v, _how: v.repeat_interleave(2, 1)  # noqa: E731
        return model.layer(0, model.embed(token), model.rope(token), call)

    assert torch.equal(last(recorded), last(model))
