"""Checkpoints of several networks, of which the text part is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Llama4Config,
    LlavaConfig,
    Mistral3Config,
)

from tests.models_in_code import save_byte_tokenizer
from tests.winnow.drive import UNPRUNED, prefill_all, prompt
from tests.winnow.families import tiny_config
from winnow.models import load_model
from winnow.text_part import text_config

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_LLAMA4_SIZES = _SIZES | dict.fromkeys(
    ("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32
)


def with_images(kind: Any, text: str, vision: dict[str, Any]) -> Any:
    return kind(text_config=tiny_config(text).to_dict(), vision_config=vision)


SEEING = {
    "gemma3": with_images(
        Gemma3Config, "gemma3_text", {"model_type": "siglip_vision_model", **_SIZES}
    ),
    "llama4": with_images(Llama4Config, "llama4_text", _LLAMA4_SIZES),
    "llava": with_images(LlavaConfig, "llama", {"model_type": "clip_vision_model", **_SIZES}),
    "mistral3": with_images(
        Mistral3Config, "mistral", {"model_type": "pixtral", "head_dim": 16, **_SIZES}
    ),
}


def test_modules_that_are_not_quantized_have_the_names_of_the_text_part() -> None:
    whole = with_images(Gemma3Config, "gemma3_text", {"model_type": "siglip_vision_model"})
    names = ["model.language_model.layers.0.mlp", "lm_head", "language_model.lm_head", "re:.*gate"]
    whole.quantization_config = {"quant_method": "fp8", "modules_to_not_convert": names}
    expected = ["model.layers.0.mlp", "lm_head", "lm_head", "re:.*gate"]
    found = text_config(whole).quantization_config
    assert found == {"quant_method": "fp8", "modules_to_not_convert": expected}


@pytest.mark.parametrize("family", SEEING)
def test_the_text_part_answers_texts_as_the_whole_does(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(SEEING[family], attn_implementation="eager")
    whole.eval().save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    token_ids = prompt(40)
    model = load_model(tmp_path)
    assert model.description.model_type != family
    _, result = prefill_all(model, token_ids, UNPRUNED)
    with torch.no_grad():
        expected = whole(torch.tensor([token_ids])).logits[0, -1]
    torch.testing.assert_close(model.logits(result.final_hidden[None])[0], expected)
