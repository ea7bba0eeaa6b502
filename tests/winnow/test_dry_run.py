"""Families that compute more than Winnow's loop over their layers, refused by what they ask for."""

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    CodeGenConfig,
    DiffLlamaConfig,
    DogeConfig,
    GraniteConfig,
    MiMoV2FlashConfig,
    MistralConfig,
    NanoChatConfig,
    PreTrainedConfig,
)

from tests.winnow.checkpoints import EXPERTS, SIZES, check, save
from tests.winnow.families import tiny_config
from winnow.errors import UnusableModel
from winnow.layers import FULL
from winnow.network_scales import NetworkScales


def test_keys_and_values_of_other_sizes_than_configured_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MiMoV2FlashConfig(**EXPERTS, head_dim=16, v_head_dim=8, sliding_window=512)
    path = save(tmp_path, config)
    check(path)
    monkeypatch.setattr("winnow.kv_sizes._MORE_IN_SLIDING", {})
    said = r"mimo_v2_flash: its queries.* of layer 1 are 4 x 16, 4 x 16, 4 x 8; .* 2 x 16, 2 x 8"
    with pytest.raises(UnusableModel, match=said):
        check(path)


def test_attention_in_two_calls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableModel, match=r"cannot run diffllama: layer 0 attends 2 times"):
        check(save(tmp_path, DiffLlamaConfig(**SIZES)))


def test_a_layer_that_slides_otherwise_than_configured_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, MistralConfig(**SIZES, sliding_window=20))
    check(path)
    monkeypatch.setattr("winnow.model_files.layers_of", lambda *_: (FULL, FULL))
    with pytest.raises(UnusableModel, match=r"layer 0 attends to 20 of .* a full layer that"):
        check(path)


@pytest.mark.parametrize(
    ("multipliers", "where"),
    [
        ({"embedding_multiplier": 12.0}, "between its embeddings and its layer 0"),
        ({"logits_scaling": 8.0}, "between its head and its logits"),
    ],
)
def test_what_is_computed_between_the_parts_by_other_factors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multipliers: dict[str, Any], where: str
) -> None:
    monkeypatch.setattr("winnow.network.scales_of", lambda _: NetworkScales())
    with pytest.raises(UnusableModel, match=f"cannot run granite: it computes something {where}"):
        check(save(tmp_path, GraniteConfig(**SIZES, **multipliers)))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (NanoChatConfig(**SIZES), "it runs its embeddings, layers, norm and head in another order"),
        (DogeConfig(**SIZES), "layer 0 chooses by itself what it attends to"),
        (CodeGenConfig(vocab_size=320, n_embd=64, n_layer=2, n_head=4, rotary_dim=8), "attention"),
        (tiny_config("zamba"), "its layers take the embeddings besides"),
    ],
    ids=lambda one: getattr(one, "model_type", ""),
)
def test_other_ways_through_the_network_are_refused(
    tmp_path: Path, config: PreTrainedConfig, reason: str
) -> None:
    with pytest.raises(UnusableModel, match=reason):
        check(save(tmp_path, config))
