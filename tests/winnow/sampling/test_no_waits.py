"""Nothing between the logits and the one read at the end waits for the device."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.winnow.sampling.reference import mixed_states
from winnow.sampling import sample_batch

WAITING = (
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique",
)


class NoWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises at operations whose result, or its size, the host would have to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = [one for one in args[1:2] if isinstance(one, list | tuple)]
        by_mask = name.startswith("index") and any(
            isinstance(one, Tensor) and one.dtype == torch.bool for some in indices for one in some
        )
        if by_mask or any(name.strip("_").startswith(one.strip("_")) for one in WAITING):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def no_waits() -> NoWaits:
    return NoWaits()  # type: ignore[no-untyped-call]


def test_a_batch_of_every_kind_is_sampled_without_waiting() -> None:
    states = mixed_states()
    logits = torch.randn(len(states), 3000)
    with no_waits():
        sampled = sample_batch(logits, states, {0, 2})
    assert len(sampled.read()) == len(states)


def test_a_batch_of_every_kind_is_sampled_on_a_device_without_data() -> None:
    states = mixed_states()
    sampled = sample_batch(torch.empty(len(states), 3000, device="meta"), states, {0, 2})
    assert sampled.columns.device.type == "meta"
    assert len(sampled.columns) == len(states)


@pytest.mark.parametrize(
    "waits",
    [
        lambda values: values.sum().item(),
        lambda values: values[values > 0],
        lambda values: values.nonzero(),
        lambda values: values.unique(),
        lambda values: values.masked_select(values > 0),
        lambda values: bool(values.any()),
    ],
)
def test_the_check_notices_what_waits(waits: Any) -> None:
    with no_waits(), pytest.raises(AssertionError, match="waits for the device"):
        waits(torch.ones(2))
