"""Networks that are no decoders, or whose attention is not one to keys and values by position.

They are told by their configurations, before anything is loaded, and refused by name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from winnow.errors import UnusableModel

_ALIBI = frozenset({"bloom", "mpt"})


def require_decoder(path: Path, config: Any) -> None:  # noqa: ANN401
    """Raise UnusableModel for a network, of several perhaps, that is of another kind."""
    _refuse(path, config, _reasons(config))


def require_causal(path: Path, config: Any) -> None:  # noqa: ANN401
    """Raise UnusableModel for a text part that transformers cannot run alone."""
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        _refuse(path, config, iter(["transformers has no causal language model of this family"]))


def _refuse(path: Path, config: Any, reasons: Iterator[str]) -> None:  # noqa: ANN401
    for reason in reasons:
        raise UnusableModel(f"{path} is a {config.model_type}, which Winnow does not run: {reason}")


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
