"""Families that compute more than Winnow's loop over their layers, refused by what they ask for."""

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    CohereConfig,
    DeepseekV3Config,
    DogeConfig,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    NanoChatConfig,
    NemotronConfig,
    PreTrainedConfig,
)

from tests.winnow.checkpoints import EXPERTS, SIZES, check, save
from winnow.errors import UnusableModel
from winnow.models import load_model


def test_keys_wider_than_values_are_refused_with_the_sizes(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        **EXPERTS,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )
    with pytest.raises(UnusableModel, match=r"deepseek_v3.* no cache.*4 x 24, 4 x 24, 4 x 16"):
        check(save(tmp_path, config))


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        (Gemma2Config(**SIZES, head_dim=16, sliding_window=512), "softcap"),
        (
            GptOssConfig(
                **EXPERTS,
                head_dim=16,
                layer_types=["full_attention"] * 2,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            ),
            "s_aux",
        ),
    ],
    ids=["gemma2", "gpt_oss"],
)
def test_attention_that_computes_more_is_refused(
    tmp_path: Path, config: PreTrainedConfig, asked: str
) -> None:
    with pytest.raises(UnusableModel, match=f"layer 0 asks for {asked}"):
        check(save(tmp_path, config))


@pytest.mark.parametrize(
    ("multipliers", "where"),
    [
        ({"embedding_multiplier": 12.0}, "between its embeddings and its layer 0"),
        ({"logits_scaling": 8.0}, "between its head and its logits"),
    ],
)
def test_what_is_computed_between_the_parts_is_refused(
    tmp_path: Path, multipliers: dict[str, Any], where: str
) -> None:
    with pytest.raises(UnusableModel, match=f"granite computes something {where}"):
        check(save(tmp_path, GraniteConfig(**SIZES, **multipliers)))


def test_multiplying_by_1_between_the_parts_is_not_computing(tmp_path: Path) -> None:
    load_model(save(tmp_path, GraniteConfig(**SIZES)))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (CohereConfig(**SIZES), "computes something between its head and its logits"),
        (NanoChatConfig(**SIZES), "runs its embeddings, layers, norm and head otherwise"),
        (NemotronConfig(**SIZES), "cannot be run layer by layer: .* 'attention_call'"),
        (DogeConfig(**SIZES), "layer 0 asks for attention_mask"),
    ],
    ids=["cohere", "nanochat", "nemotron", "doge"],
)
def test_other_ways_through_the_network_are_refused(
    tmp_path: Path, config: PreTrainedConfig, reason: str
) -> None:
    with pytest.raises(UnusableModel, match=reason):
        check(save(tmp_path, config))
