"""What a GGUF file says of its tokens: which there are, how text is split, which end an answer."""

import logging
from collections.abc import Mapping
from typing import Any

from winnow.errors import UnusableModel
from winnow.gguf.header import Header

logger = logging.getLogger(__name__)

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_CONTROL = 3  # a token's type
_END_NAMES = ("eos_token_id", "eot_token_id", "eom_token_id")
# Files name one end token, and chat models end their turns with another. llama.cpp knows those by
# their texts as well.
_ENDS_OF_TURN = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>"),
        *("<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|end_of_turn|>", "<|EOT|>"),
    }
)
_SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
_GENERATION = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def end_token_ids(header: Header, vocab_size: int) -> frozenset[int]:
    """Those that the file names, and the control tokens that are known to end a turn."""
    values = header.values
    named = {values[_PREFIX + name] for name in _END_NAMES if _PREFIX + name in values}
    if unknown := sorted(i for i in named if not 0 <= i < vocab_size):
        logger.warning("%s: end tokens %s are not in the vocabulary", header.path, unknown)
    tokens = enumerate(zip(_list(header, "tokens"), _list(header, "token_type"), strict=False))
    known = {i for i, (text, kind) in tokens if kind == _CONTROL and text in _ENDS_OF_TURN}
    return frozenset(i for i in named | known if 0 <= i < vocab_size)


def generation_config(header: Header) -> dict[str, Any]:
    """The sampling that the model's makers recommend, as generation_config.json would say it."""
    values = header.values
    return {
        name: values[f"general.sampling.{own}"]
        for own, name in _GENERATION.items()
        if f"general.sampling.{own}" in values
    }


def tokenizer_values(header: Header) -> dict[str, Any]:
    """What transformers builds its tokenizer from.  Raises UnusableModel without a vocabulary."""
    tokens = _list(header, "tokens")
    if not tokens:
        raise UnusableModel(f"{header.path} has no vocabulary: it is no whole model")
    values = {
        "tokenizer_type": header.values.get(_PREFIX + "model"),
        **{name: _list(header, name) for name in ("tokens", "scores", "token_type", "merges")},
    }
    return {name: value for name, value in values.items() if value}


def split_name(header: Header) -> str | None:
    """The file's word for how text is split before it is merged to tokens."""
    name = header.values.get(_PREFIX + "pre")
    return None if name is None else str(name)


def special_tokens(header: Header) -> dict[str, str]:
    """The texts of bos_token and the like, where the file has them."""
    tokens = _list(header, "tokens")
    ids = {name: header.values.get(f"{_PREFIX}{own}_token_id") for own, name in _SPECIAL.items()}
    return {
        f"{name}_token": tokens[token_id]
        for name, token_id in ids.items()
        if token_id is not None and token_id < len(tokens)
    }


def adds_token(header: Header, name: str, *, default: bool) -> bool:
    """Whether a prompt gets `bos` before it, or `eos` behind it."""
    return bool(header.values.get(f"{_PREFIX}add_{name}_token", default))


def adds_space(header: Header) -> bool:
    """Whether a text gets a space before it."""
    return bool(header.values.get(_PREFIX + "add_space_prefix", True))


def chat_templates(header: Header) -> Mapping[str, str]:
    """By name; the one without a name is `default`."""
    named = {
        name.removeprefix(_TEMPLATE + "."): source
        for name, source in header.values.items()
        if name.startswith(_TEMPLATE + ".")
    }
    return named | ({"default": header.values[_TEMPLATE]} if _TEMPLATE in header.values else {})


def _list(header: Header, name: str) -> list[Any]:
    value = header.values.get(_PREFIX + name, [])
    if not isinstance(value, list):
        raise UnusableModel(f"{header.path}: {_PREFIX}{name} is {value!r}; it must be a list")
    return value
