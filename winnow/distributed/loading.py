"""Loading a model on several ranks, of which this process is rank 0."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Unpack

import torch

from winnow.adapters.description import AdapterDescription
from winnow.adapters.ref import AdapterRoom
from winnow.checkpoint import empty_network
from winnow.checks import require_first_gpu
from winnow.decoder import DecoderModel
from winnow.distributed.commands import FillAdapter, Filled
from winnow.distributed.group import device_of, expect_steps
from winnow.distributed.heads import Split, require_divides
from winnow.distributed.ranks import Ranks
from winnow.distributed.weights import require_splits
from winnow.errors import InvalidSetting, UnusableAdapter, UnusableModel
from winnow.load_options import LoadOptions
from winnow.model_files import ModelDescription, describe_model, load_config
from winnow.models import load_model
from winnow.quantization.settings import require_quantize


def load_on_ranks(
    model: str | Path,
    num_ranks: int,
    on_lost: Callable[[str], object],
    *,
    device: str = "cpu",
    num_threads: int = 1,
    extension: str | None = None,
    adapter_room: AdapterRoom | None = None,
    **options: Unpack[LoadOptions],
) -> tuple[DecoderModel, Ranks]:
    """Rank 0's share of the model, and the other ranks, which have loaded theirs.

    A process has one such model at most.  on_lost: see Ranks.  device: `cpu`, or `cuda`, of which
    rank r takes the GPU r.  num_threads: of each rank.  extension: `module:class` of what
    the others do besides, see follower.Extension.
    adapter_room, options: as for `load_model`.
    Raises UnusableModel or InvalidSetting, before any other rank is started if it can be known.
    """
    _require_gpus(device, num_ranks)
    description = describe_model(model, device=device, **options)
    require_splittable(description, num_ranks)
    path = description.path  # the same for all, whatever the hub's branch is a moment later
    ranks = Ranks(num_ranks, on_lost, extension)
    try:
        ranks.start(path, device, num_threads, adapter_room=adapter_room, **options)
        own = load_model(
            path,
            device=device_of(device, 0),
            split=Split(0, num_ranks),
            adapter_room=adapter_room,
            **options,
        )
        ranks.wait_until_loaded()
        if own.adapters is not None:
            own.adapters.fill_others = partial(_fill_others, ranks)
        expect_steps()
    except BaseException:
        ranks.close()
        raise
    return own, ranks


def _fill_others(ranks: Ranks, slot: int, description: AdapterDescription) -> None:
    for rank, filled in enumerate(ranks.ask(FillAdapter(slot, description), Filled), start=1):
        if filled.refusal is not None:
            raise UnusableAdapter(f"rank {rank} of {ranks.num_ranks}: {filled.refusal}")


def _require_gpus(device: str, num_ranks: int) -> None:
    """Raise InvalidSetting unless each rank finds a GPU of its own, if they are to use GPUs."""
    require_first_gpu(device)
    if device.startswith("cuda") and (found := torch.cuda.device_count()) < num_ranks:
        raise InvalidSetting(
            f"tensor_parallel is {num_ranks}, each with its own GPU; this process sees {found}",
            param="tensor_parallel",
        )


def require_splittable(description: ModelDescription, num_ranks: int) -> None:
    """Raise InvalidSetting or UnusableModel unless so many ranks can share the model."""
    if not description.path.is_dir():
        raise UnusableModel(f"{description.path} is a GGUF file, which ranks cannot share")
    quantization = description.quantization
    if quantization is not None and (quantization.dequantize or quantization.name != "fp8"):
        raise UnusableModel(
            f"{description.path} is quantized by {quantization.name}, which ranks cannot share"
        )
    require_quantize(description.quantize, "cpu", num_ranks)
    require_divides(num_ranks, description.shape)
    require_splits(empty_network(load_config(description.path)))
