"""Which files of a repository a model is loaded from."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from winnow.errors import UnusableModel
from winnow.gguf import SUFFIX
from winnow.gguf.header import part_names
from winnow.hub.reference import HubModel
from winnow.weight_index import INDEX, WEIGHTS, missing_shards, weight_map

_SAFETENSORS = ".safetensors"
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ckpt", ".npz")
_TOKENIZER_FILES = ("merges.txt", "vocab.txt", "tokenizer.model")
_TEMPLATES = "additional_chat_templates"
_NOT_MODELS = re.compile(r"mmproj|imatrix|^mtp-")  # for images; statistics; drafts
_AN_INDEX = f"{_SAFETENSORS}.index"
_NAMES_SHOWN = 8


def is_gguf_model(model: HubModel, names: Collection[str]) -> bool:
    """Whether the model is loaded from GGUF files: if one is named, or there are no others."""
    others = any("/" not in name and name.endswith(_SAFETENSORS) for name in names)
    return model.is_gguf or (bool(_gguf_models(names)) and not others)


def small_files(model: HubModel, names: Collection[str]) -> list[str]:
    """Configuration, tokenizer, templates, and the index of the weights."""
    if is_gguf_model(model, names):
        return [name for name in names if name == "winnow.json"]
    return sorted(name for name in names if _is_small(PurePosixPath(name)))


def _is_small(path: PurePosixPath) -> bool:
    if path.parent.name == _TEMPLATES and len(path.parts) == 2:
        return path.suffix == ".jinja"
    if _AN_INDEX in path.name and path.name != INDEX:
        return False  # of a copy that is not fetched
    has_known_name = path.suffix in (".json", ".jinja") or path.name in _TOKENIZER_FILES
    return len(path.parts) == 1 and has_known_name


def weights(model: HubModel, names: Collection[str], folder: Path) -> list[str]:
    """The files of the weights.  folder: where the small files lie.

    Raises UnusableModel if the repository has none, or lacks a shard that its index names.
    """
    if is_gguf_model(model, names):
        return gguf_parts(model, names)
    if WEIGHTS in names:
        return [WEIGHTS]
    if INDEX in names:
        shards = weight_map(folder / INDEX)
        if reason := missing_shards(shards.values(), names):
            raise UnusableModel(f"model {model}: {INDEX} names {reason}")
        return sorted(set(shards.values()))
    found = sorted(name for name in names if "/" not in name and name.endswith(_SAFETENSORS))
    if not found:
        others = [name for name in names if PurePosixPath(name).suffix in _OTHER_WEIGHTS]
        raise UnusableModel(
            f"model {model} has no *{_SAFETENSORS} and no *{SUFFIX} file"
            + (f"; it has {_some(others)} (other formats can run code)" if others else "")
        )
    return found


def gguf_parts(model: HubModel, names: Collection[str]) -> list[str]:
    """The files of the one GGUF model that is named, the first one first.

    Raises UnusableModel if there is none or several, or a part is missing.
    """
    known = _gguf_models(names)
    if model.file is not None:
        found = [name for name in names if name == model.file]
    elif model.quantization is not None:
        found = _of_quantization(model.quantization, known)
    else:
        found = known
    if len(found) != 1:
        wanted = model.file or model.quantization
        what = f"{len(found)} GGUF models" if found else "no GGUF file"
        of_it = f" of {wanted}" if wanted else ""
        shown = found or known
        raise UnusableModel(
            f"model {model} has {what}{of_it}"
            + (f"; there are {_some(shown)}: name one, as {model.repository}/FILE" if shown else "")
        )
    parts = part_names(found[0])
    if missing := [name for name in parts if name not in names]:
        raise UnusableModel(
            f"model {model}: {len(missing)} of {len(parts)} files are missing: {_some(missing)}"
        )
    return parts


def _gguf_models(names: Collection[str]) -> list[str]:
    """Of models in several files the first."""
    return sorted(
        name
        for name in names
        if name.endswith(SUFFIX)
        and not _NOT_MODELS.search(PurePosixPath(name).name)
        and part_names(name)[0] == name
    )


def _of_quantization(quantization: str, names: Collection[str]) -> list[str]:
    """The models that are called so: by the file's name, or else by the folder's.

    Of several those whose name ends with it, without UD- before it.
    """
    word = rf"(?<![A-Za-z0-9]){re.escape(quantization)}(?![A-Za-z0-9_])"
    at_end = rf"(?<!UD-){word}(-\d+-of-\d+)?{re.escape(SUFFIX)}$"

    def having(pattern: str, texts: Mapping[str, str]) -> list[str]:
        return [name for name, text in texts.items() if re.search(pattern, text, re.IGNORECASE)]

    files = {name: PurePosixPath(name).name for name in names}
    found = having(word, files) or having(word, {n: PurePosixPath(n).parent.name for n in names})
    return found if len(found) < 2 else having(at_end, files) or found


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:_NAMES_SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more
