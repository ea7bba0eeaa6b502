"""The model of a worker: in its own process, or shared with other ranks."""

import logging
import os

from services.common.settings import Settings
from winnow.decoder import DecoderModel
from winnow.distributed.loading import load_on_ranks
from winnow.distributed.ranks import Ranks
from winnow.models import load_model


def load_worker_model(
    settings: Settings, num_ranks: int, num_threads: int, extension: str
) -> tuple[DecoderModel, Ranks | None]:
    """The model, or rank 0's share of it and the other ranks.

    num_threads: of each rank.  extension: as for `load_on_ranks`.

    The process ends when one of them does: its KV is gone, and what this one computes may be
    waiting for it. To others that is a worker that died: requests go on elsewhere.
    Raises UnusableModel or InvalidSetting.
    """
    model, ranks = _load(settings, num_ranks, num_threads, extension)
    if model.adapters is not None:
        model.adapters.read(settings.adapters)
    return model, ranks


def _load(
    settings: Settings, num_ranks: int, num_threads: int, extension: str
) -> tuple[DecoderModel, Ranks | None]:
    model, device, room = settings.model_source, settings.device, settings.adapter_room()
    options = settings.load_options
    if num_ranks == 1:
        return load_model(model, device=device, adapter_room=room, **options), None
    return load_on_ranks(
        model,
        num_ranks,
        _end_process,
        device=device,
        num_threads=num_threads,
        extension=extension,
        adapter_room=room,
        **options,
    )


def _end_process(_: str) -> None:
    logging.shutdown()
    os._exit(1)
