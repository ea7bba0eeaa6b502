"""The index that says in which of several safetensors files each tensor is."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from winnow.errors import UnusableModel

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARDS_SHOWN = 5


def missing_shards(named: Iterable[Any], names: Collection[str]) -> str | None:
    """Which of the files that an index names are not among `names`; None if all are."""
    shards = set(named)
    if not (missing := sorted(repr(shard) for shard in shards if shard not in names)):
        return None
    shown = ", ".join(missing[:_SHARDS_SHOWN]) + (", ..." if len(missing) > _SHARDS_SHOWN else "")
    return f"{shown}: {len(missing)} of its {len(shards)} files are not there, or not *.safetensors"


def weight_map(index: Path) -> Mapping[str, Any]:
    """The file of each tensor.  Raises UnusableModel for what is no index."""
    try:
        weight_map: Mapping[str, Any] = json.loads(index.read_text())["weight_map"]
        is_empty = not set(weight_map.values())
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UnusableModel(f"{index} is no index of weights") from error
    if is_empty:
        raise UnusableModel(f"{index} names no file of weights")
    return weight_map
