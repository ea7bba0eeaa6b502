"""The text part of a checkpoint of several networks, such as one that also sees images."""

import re
from collections.abc import Iterable
from typing import Any

# What the text part's tensors are called in such files, and by themselves.
TENSOR_NAMES = {
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(model\.)?language_model\.(model\.)?": "model.",
}
_NOT_QUANTIZED = ("modules_to_not_convert", "ignore", "ignored_layers")
_OTHER_PARTS = re.compile(
    r"^(model\.)?(vision|visual|image|audio|multi_modal|multimodal|mm_|embed_vision|embed_audio)"
)


def text_config(config: Any) -> Any:  # noqa: ANN401 - each family has its own class
    """The text part's configuration, with what the whole says of all parts."""
    text = config.get_text_config()
    if text is config:
        return config
    text.name_or_path = config.name_or_path
    if hasattr(config, "tie_word_embeddings"):
        text.tie_word_embeddings = config.tie_word_embeddings
    for name in ("dtype", "quantization_config"):
        if getattr(text, name, None) is None and getattr(config, name, None) is not None:
            setattr(text, name, _named_alone(getattr(config, name)))
    return text


def _named_alone(value: Any) -> Any:  # noqa: ANN401 - a setting
    """The value; if it lists modules that are not quantized, by their names in the text part."""
    if not isinstance(value, dict):
        return value
    named = {key: [*map(_name_alone, value[key])] for key in _NOT_QUANTIZED if value.get(key)}
    return {**value, **named}


def _name_alone(module: str) -> str:
    for pattern, name in TENSOR_NAMES.items():
        module = re.sub(pattern, name, f"{module}.").removesuffix(".")
    return module


def without_other_parts(tensors: Iterable[str]) -> list[str]:
    """The tensors that are not of a part for images or sound."""
    return [name for name in tensors if not _OTHER_PARTS.match(name)]
