"""Generation defaults of a model folder: end tokens and sampling parameters."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from winnow.errors import InvalidSetting, UnusableModel
from winnow.gguf.header import read_header
from winnow.gguf.vocabulary import generation_config
from winnow.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
# Keywords of the setting `generation_config`; anything else is a folder.
FROM_MODEL = "auto"
NONE = ("none", "vllm")  # vLLM's name for none is "vllm"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Defaults for what a request leaves unset.

    sampling: fields of SamplingParams.  max_new_tokens: where the API itself has no default.
    """

    sampling: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    max_new_tokens: int | None = None

    def told(self) -> dict[str, Any]:
        """The value of each parameter; `max_tokens` None means as many as fit."""
        sampling = SamplingParams(**self.sampling)
        return {name: getattr(sampling, name) for name in _SAMPLING} | {
            "max_tokens": self.max_new_tokens
        }


def generation_defaults(setting: str, model_path: Path) -> GenerationDefaults:
    """The defaults in generation_config.json, of the model folder or of another one.

    A GGUF file has its own.

    setting: `auto`, `none` (or `vllm`), or a folder.  `do_sample` is ignored, as in vLLM.
    Raises UnusableModel for an invalid value, InvalidSetting for a folder without the file.
    """
    if setting in NONE:
        return GenerationDefaults()
    if setting == FROM_MODEL and model_path.is_file():
        return _checked(model_path, generation_config(read_header(model_path)))
    folder = model_path if setting == FROM_MODEL else Path(setting)
    file = folder / GENERATION_CONFIG
    if setting != FROM_MODEL and not file.is_file():
        raise InvalidSetting(
            f"generation_config is {setting!r}; it must be {FROM_MODEL}, {NONE[0]}, or a folder "
            f"with {GENERATION_CONFIG}",
            param="generation_config",
        )
    return _checked(file, _read_json(file))


def _checked(file: Path, content: Mapping[str, Any]) -> GenerationDefaults:
    given = {name: content[name] for name in _SAMPLING if content.get(name) is not None}
    for name, value in given.items():
        _require_number(file, name, value, whole=name == "top_k")
    if given.get("top_k") == -1:  # "off" in vLLM
        given["top_k"] = 0
    try:
        SamplingParams(**given)
    except InvalidSetting as error:
        raise UnusableModel(f"{file}: {error.message}") from error
    return GenerationDefaults(MappingProxyType(given), _max_new_tokens(file, content))


def _max_new_tokens(file: Path, content: Mapping[str, Any]) -> int | None:
    number = content.get("max_new_tokens")
    if number is None:
        return None
    _require_number(file, "max_new_tokens", number, whole=True)
    if number < 1:
        raise UnusableModel(f"{file}: max_new_tokens is {number}; it must be at least 1")
    return int(number)


def _require_number(file: Path, name: str, value: object, *, whole: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        kind = "a whole number" if whole else "a number"
        raise UnusableModel(f"{file}: {name} is {value!r}; it must be {kind}")


def end_token_ids(path: Path, config_eos: object, vocab_size: int) -> frozenset[int]:
    """EOS token ids, collected from config.json, generation_config.json and the tokenizer.

    config_eos: eos_token_id of config.json.  Ids outside the vocabulary are left out.
    Raises UnusableModel for a value that is neither an id nor a list of them.
    """
    generation = path / GENERATION_CONFIG
    named = {
        path / "config.json": _token_ids(path / "config.json", config_eos),
        generation: _token_ids(generation, _read_json(generation).get("eos_token_id")),
        path / "tokenizer_config.json": _tokenizer_end_ids(path),
    }
    for file, ids in named.items():
        if unknown := sorted(i for i in ids if not 0 <= i < vocab_size):
            logger.warning("%s: end tokens %s are not in the vocabulary", file, unknown)
    return frozenset(i for ids in named.values() for i in ids if 0 <= i < vocab_size)


def _token_ids(file: Path, eos: object) -> list[int]:
    ids: list[Any] = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UnusableModel(f"{file}: eos_token_id is {eos!r}; it must be a token id or a list")
    return ids


def _tokenizer_end_ids(path: Path) -> list[int]:
    """The id of the tokenizer's eos_token, if it has one.

    Read from the files directly, since decode workers do not load a tokenizer.
    """
    settings = _read_json(path / "tokenizer_config.json")
    token = settings.get("eos_token") or _read_json(path / "special_tokens_map.json").get(
        "eos_token"
    )
    text = token.get("content") if isinstance(token, dict) else token
    if not text:
        return []
    if not isinstance(text, str):
        raise UnusableModel(f"{path}: the tokenizer's eos_token is {token!r}; it must be a text")
    try:
        token_id = _vocabulary_id(settings, path / "tokenizer.json", text)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnusableModel(f"{path}: the tokenizer's vocabulary cannot be read") from error
    if token_id is None:
        logger.warning("%s: the tokenizer has no token for its eos_token %r", path, text)
        return []
    return [token_id]


def _vocabulary_id(settings: Mapping[str, Any], file: Path, text: str) -> int | None:
    for token_id, added in (settings.get("added_tokens_decoder") or {}).items():
        if added["content"] == text:
            return int(token_id)
    content = _read_json(file)
    for added in content.get("added_tokens") or ():
        if added["content"] == text:
            return int(added["id"])
    vocab = (content.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, list):  # Unigram: pieces with their scores
        return next((idx for idx, (piece, _) in enumerate(vocab) if piece == text), None)
    return None if vocab.get(text) is None else int(vocab[text])


def _read_json(file: Path) -> dict[str, Any]:
    """The JSON object in the file; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UnusableModel(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnusableModel(f"{file} is no JSON object")
    return content
