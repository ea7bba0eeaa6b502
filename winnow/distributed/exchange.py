"""What goes between rank 0 and the others while they compute and prune a layer of a prompt."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def share(tensor: Tensor) -> None:
    """Rank 0: give every rank the tensor; they call `receive`."""
    dist.broadcast(tensor.contiguous(), src=0)


def receive(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Other ranks: what rank 0 shares."""
    tensor = torch.empty(*shape, dtype=dtype, device=device)
    dist.broadcast(tensor, src=0)
    return tensor


def scatter_heads(own: Tensor, every: Tensor | None = None) -> None:
    """Fill `own` [2, own heads, T, D] with this rank's heads of rank 0's `every` [2, H, T, D]."""
    parts = None
    if every is not None:
        parts = [part.contiguous() for part in every.chunk(dist.get_world_size(), dim=1)]
    dist.scatter(own, parts, src=0)


def gather_heads(own: Tensor, dim: int) -> Tensor:
    """Rank 0: all ranks' tensors, which have heads along `dim`, one after another."""
    own = own.contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.gather(own, parts, dst=0)
    return torch.cat(parts, dim=dim)


def give_heads(own: Tensor) -> None:
    """Other ranks: their part of `gather_heads`."""
    dist.gather(own.contiguous(), dst=0)


def give(tensor: Tensor) -> None:
    """Other ranks: a tensor for rank 0, which calls `take`."""
    dist.send(tensor.contiguous(), dst=0)


def take(rank: int, shape: Sequence[int], like: Tensor) -> Tensor:
    """Rank 0: what another rank gives."""
    tensor = like.new_empty(tuple(shape))
    dist.recv(tensor, src=rank)
    return tensor
