"""A rank that hangs, as a process that is stopped."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from tests.deadlines import SOON_S
from winnow.distributed.commands import Clear, ReadLayer, WriteLayer
from winnow.distributed.ranks import Ranks
from winnow.errors import EngineFailed
from winnow.kv import LayerKV

LARGE = LayerKV(
    layer_idx=0,
    keys=torch.zeros(100_000, 16),
    values=torch.zeros(100_000, 16),
    positions=torch.arange(100_000, dtype=torch.int32),
    head_lengths=(100_000,),
    window_queries=torch.zeros(1, 1, 16),
)


@pytest.fixture
def lost() -> list[str]:
    return []


@pytest.fixture
def ranks(lost: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Two, of which the second is stopped."""
    monkeypatch.setattr("winnow.distributed.ranks.LOADING_TIMEOUT", timedelta(seconds=0.2))
    ranks = Ranks(2, lost.append)
    ranks._start(1, num_threads=1)
    os.kill(ranks.process_ids[0], signal.SIGSTOP)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    "wait",
    [
        Ranks.wait_until_loaded,
        lambda ranks: ranks.ask(ReadLayer(0, 0), LayerKV),
        lambda ranks: ranks.tell(WriteLayer(0, LARGE)),  # more than a pipe holds
    ],
    ids=["loading", "asked", "told"],
)
def test_a_rank_that_hangs_is_given_up_in_time(
    ranks: Ranks, lost: list[str], wait: Callable[[Ranks], object]
) -> None:
    with pytest.raises(EngineFailed, match="rank 1 of 2 does not answer"):
        wait(ranks)
    assert lost == ["rank 1 of 2 does not answer"]
    with pytest.raises(EngineFailed, match="rank 1 of 2 does not answer"):
        ranks.tell(Clear(0))


def test_a_step_that_never_ends_is_given_up_in_time(
    lost: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replayed one: the host waits for the device, and the device for a rank that hangs."""
    monkeypatch.setattr("winnow.distributed.ranks.STEP_TIMEOUT", timedelta(seconds=1))
    given_up = threading.Event()

    def on_lost(reason: str) -> None:
        lost.append(reason)
        given_up.set()

    ranks = Ranks(1, on_lost)
    ranks.wait_until_loaded()
    for _ in range(4):
        with ranks.in_time():
            time.sleep(0.3)
    assert lost == []
    with ranks.in_time():
        assert given_up.wait(SOON_S)
    assert lost == ["a step has not ended after 1 s"]
    ranks.close()


def test_ranks_that_are_given_up_leave_no_folder(ranks: Ranks, lost: list[str]) -> None:
    folder = Path(ranks._folder.name)
    assert folder.is_dir()
    ranks.give_up("tried")
    assert lost == ["tried"]
    assert not folder.exists()
