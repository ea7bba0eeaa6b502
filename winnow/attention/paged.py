"""PagedBackend: a kernel that reads pages in place, for CUDA devices.  Needs Triton."""

import torch
from torch import Tensor

from winnow.attention.decode import PagedKV, StepPlan
from winnow.kernels import attention as reference
from winnow.kernels.gpu.attention import SPLIT, append_and_attend

_TOLERANCE = 0.02  # of values around 1, in 16 bits


class PagedBackend:
    """A DecodeBackend whose plan is the pool's own."""

    def __init__(self, pool: PagedKV) -> None:
        self._pool = pool
        size = (2, -1, pool.page_size, pool.vectors.shape[1])
        self._keys, self._values = pool.vectors.view(size)

    def plan(self, rows: list[int], positions: Tensor) -> StepPlan:
        return self._pool.plan_step(rows, positions)

    def attend(
        self,
        layer_idx: int,
        plan: StepPlan,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
    ) -> Tensor:
        output = append_and_attend(
            query[:, :, 0],
            keys,
            values,
            self._keys,
            self._values,
            plan.slots[layer_idx],
            plan.pages[layer_idx],
            plan.lengths[layer_idx],
            scaling,
        )
        return output[:, :, None]  # [B, H, 1, D]


def try_out(pool: PagedKV, group: int) -> None:
    """One step of the kernel on the pool's device, over pages of its own, beside the reference.

    group: query heads per KV head.
    Raises RuntimeError if the results differ, or whatever kept the kernel from running.
    """
    device, page_size, head_dim = pool.device, pool.page_size, pool.vectors.shape[1]
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        drawn = torch.randn((*shape, head_dim), generator=generator, device=device)
        return drawn.to(pool.vectors.dtype)

    lengths = torch.tensor([[1, 7], [SPLIT + 2, 2 * SPLIT]], device=device)
    width = -(-2 * SPLIT // page_size)
    pages = torch.arange(4 * width, device=device).view(2, 2, width)
    newest = lengths - 1
    last_page = pages.gather(-1, (newest // page_size)[..., None])[..., 0]
    slots = last_page * page_size + newest % page_size
    step = (random(2, 2 * group), random(2, 2), random(2, 2))
    entries = random(2, 4 * width, page_size)
    outputs = []
    for attend in (append_and_attend, reference.append_and_attend):
        keys, values = entries.clone()
        outputs.append(attend(*step, keys, values, slots, pages, lengths, head_dim**-0.5).float())
    error = float((outputs[0] - outputs[1]).abs().max())
    if not error <= _TOLERANCE:
        raise RuntimeError(f"its results are {error:.2g} off; the limit is {_TOLERANCE}")
