"""A tiny model on two ranks, this process and a follower: started once for a module."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from winnow.adapters.ref import AdapterRoom
from winnow.decoder import DecoderModel
from winnow.distributed.loading import load_on_ranks
from winnow.distributed.ranks import Ranks
from winnow.distributed.split_decoder import SplitDecoder
from winnow.engine.decode import DecodeEngine
from winnow.engine.graph import Recorder
from winnow.engine.kv_pool import KVPoolConfig
from winnow.kv import KvDtype
from winnow.models import load_model


@dataclass(frozen=True, slots=True)
class TwoRanks:
    """own: rank 0's share, for decode.  split: for prefill.  single: the model in one process.

    lost: the reasons for which the ranks were given up.
    """

    ranks: Ranks
    own: DecoderModel
    split: SplitDecoder
    single: DecoderModel
    lost: list[str]

    def engine(
        self,
        *,
        is_split: bool,
        memory: int = 32 << 20,
        overcommit: float = 1.0,
        swap_bytes: int = 0,
        kv_dtype: KvDtype = "auto",
        page_size: int = 16,
        new_recorder: Callable[[], Recorder] | None = None,
    ) -> DecodeEngine:
        """With `is_split` on two ranks, which share the memory."""
        return DecodeEngine(
            self.own if is_split else self.single,
            pool_config=KVPoolConfig(memory, page_size, overcommit, kv_dtype),
            max_batch_size=8,
            swap_bytes=swap_bytes,
            ranks=self.ranks if is_split else None,
            new_recorder=new_recorder,
        )


def two_ranks(
    model: Path, device: str = "cpu", adapter_room: AdapterRoom | None = None
) -> Iterator[TwoRanks]:
    lost: list[str] = []
    own, ranks = load_on_ranks(model, 2, lost.append, device=device, adapter_room=adapter_room)
    try:
        single = load_model(model, device=device, adapter_room=adapter_room)
        yield TwoRanks(ranks, own, SplitDecoder(own, ranks), single, lost)
    finally:
        ranks.close()


@pytest.fixture(scope="module")
def two(tiny_models: dict[str, Path]) -> Iterator[TwoRanks]:
    yield from two_ranks(tiny_models["qwen2"])
