from datetime import timedelta
from multiprocessing import Pipe

import pytest
import torch

from winnow.distributed.pipes import limit_waiting, receive, send


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(2, 5).to(torch.bfloat16),
        torch.arange(6, dtype=torch.int32)[2:4],
        torch.randn(4, 3).T,
        torch.empty(2, 0, 8),
        torch.tensor(1.5),
    ],
    ids=["float", "bfloat16", "slice", "transposed", "empty", "scalar"],
)
def test_a_tensor_arrives_as_it_was_sent(tensor: torch.Tensor) -> None:
    ours, theirs = Pipe()
    send(ours, {"it": tensor, "n": 3})
    arrived = receive(theirs)
    assert arrived["n"] == 3
    assert (arrived["it"].dtype, arrived["it"].shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(arrived["it"], tensor)


def test_of_a_view_only_its_own_bytes_are_sent() -> None:
    ours, theirs = Pipe()
    send(ours, torch.zeros(1_000_000)[:8])
    assert len(theirs.recv_bytes()) < 1000


def test_a_pipe_whose_other_end_is_gone_says_so() -> None:
    ours, theirs = Pipe()
    theirs.close()
    with pytest.raises(OSError):
        send(ours, 1)
    with pytest.raises((EOFError, OSError)):
        receive(ours)


def test_an_end_that_neither_sends_nor_takes_anything_is_waited_for_so_long() -> None:
    ours, theirs = Pipe()
    limit_waiting(ours, timedelta(milliseconds=20))
    with pytest.raises(OSError):
        receive(ours)
    with pytest.raises(OSError):
        send(ours, bytes(10 << 20))
    theirs.close()
