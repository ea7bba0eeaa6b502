"""Networks of other kinds, refused by name before their weights are looked at."""

import json
from pathlib import Path

import pytest
from transformers import (
    BartConfig,
    BertConfig,
    BloomConfig,
    CLIPConfig,
    DeepseekV3Config,
    DeepseekV32Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3VLConfig,
    RwkvConfig,
    ViTConfig,
    XLNetConfig,
    ZayaConfig,
)

from winnow.errors import UnusableModel
from winnow.model_files import describe_model


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BartConfig(), "an encoder reads its prompts"),
        (BertConfig(), "it is an encoder"),
        (DeepseekV3Config(), r"its attention is latent \(MLA\)"),
        (DeepseekV32Config(), "an indexer chooses"),
        (BloomConfig(), r"its attention depends on distances \(ALiBi\)"),
        (RwkvConfig(), "it has no attention heads"),
        (XLNetConfig(), "its configuration does not say how long a sequence may be"),
        (
            ZayaConfig(layer_types=["hybrid_sliding"] * 40, sliding_window=8),
            "layer 0 is a hybrid",
        ),
        (CLIPConfig(), "transformers cannot run its text part, clip_text_model, alone"),
        (ViTConfig(), "transformers has no causal language model of this family"),
        (Qwen3VLConfig(), "transformers cannot run its text part, qwen3_vl_text, alone"),
        (
            LlamaConfig(architectures=["LlamaForSequenceClassification"]),
            "its architecture is LlamaForSequenceClassification, which does not continue texts",
        ),
        (
            Qwen2Config(architectures=["Qwen2ForRewardModel"]),
            "its architecture is Qwen2ForRewardModel",
        ),
    ],
    ids=lambda one: getattr(one, "model_type", None),
)
def test_networks_of_other_kinds_are_refused_by_name(
    tmp_path: Path, config: PreTrainedConfig, reason: str
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UnusableModel, match=f"^Winnow cannot run {config.model_type}: {reason}"):
        describe_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model_type": "foo"},
            r"Winnow cannot run foo: transformers [\d.]+ does not know this family$",
        ),
        (
            {"model_type": "foo", "auto_map": {"AutoConfig": "configuration_foo.FooConfig"}},
            "cannot run foo: .* this family, and Winnow runs no code from model folders$",
        ),
        ({"architectures": ["FooForCausalLM"]}, r"config.json is not usable: it names no family"),
        ({"model_type": ["llama"]}, r"config.json is not usable: it names no family"),
        ([], r"config.json is not usable: it names no family"),
    ],
    ids=str,
)
def test_a_family_that_transformers_does_not_know_is_refused_in_one_line(
    tmp_path: Path, content: object, message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UnusableModel, match=message):
        describe_model(tmp_path)
