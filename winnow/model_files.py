"""Description of a model folder, read without loading its weights.

The gateway needs only a model's dimensions and fingerprint; workers compute the same description
before they load the weights.
"""

import hashlib
import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig

from winnow import weight_files
from winnow.checks import require_range
from winnow.context_length import constant_length, context_length, positive_int
from winnow.errors import UnusableModel
from winnow.folder_errors import as_unusable
from winnow.generation_defaults import end_token_ids
from winnow.gguf import SUFFIX, vocabulary
from winnow.gguf import header as gguf_header
from winnow.gguf.config import configuration
from winnow.gguf.header import is_gguf, model_files, read_header
from winnow.kv import ModelShape

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Quantization methods whose weights transformers dequantizes while loading.
_QUANTIZATIONS = ("fp8",)


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What all processes of the service must agree on about a model.

    path: the model's folder, or its GGUF file.
    model_type: transformers' name of the family.
    fingerprint: hex digest of the configuration, the weight files, the cache's dtype, and
    max_positions if it is not the configuration's.
    max_positions: the most tokens of a sequence, prompt and completion together.
    eos_token_ids: of configuration, generation config and tokenizer together.
    """

    path: Path
    model_type: str
    fingerprint: str
    shape: ModelShape
    vocab_size: int
    max_positions: int
    eos_token_ids: frozenset[int]

    @property
    def folder(self) -> Path:
        """Where winnow.json may stand."""
        return self.path if self.path.is_dir() else self.path.parent


def describe_model(
    model: str | Path, *, device: str = "cpu", dtype: str = "auto", max_model_len: int | None = None
) -> ModelDescription:
    """Describe a model folder, a GGUF file or a hub model (downloaded if it is not cached).

    dtype: `auto` is the checkpoint's own, but bfloat16 for float16 on a CPU, where that is slow.
    max_model_len: overrides the context length; a warning is logged if it is longer.
    Raises UnusableModel with the reason.
    """
    with as_unusable(f"model {model} cannot be read"):
        path = _resolve(model)
        config = load_config(path).get_text_config()
        with as_unusable(f"{_config_file(path)}, of a {config.model_type}, is not usable"):
            shape = _shape(config, _cache_dtype(config, device, dtype))
            max_positions = _max_positions(path, config, max_model_len)
            vocab_size = positive_int(config, "vocab_size")
            _require_supported(path, config, max_positions)
        return ModelDescription(
            path=path,
            model_type=config.model_type,
            fingerprint=_fingerprint(path, config, shape, max_positions),
            shape=shape,
            vocab_size=vocab_size,
            max_positions=max_positions,
            eos_token_ids=_end_token_ids(path, config, vocab_size),
        )


def _resolve(model: str | Path) -> Path:
    path = Path(model)
    if path.is_dir():
        return _gguf_in(path.resolve()) or path.resolve()
    if is_gguf(path):
        return path.absolute()  # links of the hub's cache lead to files with other names
    if path.exists():
        raise UnusableModel(f"model {model} is a file; a model is a folder or a GGUF file")
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


def _gguf_in(folder: Path) -> Path | None:
    """The one GGUF file of a folder with nothing else to load; of several parts, the first.

    Raises UnusableModel if there are several models.
    """
    found = sorted(file for file in folder.glob(f"*{SUFFIX}") if "mmproj" not in file.name)
    if not found or (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        return None
    if {*found} <= {*model_files(found[0])}:
        return found[0]
    raise UnusableModel(
        f"model folder {folder} has {len(found)} GGUF files; name one of them: "
        f"{', '.join(file.name for file in found)}"
    )


def _config_file(path: Path) -> Path:
    return path if path.is_file() else path / "config.json"


def load_config(path: Path) -> Any:  # noqa: ANN401 - each family has its own class
    """Load the configuration of a model folder or a GGUF file; raises UnusableModel."""
    if path.is_file():
        header = read_header(path)
        with as_unusable(f"{path}, of architecture {header.architecture}, is not usable"):
            return AutoConfig.for_model(**configuration(header))
    if not (path / "config.json").is_file():
        raise UnusableModel(f"model folder {path} has no config.json")
    with as_unusable(f"{path / 'config.json'} is not usable"):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        _require_known_quantization(path, config)
        return config


def _require_known_quantization(path: Path, config: Any) -> None:  # noqa: ANN401
    """Raise UnusableModel early: transformers ignores unknown methods, and fails late for most."""
    for part in (config, config.get_text_config()):
        quantization = getattr(part, "quantization_config", None)
        if quantization is None:
            continue
        method = quantization.get("quant_method") or "a method without a name"
        if method not in _QUANTIZATIONS:
            raise UnusableModel(
                f"{path} is quantized by {method}, which Winnow does not run; it runs weights of "
                f"{', '.join(_DTYPES)} or {', '.join(_QUANTIZATIONS)}"
            )
        if importlib.util.find_spec("accelerate") is None:
            raise UnusableModel(f"{path} is quantized by {method}: accelerate is not installed")


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


def _require_supported(path: Path, config: Any, max_positions: int) -> None:  # noqa: ANN401
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or (["sliding"] if window else [])
    others = sorted({kind for kind in layer_types if "full" not in kind})
    if others and (window is None or window < max_positions):
        shorter = f" (sliding_window {window} of {max_positions} positions)" if window else ""
        raise UnusableModel(
            f"{path} has {', '.join(others)} layers, which do not attend to the whole prompt"
            f"{shorter}; their cache cannot be pruned by position"
            + (f". max_model_len {window} avoids that" if window else "")
        )
    if (constant := constant_length(config)) < max_positions:
        raise UnusableModel(
            f"{path} uses {config.rope_parameters['rope_type']} rotary embeddings, which change "
            f"with the sequence's length beyond {constant} positions; prefill and decode would not "
            f"agree on them. max_model_len {constant} avoids that"
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


def _shape(config: Any, dtype: torch.dtype) -> ModelShape:  # noqa: ANN401
    """The model's dimensions; raises ValueError if they are invalid or inconsistent."""
    num_heads = positive_int(config, "num_attention_heads")
    hidden_size = positive_int(config, "hidden_size")
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} attention heads cannot share {num_kv_heads} KV heads")
    return ModelShape(
        num_layers=positive_int(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=getattr(config, "head_dim", None) or hidden_size // num_heads,
        hidden_size=hidden_size,
        dtype=dtype,
    )


def _end_token_ids(path: Path, config: Any, vocab_size: int) -> frozenset[int]:  # noqa: ANN401
    if path.is_file():
        return vocabulary.end_token_ids(read_header(path), vocab_size)
    return end_token_ids(path, getattr(config, "eos_token_id", None), vocab_size)


def _fingerprint(path: Path, config: Any, shape: ModelShape, max_positions: int) -> str:  # noqa: ANN401
    """Digest of the model; processes with different fingerprints do not exchange KV."""
    is_folder = path.is_dir()  # a GGUF file's configuration is one with its weights
    content = json.loads((path / "config.json").read_text()) if is_folder else None
    digest = hashlib.sha256(json.dumps(content).encode())
    digest.update(str(shape.dtype).encode())
    if is_folder:
        weight_files.update_digest(digest, path)
    else:
        gguf_header.update_digest(digest, read_header(path))
    if max_positions != config.max_position_embeddings:  # config.json's is in the digest already
        digest.update(str(max_positions).encode())
    return digest.hexdigest()[:32]
