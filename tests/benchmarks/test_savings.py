"""What benchmarks.savings computes from shapes is what prefill reports of small models."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma3TextConfig, PreTrainedConfig, Qwen3_5TextConfig, Qwen3Config

from benchmarks.savings import model_of, prefill_costs
from tests.winnow.checkpoints import SIZES, save
from winnow.engine.prefill import PrefillRun
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings
from winnow.report import PrefillReport

NUM_TOKENS = 90
PRUNED = PruningSettings(
    method="fastkv", fixed_layer=3, window_size=4, select_tokens=32, kv_budget=32
)
_SIZES = SIZES | {"num_hidden_layers": 8, "head_dim": 16, "pad_token_id": 0}
_KINDS = ["sliding_attention", "full_attention"] * 4
CONFIGS: dict[str, PreTrainedConfig] = {
    "plain": Qwen3Config(**_SIZES),
    "sliding": Gemma3TextConfig(**_SIZES, sliding_window=24, layer_types=_KINDS),
    "recurrent": Qwen3_5TextConfig(
        **_SIZES, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=16,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def folder(config: PreTrainedConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), config)


def reported(folder: Path, settings: PruningSettings) -> PrefillReport:
    run = PrefillRun(load_model(folder), list(range(NUM_TOKENS)), settings, is_long=False)
    for _ in run.layers():
        pass
    return run.result().report


@pytest.mark.parametrize("method", ["full", "fastkv"])
def test_costs_are_those_that_prefill_reports(
    config: PreTrainedConfig, folder: Path, method: str
) -> None:
    settings = replace(PRUNED, method=method)
    cut = PRUNED.fixed_layer if method == "fastkv" else None
    report, model = reported(folder, settings), model_of(config, torch.float32)
    costs = prefill_costs(model, settings, NUM_TOKENS, cut)
    computed = sum(cost.num_tokens for cost in costs)
    assert report.computed_share == pytest.approx(computed / NUM_TOKENS / len(costs))
    for cost, entries in zip(costs, report.layer_entries, strict=True):
        most = cost.num_entries * model.shape.num_kv_heads
        assert entries <= most
        # Above the cut fewer tokens may be within a window.
        assert entries == most or (cost.num_tokens < NUM_TOKENS and cost.layer.window)
    assert sum(cost.state_bytes for cost in costs) == report.state_bytes
    whole = prefill_costs(model, replace(PRUNED, method="full"), NUM_TOKENS, None)
    assert report.kv_bytes_full == sum(cost.kv_bytes for cost in whole)
