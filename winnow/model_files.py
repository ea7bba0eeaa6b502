"""What a model folder holds, read without loading its weights.

The gateway needs a model's sizes and fingerprint but not its gigabytes; workers check the same
description before they load.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig

from winnow.errors import UnusableModel
from winnow.generation_defaults import end_token_ids
from winnow.kv import ModelShape

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLE_BYTES = 1 << 20
# Rotary tables of these types depend on the sequence's length, so keys computed in prefill would
# not fit queries computed later.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model as every process of the service must agree on it.

    fingerprint: hex digest over the configuration, the weight files and the cache's dtype.
    max_positions: tokens a sequence may have, prompt and answer together.
    eos_token_ids: as configuration, generation config and tokenizer name them together.
    """

    path: Path
    fingerprint: str
    shape: ModelShape
    vocab_size: int
    max_positions: int
    eos_token_ids: frozenset[int]


def describe_model(
    model: str | Path, *, device: str = "cpu", dtype: str = "auto"
) -> ModelDescription:
    """The description of a model folder, or of a hub model (fetched if it is not cached).

    dtype: `auto` is the checkpoint's own; float16 becomes bfloat16 on a CPU, where it is slow.
    Raises UnusableModel with the reason.
    """
    path = _resolve(model)
    config = _load_config(path)
    _require_supported(path, config)
    shape = _shape(config, _cache_dtype(config, device, dtype))
    return ModelDescription(
        path=path,
        fingerprint=_fingerprint(path, shape),
        shape=shape,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        eos_token_ids=end_token_ids(path, getattr(config, "eos_token_id", None), config.vocab_size),
    )


def _resolve(model: str | Path) -> Path:
    path = Path(model)
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise UnusableModel(f"model {model} is a file; a model is a folder")
    if len(path.parts) != 2 or str(model).startswith((".", "/", "~")):
        raise UnusableModel(f"model folder {model} does not exist")
    try:
        return Path(
            snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.jinja"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UnusableModel(
            f"model {model} is neither a folder nor a model that could be fetched from the hub"
        ) from error


def _load_config(path: Path) -> Any:  # noqa: ANN401 - each family has its own class
    if not (path / "config.json").is_file():
        raise UnusableModel(f"model folder {path} has no config.json")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = first_line(error)
        raise UnusableModel(f"{path / 'config.json'} is not usable: {reason}") from error
    return config.get_text_config()


def first_line(error: BaseException) -> str:
    """What a library's error says, without the paragraphs of advice that may follow."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _require_supported(path: Path, config: Any) -> None:  # noqa: ANN401
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or []
    slides = any("full" not in kind for kind in layer_types) if layer_types else bool(window)
    if slides and (window is None or window < config.max_position_embeddings):
        raise UnusableModel(
            f"{path} has layers that do not attend to the whole prompt (sliding_window {window} of "
            f"{config.max_position_embeddings} positions); their cache cannot be pruned by position"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _LENGTH_DEPENDENT_ROPE:
        raise UnusableModel(
            f"{path} uses {rope} rotary embeddings, which change with the sequence's length; "
            "prefill and decode would not agree on them"
        )


def _cache_dtype(config: Any, device: str, dtype: str) -> torch.dtype:  # noqa: ANN401
    if dtype == "auto":
        chosen = getattr(config, "dtype", None) or torch.float32
        return torch.bfloat16 if chosen == torch.float16 and device == "cpu" else chosen
    if dtype not in _DTYPES:
        raise UnusableModel(f"dtype {dtype!r} is not known; known are auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _shape(config: Any, dtype: torch.dtype) -> ModelShape:  # noqa: ANN401
    num_heads = config.num_attention_heads
    return ModelShape(
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        hidden_size=config.hidden_size,
        dtype=dtype,
    )


def _fingerprint(path: Path, shape: ModelShape) -> str:
    digest = hashlib.sha256(json.dumps(json.loads((path / "config.json").read_text())).encode())
    digest.update(str(shape.dtype).encode())
    for file in weight_files(path):
        digest.update(file.name.encode())
        digest.update(_weight_sample(file))
    return digest.hexdigest()[:32]


def weight_files(path: Path) -> list[Path]:
    """The folder's safetensors files, by name.

    Raises UnusableModel if there are none, or if an index names other ones.
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UnusableModel(
            f"model folder {path} has no *.safetensors file (other formats can run code)"
        )
    for index in path.glob("*.safetensors.index.json"):
        _require_known(index, {file.name for file in files})
    return files


def _require_known(index: Path, names: set[str]) -> None:
    """Transformers reads whatever file an index of shards names, in whatever format."""
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UnusableModel(f"{index} is no index of weights") from error
    if named - names:
        others = ", ".join(sorted(map(repr, named - names)))
        raise UnusableModel(f"{index} names {others}: no *.safetensors file of the folder")


def _weight_sample(file: Path) -> bytes:
    """Size, tensor table, and the first and last megabyte of a safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8 or (table := struct.unpack("<Q", prefix)[0]) > size - 8:
            raise UnusableModel(f"{file} is not a safetensors file or is cut short")
        head = stream.read(table + _SAMPLE_BYTES)
        _require_whole(file, head[:table], size - 8 - table)
        stream.seek(max(0, size - _SAMPLE_BYTES))
        return size.to_bytes(8, "little") + head + stream.read()


def _require_whole(file: Path, table: bytes, num_bytes: int) -> None:
    """Raise UnusableModel unless `num_bytes` hold exactly the tensors that `table` announces."""
    try:
        tensors = {k: v for k, v in json.loads(table).items() if k != "__metadata__"}
        announced = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise UnusableModel(f"{file} is not a safetensors file") from error
    if announced != num_bytes:
        raise UnusableModel(
            f"{file} is cut short or damaged: it has {num_bytes:,} bytes of tensors; "
            f"its table announces {announced:,}"
        )
