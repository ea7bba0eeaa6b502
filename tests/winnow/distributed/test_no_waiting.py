"""Steps of several ranks on devices that no host waits for; only sampled tokens are read.

Both ranks are in this process, on PyTorch's meta device, in a group that sends nothing.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.winnow.drive import GREEDY, UNPRUNED, assert_empty, prefill_all, prompt, spec
from tests.winnow.eager_recorder import EagerRecorder
from tests.winnow.no_waiting import META, no_waiting
from winnow.decoder import DecoderModel
from winnow.distributed.commands import Command
from winnow.distributed.follower import Follower
from winnow.distributed.heads import Split
from winnow.distributed.in_step import StepModel
from winnow.distributed.ranks import Ranks
from winnow.engine.decode import DecodeEngine
from winnow.engine.graph import StepGraphs
from winnow.engine.kv_pool import KVPoolConfig
from winnow.models import load_model
from winnow.sampling import Sampled, SampledBatch


class InGroup(Follower):
    """Rank 1, loaded."""

    def __init__(self, own: DecoderModel) -> None:
        self.model = StepModel(own, rank=1)
        self._split = Split(1, 2)


class InProcess(Ranks):
    """Rank 1 does what it is told at once."""

    def __init__(self, follower: Follower) -> None:
        super().__init__(2, print)
        self._follower = follower

    def tell(self, command: Command) -> None:
        self._follower.do(command)

    def tell_each(self, commands: object) -> None:
        (command,) = cast("list[Command]", commands)
        self.tell(command)


@pytest.fixture(autouse=True)
def tokens_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(batch: SampledBatch) -> list[Sampled]:
        return [Sampled(7)] * len(batch.positions)

    monkeypatch.setattr(SampledBatch, "read", read)


def share_on_meta(path: Path, rank: int) -> DecoderModel:
    own = load_model(path, split=Split(rank, 2))
    return DecoderModel(own._model.to(META), own.description, META, own.shape)


@pytest.fixture
def two(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[DecoderModel, Ranks]]:
    """Rank 0's share of a model, and rank 1."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    monkeypatch.setattr(dist, "gather", lambda *_, **__: None)  # which takes all for rank 0's
    own, other = (share_on_meta(tiny_models["llama"], rank) for rank in (0, 1))
    ranks = InProcess(InGroup(other))
    yield own, ranks
    ranks.close()


@pytest.mark.parametrize("replays", [True, False])
def test_no_step_of_any_rank_waits_for_the_device(
    tiny_models: dict[str, Path],
    two: tuple[DecoderModel, Ranks],
    monkeypatch: pytest.MonkeyPatch,
    replays: bool,
) -> None:
    """Nor one whose steps are recorded again, as a head outgrows the table on the device."""
    monkeypatch.setattr(StepGraphs, "_try_out", StepGraphs._recording)  # which reads logits
    monkeypatch.setattr("winnow.engine.table_mirror._FIRST_WIDTH", 16)
    single = load_model(tiny_models["llama"])
    prefilled = {n: prefill_all(single, prompt(n), UNPRUNED) for n in (17, 40, 300)}
    own, ranks = two
    with no_waiting():
        engine = DecodeEngine(
            own,
            pool_config=KVPoolConfig(32 << 20),
            max_batch_size=8,
            ranks=ranks,
            new_recorder=EagerRecorder if replays else None,
        )
        for length, (layers, result) in prefilled.items():
            cut = {"decode_budget": 30, "recompress_interval": 4}
            sampling = replace(GREEDY, temperature=1.0, top_p=0.9)
            reservation = engine.reserve(spec(str(length), length, sampling, **cut))
            for layer in layers:
                reservation.write_layer(layer)
            engine.start(reservation, result.final_hidden, result.report.next_position)
            engine.step()
            engine.step()
        outputs = [output for _ in range(GREEDY.max_tokens + 1) for output in engine.step()]
    assert [output.error for output in outputs if output.error] == []
    assert sum(output.finished for output in outputs) == len(prefilled)
    assert engine._runner.reads_late is replays
    assert_empty(engine)
