"""Networks that are no decoders, or whose attention is not one to keys and values by position.

They are told by their configurations, before anything is loaded, and refused by name.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from winnow.folder_errors import cannot_run

_ALIBI = frozenset({"bloom", "mpt"})
# Of a network for another task, as in LlamaForSequenceClassification.
_OTHER_TASK = re.compile(r"For(?!CausalLM|ConditionalGeneration|VisionText2Text)[A-Z]")


def require_known(config_file: Path) -> None:
    """Raise UnusableModel for a family that transformers does not have."""
    content = json.loads(config_file.read_text())
    family = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(family, str):
        raise ValueError("it names no family (model_type)")
    if family not in transformers.CONFIG_MAPPING:
        reason = f"transformers {transformers.__version__} does not know this family"
        code = ", and Winnow runs no code from model folders" if content.get("auto_map") else ""
        raise cannot_run(family, reason + code)


def require_decoder(config: Any) -> None:  # noqa: ANN401
    """Raise UnusableModel for a network, of several perhaps, that is of another kind."""
    for reason in _reasons(config):
        raise cannot_run(config.model_type, reason)


def require_causal(config: Any, text: Any) -> None:  # noqa: ANN401
    """Raise UnusableModel unless transformers can continue texts with the text part alone."""
    if text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        reason = "transformers has no causal language model of this family"
        if text is not config:
            reason = f"transformers cannot run its text part, {text.model_type}, alone"
        raise cannot_run(config.model_type, reason)
    for architecture in config.architectures or ():
        if _OTHER_TASK.search(architecture):
            raise cannot_run(
                config.model_type,
                f"its architecture is {architecture}, which does not continue texts, as a "
                "...ForCausalLM does",
            )


def _reasons(config: Any) -> Iterator[str]:  # noqa: ANN401 - each family has its own class
    def has(*names: str) -> bool:
        return any(getattr(config, name, None) for name in names)

    kinds = getattr(config, "layer_types", None) or ()
    if has("is_encoder_decoder", "encoder_layers", "decoder_layers", "text_encoder"):
        yield "an encoder reads its prompts, or it attends to one's output"
    if has("type_vocab_size"):
        yield "it is an encoder, whose tokens attend to later ones"
    if has("patcher_config"):
        yield "it reads bytes in patches"
    if has("backbone_hidden_size"):
        yield "it drafts for another model, to whose keys and values it attends"
    if has("altup_num_inputs"):
        yield "its layers take more than the hidden states of the layer before"
    if any("indexed" in kind or "sparse" in kind for kind in kinds):
        yield "an indexer chooses the tokens that it attends to"
    if has("kv_lora_rank"):
        yield "its attention is latent (MLA), and has no keys and values of single heads"
    if has("alibi") or config.model_type in _ALIBI:
        yield "its attention depends on distances (ALiBi)"
