"""Which DecodeBackend a device gets."""

import logging
from typing import Any

from winnow.attention.decode import DecodeBackend, PagedKV
from winnow.attention.gather import GatherBackend
from winnow.catalog import load

logger = logging.getLogger(__name__)

_PAGED = "winnow.attention.paged"  # imported for CUDA devices only: it needs Triton


def decode_backend(pool: PagedKV, group: int) -> DecodeBackend[Any]:
    """The kernel that reads pages in place, where it works; otherwise GatherBackend.

    group: query heads per KV head.
    """
    if pool.device.type != "cuda":
        return GatherBackend(pool)
    try:
        load(f"{_PAGED}:try_out")(pool, group)
    except Exception as error:  # Triton, its compiler and its driver each have errors of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.warning("decode copies pages, because the attention kernel fails here: %s", reason)
        return GatherBackend(pool)
    backend: DecodeBackend[Any] = load(f"{_PAGED}:PagedBackend")(pool)
    return backend
