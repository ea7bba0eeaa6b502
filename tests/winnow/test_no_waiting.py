from collections.abc import Callable

import pytest
import torch

from tests.winnow.no_waiting import META, HostWaits, no_waiting

FLOATS = torch.empty(4, 4, device=META)
INDICES = torch.empty(3, dtype=torch.int64, device=META)
MASK = torch.empty(4, dtype=torch.bool, device=META)
ON_HOST = torch.ones(4)

WAITS: list[Callable[[], object]] = [
    FLOATS[0, 0].item,
    lambda: float(FLOATS[0, 0]),
    lambda: bool(FLOATS.isfinite().all()),
    FLOATS.tolist,
    FLOATS.cpu,
    lambda: ON_HOST.clone().copy_(FLOATS[0]),
    lambda: FLOATS[INDICES[0] :],
    lambda: range(INDICES[0]),
    MASK.nonzero,
    lambda: torch.where(MASK),
    lambda: FLOATS[MASK],
    lambda: FLOATS.__setitem__(MASK, 0.0),
    lambda: FLOATS.masked_select(MASK),
    lambda: torch.unique(INDICES, return_counts=True),
    INDICES.bincount,
    lambda: INDICES.repeat_interleave(INDICES),
    lambda: torch.equal(FLOATS, FLOATS),
    lambda: ON_HOST.to(META),
    lambda: FLOATS.__setitem__(0, ON_HOST),
    lambda: torch.tensor([1, 2], device=META),
    lambda: torch.as_tensor([1, 2], device="meta"),
    lambda: FLOATS.new_tensor([1, 2]),
    lambda: FLOATS[[0, 2]],
    lambda: FLOATS.__setitem__(([0, 2], 1), 0.0),
]
RUNS_ON: list[Callable[[], object]] = [
    lambda: ON_HOST.to(META, non_blocking=True),
    lambda: FLOATS.to(torch.bfloat16),
    lambda: torch.tensor([1, 2]).tolist(),
    lambda: torch.unique(ON_HOST[ON_HOST > 0]),
    lambda: FLOATS[INDICES],
    lambda: FLOATS.__setitem__(INDICES, 0.0),
    lambda: FLOATS.__setitem__((slice(None), 1), FLOATS[0]),
    lambda: FLOATS.index_fill_(0, INDICES, 0),
    lambda: FLOATS.masked_fill(MASK, 0.0),
    lambda: torch.where(MASK, FLOATS, 0.0),
    lambda: INDICES.repeat_interleave(INDICES, output_size=5),
    lambda: FLOATS.repeat_interleave(2, dim=0),
    lambda: torch.arange(3, device=META).sort(),
]


@pytest.mark.parametrize("call", WAITS)
def test_what_waits_for_the_device_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises((HostWaits, NotImplementedError)), no_waiting():
        call()


@pytest.mark.parametrize("call", RUNS_ON)
def test_what_only_enqueues_work_or_stays_on_the_host_is_not(call: Callable[[], object]) -> None:
    with no_waiting():
        call()
