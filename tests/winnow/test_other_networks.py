"""Networks of other kinds, refused by name before their weights are looked at."""

from pathlib import Path

import pytest
from transformers import (
    BartConfig,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    DeepseekV32Config,
    PreTrainedConfig,
)

from winnow.errors import UnusableModel
from winnow.model_files import describe_model


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BartConfig(), "bart, which .* an encoder reads its prompts"),
        (BertConfig(), "bert, which .* it is an encoder"),
        (DeepseekV3Config(), r"deepseek_v3, which .* latent \(MLA\)"),
        (DeepseekV32Config(), "deepseek_v32, which .* an indexer chooses"),
        (BloomConfig(), r"bloom, which .* \(ALiBi\)"),
    ],
    ids=lambda one: getattr(one, "model_type", None),
)
def test_networks_of_other_kinds_are_refused_by_name(
    tmp_path: Path, config: PreTrainedConfig, reason: str
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UnusableModel, match=reason):
        describe_model(tmp_path)
