"""Description of a model folder, read without loading its weights.

The gateway needs only a model's dimensions and fingerprint; workers compute the same description
before they load the weights.
"""

import hashlib
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from winnow import weight_files
from winnow.checks import require_range
from winnow.context_length import constant_length, context_length, positive_int, short_length
from winnow.errors import UnusableModel
from winnow.folder_errors import as_unusable, cannot_run
from winnow.generation_defaults import end_token_ids
from winnow.gguf import header as gguf_header
from winnow.gguf import vocabulary
from winnow.gguf.config import configuration
from winnow.gguf.header import Header, read_header
from winnow.kv import ModelShape
from winnow.kv_sizes import largest_of, require_alike, sizes_of
from winnow.layers import layers_of
from winnow.model_path import model_path, require_config
from winnow.other_networks import require_causal, require_decoder, require_known
from winnow.quantization.methods import Quantization, quantization_of
from winnow.quantization.settings import Quantize, require_quantize
from winnow.text_part import text_config

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What all processes of the service must agree on about a model.

    path: the model's folder, or its GGUF file.
    model_type: transformers' name of the family.
    fingerprint: hex digest of the configuration, the weight files, the cache's dtype, what
    becomes of the weights, and max_positions if it is not the configuration's.
    max_positions: the most tokens of a sequence, prompt and completion together.
    eos_token_ids: of configuration, generation config and tokenizer together.
    short_positions: the most tokens of a sequence that is rotated by longrope's short tables; None:
    all sequences have the same tables.
    quantize: `int8` if its weights become that when they are loaded.
    quantization: of the files, and whether it is undone.
    """

    path: Path
    model_type: str
    fingerprint: str
    shape: ModelShape
    vocab_size: int
    max_positions: int
    eos_token_ids: frozenset[int]
    quantize: Quantize | None = None
    quantization: Quantization | None = None
    short_positions: int | None = None

    def is_long(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens, at most, is rotated by longrope's long tables."""
        return self.short_positions is not None and num_tokens > self.short_positions

    @property
    def is_dequantized(self) -> bool:
        """Whether its weights are quantized in the files and not in memory."""
        return self.quantization is not None and self.quantization.dequantize

    @property
    def folder(self) -> Path:
        """Where winnow.json may stand."""
        return self.path if self.path.is_dir() else self.path.parent


def describe_model(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    max_model_len: int | None = None,
    quantize: str | None = None,
    dequantize: bool = False,
) -> ModelDescription:
    """Describe a model folder, a GGUF file or a hub model (downloaded if it is not cached).

    dtype: `auto` is the checkpoint's own, but bfloat16 for float16 on a CPU, where that is slow.
    max_model_len: overrides the context length; a warning is logged if it is longer.
    quantize: `int8` for weights of 8 bits on a CPU.
    dequantize: of a quantized checkpoint, when it is loaded.
    Raises UnusableModel with the reason, or InvalidSetting.
    """
    quantized_as = require_quantize(quantize, device)
    with as_unusable(f"model {model} cannot be read"):
        path = model_path(model)
        header = read_header(path) if path.is_file() else None
        config = load_config(path) if header is None else gguf_config(header)
        quantization = quantization_of(config, device, dequantize)
        if quantization is not None:
            quantization.require_usable(path, quantized_as)
        file = _config_file(path)
        with as_unusable(f"Winnow cannot run {config.model_type}: {file} is not usable"):
            _require_keys_and_values(config)
            _require_length(config)
            max_positions = _max_positions(path, config, max_model_len)
            shape = shape_of(config, _cache_dtype(config, device, dtype), max_positions)
            vocab_size = positive_int(config, "vocab_size")
            short_positions = short_length(config)
            _require_constant_tables(path, config, max_positions)
        becomes = _weights_become(quantized_as, quantization)
        return ModelDescription(
            path=path,
            model_type=config.model_type,
            fingerprint=_fingerprint(path, header, config, shape, max_positions, becomes),
            shape=shape,
            vocab_size=vocab_size,
            max_positions=max_positions,
            eos_token_ids=_end_token_ids(path, header, config, vocab_size),
            quantize=quantized_as,
            quantization=quantization,
            short_positions=short_positions,
        )


def _weights_become(quantize: Quantize | None, quantization: Quantization | None) -> str:
    """What is done to weights when they are loaded; two that differ have other answers."""
    is_dequantized = quantization is not None and quantization.dequantize
    return f"{'dequantized' if is_dequantized else ''}{quantize or ''}"


def _config_file(path: Path) -> Path:
    return path if path.is_file() else path / "config.json"


def load_config(path: Path) -> Any:  # noqa: ANN401 - each family has its own class
    """Load the configuration of a model folder or a GGUF file, of its text part if it has several.

    Raises UnusableModel.
    """
    if path.is_file():
        return gguf_config(read_header(path))
    require_config(path)
    with as_unusable(f"{path / 'config.json'} is not usable"):
        require_known(path / "config.json")
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        require_decoder(config)
        text = text_config(config)
        if text is not config:
            require_decoder(text)
        require_causal(config, text)
        return text


def gguf_config(header: Header) -> Any:  # noqa: ANN401 - each family has its own class
    """`load_config` of a GGUF file whose header is read.  Raises UnusableModel."""
    with as_unusable(f"{header.path}, of architecture {header.architecture}, is not usable"):
        return AutoConfig.for_model(**configuration(header))


def _max_positions(path: Path, config: Any, max_model_len: int | None) -> int:  # noqa: ANN401
    allowed = context_length(config)
    if max_model_len is None:
        return allowed
    require_range("max_model_len", max_model_len, 2, 2**31 - 1)
    if max_model_len > allowed:
        logger.warning(
            "max_model_len %d is above the %d positions that %s was made for; answers beyond them "
            "may be nonsense",
            *(max_model_len, allowed, path),
        )
    return max_model_len


def _require_keys_and_values(config: Any) -> None:  # noqa: ANN401
    family = config.model_type
    if getattr(config, "num_attention_heads", None) is None:
        raise cannot_run(family, "it has no attention heads, and no keys and values to prune")
    layers = layers_of(config, positive_int(config, "num_hidden_layers"), sys.maxsize)
    if all(layer.attention is None for layer in layers):
        kinds = ", ".join(sorted({str(layer) for layer in layers}))
        raise cannot_run(family, f"it has {kinds} layers alone, and no keys and values to prune")


def _require_length(config: Any) -> None:  # noqa: ANN401
    stated = getattr(config, "max_position_embeddings", None)
    if stated is None or stated == -1:
        raise cannot_run(
            config.model_type,
            "its configuration does not say how long a sequence may be (max_position_embeddings)",
        )


def _require_constant_tables(path: Path, config: Any, max_positions: int) -> None:  # noqa: ANN401
    if (constant := constant_length(config)) < max_positions:
        raise UnusableModel(
            f"{path} uses dynamic rotary embeddings, which change with the sequence's length "
            f"beyond {constant} positions; prefill and decode would not agree on them. "
            f"max_model_len {constant} avoids that"
        )


def _cache_dtype(config: Any, device: str, dtype: str) -> torch.dtype:  # noqa: ANN401
    if dtype != "auto":
        if dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise UnusableModel(f"dtype {dtype!r} is not known; known are auto, {known}")
        return _DTYPES[dtype]
    chosen = getattr(config, "dtype", None) or torch.float32
    if chosen not in _DTYPES.values():
        raise ValueError(f"its dtype is {chosen}; Winnow computes with {', '.join(_DTYPES)}")
    return torch.bfloat16 if chosen == torch.float16 and device == "cpu" else chosen


def shape_of(config: Any, dtype: torch.dtype, max_positions: int) -> ModelShape:  # noqa: ANN401
    """The model's dimensions; raises ValueError if they are invalid or inconsistent."""
    num_layers = positive_int(config, "num_hidden_layers")
    sizes = sizes_of(config, num_layers)
    differ = len({*sizes}) > 1
    # A layer whose window is longer than any sequence is full only if it is as large as full ones.
    layers = layers_of(config, num_layers, sys.maxsize if differ else max_positions)
    require_alike(sizes, layers)
    largest = largest_of(sizes)
    return ModelShape(
        num_layers=num_layers,
        num_heads=positive_int(config, "num_attention_heads"),
        num_kv_heads=largest.num_kv_heads,
        head_dim=largest.key_dim,
        hidden_size=positive_int(config, "hidden_size"),
        dtype=dtype,
        layers=layers,
        own_sizes=() if {*sizes} == {largest} else sizes,
    )


def _end_token_ids(
    path: Path,
    header: Header | None,
    config: Any,  # noqa: ANN401
    vocab_size: int,
) -> frozenset[int]:
    if header is not None:
        return vocabulary.end_token_ids(header, vocab_size)
    return end_token_ids(path, getattr(config, "eos_token_id", None), vocab_size)


def _fingerprint(
    path: Path,
    header: Header | None,
    config: Any,  # noqa: ANN401
    shape: ModelShape,
    max_positions: int,
    weights_become: str,
) -> str:
    """Digest of the model; processes with different fingerprints do not exchange KV.

    header: of a GGUF file, whose configuration is one with its weights.
    """
    content = json.loads((path / "config.json").read_text()) if header is None else None
    digest = hashlib.sha256(json.dumps(content).encode())
    digest.update(str(shape.dtype).encode())
    if header is None:
        name = getattr(config, "transformers_weights", None)
        weight_files.update_digest(digest, path, name)
    else:
        gguf_header.update_digest(digest, header)
    if max_positions != config.max_position_embeddings:  # config.json's is in the digest already
        digest.update(str(max_positions).encode())
    digest.update(weights_become.encode())
    return digest.hexdigest()[:32]
