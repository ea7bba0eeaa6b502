"""An adapter's folder, read without its weights: which linear layers it changes, and how.

A folder as PEFT saves it: adapter_config.json and adapter_model.safetensors.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from winnow.adapters.config import LoraConfig, read_config
from winnow.adapters.ref import (
    DEFAULT_MAX_RANK,
    AdapterRef,
    AdapterRoom,
    require_adapter_name,
)
from winnow.errors import InvalidSetting, UnusableAdapter
from winnow.folder_errors import as_unusable
from winnow.weight_files import StoredTensor, read_table

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
# Where a family has its layers; all are named as Llama's, as in winnow/network.py.
_TO_LAYERS = re.compile(r"(.*?\.)?(layers|h)\.(?=\d+\.)")
_CHUNK_BYTES = 1 << 20
_NAMES_SHOWN = 3

# Outputs and inputs of a model's linear layers, by their names in it.
LinearSizes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """One linear layer's pair: output += scale * B (A input).

    down, up: the names of A [rank, in] and B [out, rank] in the file.
    """

    down: str
    up: str
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterDescription:
    """An adapter that fits a model.

    digest: hex digest of its configuration and weights.  rank: the largest of its modules'.
    modules: by the name of the linear layer in the model.
    """

    name: str
    folder: Path
    digest: str
    rank: int
    modules: Mapping[str, AdapterModule]

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(self.name, self.digest, str(self.folder))


def room_for(
    folders: Mapping[str, str | Path], max_adapters: int | None = None, max_rank: int | None = None
) -> AdapterRoom | None:
    """Room for adapters, by name, and for so many in all; None if there are to be none.

    max_adapters: None for as many as are named.  max_rank: None for the largest of theirs, or
    DEFAULT_MAX_RANK if none is named.
    Raises UnusableAdapter for a folder without a configuration, InvalidSetting for too little room.
    """
    count = len(folders) if max_adapters is None else max_adapters
    if count < len(folders):
        raise InvalidSetting(
            f"max_adapters is {count}; {len(folders)} adapters are named", param="max_adapters"
        )
    if not count:
        return None
    if max_rank is None:
        ranks = [_config(name, Path(folder)).max_rank for name, folder in folders.items()]
        max_rank = max(ranks, default=DEFAULT_MAX_RANK)
    return AdapterRoom(count, max_rank)


def describe_adapter(
    name: str, folder: str | Path, sizes: LinearSizes, max_rank: int | None = None
) -> AdapterDescription:
    """Describe an adapter of the model whose linear layers have these sizes.

    Raises UnusableAdapter with the reason, or InvalidSetting for its name.
    """
    require_adapter_name(name)
    path = Path(folder).absolute()
    with as_unusable(f"adapter {name} in {path} cannot be read", UnusableAdapter):
        config = _config(name, path)
        weights = _file(name, path, WEIGHTS_FILE)
        with as_unusable(f"adapter {name}: {weights} is broken", UnusableAdapter):
            table = read_table(weights)
        modules = _modules(name, config, table, sizes)
    rank = max(module.rank for module in modules.values())
    if max_rank is not None and rank > max_rank:
        raise UnusableAdapter(
            f"adapter {name} has rank {rank}; the limit is max_adapter_rank {max_rank}"
        )
    return AdapterDescription(name, path, digest_of(path), rank, modules)


def _config(name: str, folder: Path) -> LoraConfig:
    with as_unusable(f"adapter {name} in {folder} cannot be read", UnusableAdapter):
        return read_config(_file(name, folder, CONFIG_FILE))


def _file(name: str, folder: Path, file: str) -> Path:
    if not folder.is_dir():
        raise UnusableAdapter(f"adapter {name}: folder {folder} does not exist")
    if not (folder / file).is_file():
        why = " (other formats can run code)" if file == WEIGHTS_FILE else ""
        raise UnusableAdapter(f"adapter {name}: {folder} has no {file}{why}")
    return folder / file


def digest_of(folder: Path) -> str:
    """Hex digest of an adapter's configuration and weights; raises OSError."""
    digest = hashlib.sha256()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update((folder / file).stat().st_size.to_bytes(8))
        with (folder / file).open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()[:32]


def _modules(
    name: str, config: LoraConfig, table: Mapping[str, StoredTensor], sizes: LinearSizes
) -> dict[str, AdapterModule]:
    """Raises UnusableAdapter unless the tensors are the configuration's and fit the model."""
    pairs = _pairs(name, table, sizes)
    modules = {
        module: _module(name, module, config, pair, table, sizes[module])
        for module, pair in pairs.items()
        if len(pair) == len("AB")
    }
    missing = [
        f"{module} {side}"
        for module in sorted({*pairs, *config.targets(sizes)})
        for side in "AB"
        if side not in pairs.get(module, ())
    ]
    if missing:
        raise UnusableAdapter(
            f"adapter {name} lacks {len(missing)} tensors of the modules that it adapts: "
            f"{_some(missing)}"
        )
    if not modules:
        raise UnusableAdapter(f"adapter {name} adapts no linear layer of the model")
    return modules


def _pairs(name: str, table: Iterable[str], sizes: LinearSizes) -> dict[str, dict[str, str]]:
    """The names of each module's A and B; raises UnusableAdapter for any other tensor."""
    pairs: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for key in table:
        found = _KEY.fullmatch(key)
        module = _TO_LAYERS.sub("model.layers.", found["module"], count=1) if found else ""
        if found and module in sizes and found["side"] not in pairs.get(module, ()):
            pairs.setdefault(module, {})[found["side"]] = key
        else:
            unknown.append(key.removeprefix("base_model.model."))
    if unknown:
        raise UnusableAdapter(
            f"adapter {name} has {len(unknown)} tensors that are no A or B of a linear layer in "
            f"the model's layers: {_some(unknown)}; it is of another base model, or adapts what "
            "Winnow does not, such as embeddings, the LM head or experts"
        )
    return pairs


def _module(
    name: str,
    module: str,
    config: LoraConfig,
    pair: Mapping[str, str],
    table: Mapping[str, StoredTensor],
    size: tuple[int, int],
) -> AdapterModule:
    down, up = table[pair["A"]], table[pair["B"]]
    num_outputs, num_inputs = size
    rank = config.rank_of(module)
    for side, tensor, wanted in (
        ("A", down, (rank, num_inputs)),
        ("B", up, (num_outputs, rank)),
    ):
        if tensor.shape != wanted:
            raise UnusableAdapter(
                f"adapter {name} does not fit the model: {side} of {module} is "
                f"{list(tensor.shape)}; with the model's {num_inputs} inputs, {num_outputs} "
                f"outputs and rank {rank} it is {list(wanted)}"
            )
        if not tensor.dtype.is_floating_point:
            raise UnusableAdapter(
                f"adapter {name}: {side} of {module} is {tensor.dtype}; it must be floating point"
            )
    return AdapterModule(pair["A"], pair["B"], rank, config.scale_of(module))


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    return shown + (", ..." if len(names) > _NAMES_SHOWN else "")
