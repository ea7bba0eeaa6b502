"""Ranks with a GPU each. Left out where there are not two."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.models_in_code import save_tiny_model
from tests.winnow.distributed.conftest import TwoRanks, two_ranks
from tests.winnow.drive import admit, assert_empty, decode_all, prompt, spec
from winnow.engine.graph import recorder_for
from winnow.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="each rank needs a GPU"),
]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[TwoRanks]:
    model = save_tiny_model(tmp_path, head_dim=64, dtype=torch.bfloat16)
    yield from two_ranks(model, "cuda")
    assert not dist.is_initialized()  # no graph was left that keeps rank 0 in the group


@pytest.mark.parametrize("own", [{}, {"decode_budget": 256, "recompress_interval": 32}])
def test_replayed_steps_of_two_gpus_give_the_tokens_of_launched_ones(
    two: TwoRanks, own: dict[str, int]
) -> None:
    answers = []
    for setting in ("auto", "off"):
        recorder = recorder_for(two.own.device, setting)
        engine = two.engine(is_split=True, new_recorder=recorder)
        assert engine._runner.reads_late is (setting == "auto")
        for name in range(8):
            sampling = SamplingParams(500, temperature=name % 2, seed=name, ignore_eos=True)
            length = 100 + 50 * name
            asked = spec(str(name), length, sampling, **own)
            admit(engine, asked, prompt(length, name), model=two.single)
        answers.append(decode_all(engine))
        assert_empty(engine)
        engine.close()
    assert answers[0] == answers[1]
    assert two.lost == []
