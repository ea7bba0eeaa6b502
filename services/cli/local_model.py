"""The model in this process of a command, and which of its adapters answers."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.common.settings import Settings
from winnow.errors import InvalidSetting

if TYPE_CHECKING:
    from evals.local_model import LocalModel


def open_local_model(
    args: argparse.Namespace,
    settings: Settings,
    pruning: Mapping[str, Any],
    record_window: int | None = None,
) -> "LocalModel":
    """What `winnow eval` and `winnow calibrate` put their prompts to.

    args: `adapter`, `batch_size` and `chat`.
    pruning, record_window: as in LocalModel.
    """
    adapters = adapter_folder(args.adapter, settings)
    import torch  # noqa: PLC0415 - slow to load

    from evals.local_model import LocalModel  # noqa: PLC0415 - loads transformers

    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    return LocalModel(
        settings.model_source,
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        quantize=settings.quantize,
        dequantize=settings.dequantize,
        kv_dtype=settings.kv_dtype,
        kv_memory_bytes=settings.kv_memory_bytes,
        max_batch_size=args.batch_size,
        pruning=dict(pruning),
        chat=args.chat,
        record_window=record_window,
        adapters=adapters,
        prefix_cache_bytes=int(settings.prefix_cache_bytes),
        prefix_cache_device=settings.prefix_cache_device,
        prefix_cache_device_bytes=int(settings.prefix_cache_device_bytes),
    )


def adapter_folder(adapter: str | None, settings: Settings) -> dict[str, Path]:
    """The folder of the adapter that is asked for, by its name; empty for None.

    Raises InvalidSetting if the settings do not name it.
    """
    if adapter is None:
        return {}
    if adapter not in settings.adapters:
        known = ", ".join(settings.adapters) or "none"
        raise InvalidSetting(f"--adapter is {adapter}; --adapters names {known}", param="adapter")
    return {adapter: settings.adapters[adapter]}
