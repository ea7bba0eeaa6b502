"""PagedBackend: a kernel that reads pages in place."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.attention.decode import PagedKV, StepPlan
from winnow.attention.options import AttentionOptions
from winnow.catalog import load
from winnow.kernels.attention import append_and_attend
from winnow.kernels.variant import PLAIN, Variant
from winnow.kv_quantization import quantize
from winnow.layers import Layer

_TOLERANCE = 0.02  # of values around 1, in 16 bits
_SPLIT = 512  # entries after which kernels begin to merge partial results

Kernel = Callable[..., Tensor]  # of the signature of `append_and_attend`


@dataclass(frozen=True, slots=True, eq=False)
class PagedPlan:
    """layers: slots, pages and lengths of each, as in StepPlan.  most: no head has more entries.

    first: see `StepPlan.first_visible`.
    """

    layers: list[tuple[Tensor, Tensor, Tensor]]
    rows: Tensor
    most: int
    first: dict[Layer, Tensor]


class PagedBackend:
    """A DecodeBackend whose kernel reads the page table as it is."""

    def __init__(self, pool: PagedKV, kernel: Kernel) -> None:
        self._paged = pool.paged
        self._layers = frozenset(pool.shape.layers)
        self._page_size = pool.page_size
        self._append_and_attend = kernel

    def plan(self, step: StepPlan) -> PagedPlan:
        by_layer = (part.unbind() for part in (step.slots, step.pages, step.lengths))
        most = step.pages.shape[-1] * self._page_size if step.longest is None else max(step.longest)
        first = step.first_visible(self._layers)
        return PagedPlan(list(zip(*by_layer, strict=True)), step.rows, most, first)

    def attend(
        self,
        layer_idx: int,
        plan: PagedPlan,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        slots, pages, lengths = plan.layers[layer_idx]
        output = self._append_and_attend(
            query.select(2, 0),
            keys,
            values,
            self._paged.keys,
            self._paged.values,
            slots,
            pages,
            plan.rows,
            lengths,
            plan.most,
            options.scaling,
            self._paged.scales,
            PLAIN if options.is_plain else self._variant(plan, options),
        )
        return output.unsqueeze(2)  # [B, H, 1, D]

    def _variant(self, plan: PagedPlan, options: AttentionOptions) -> Variant:
        first = plan.first.get(options.layer)
        return Variant(first, self._paged.positions, options.softcap, options.sinks)


def try_out(kernel: str, pool: PagedKV, *groups: int) -> None:
    """One step of the kernel on the pool's device, over pages of its own, beside the reference.

    kernel: its `module:function`.  groups: query heads per KV head, each tried.
    Raises RuntimeError if the results differ, or whatever kept the kernel from running.
    """
    for group in groups:
        _try_out(kernel, pool, group)


def _try_out(kernel: str, pool: PagedKV, group: int) -> None:
    """`try_out` of one group."""
    device, page_size, head_dim = pool.device, pool.page_size, pool.shape.head_dim
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        drawn = torch.randn((*shape, head_dim), generator=generator, device=device)
        return drawn.to(pool.shape.dtype)

    most = 2 * _SPLIT
    lengths = torch.tensor([[1, 7], [_SPLIT + 2, most]], dtype=torch.int32, device=device)
    width = -(-most // page_size)
    pages = torch.arange(4 * width, device=device).view(2, 2, width)
    rows = torch.arange(2, device=device)
    newest = lengths - 1
    last_page = pages.gather(-1, (newest // page_size)[..., None])[..., 0]
    slots = last_page * page_size + newest % page_size
    step = (random(2, 2 * group), random(2, 2), random(2, 2))
    entries = random(2, 4 * width, page_size)
    variants = [PLAIN]
    if not all(layer.is_full for layer in pool.shape.layers):
        positions = torch.arange(4 * width * page_size, dtype=torch.int32, device=device)
        first = slots[:, 0] - _SPLIT // 2
        sinks = random(2 * group)[:, 0].contiguous()
        variants.append(Variant(first, positions.view(-1, page_size), softcap=9.0, sinks=sinks))

    def output(attend: Kernel, variant: Variant) -> Tensor:
        (keys, values), scales = entries.clone(), None
        if pool.paged.scales is not None:
            (keys, values), both = quantize(entries)
            scales = both.movedim(0, -1).contiguous()
        paged = (keys, values, slots, pages, rows, lengths)
        return attend(*step, *paged, most, head_dim**-0.5, scales, variant).float()

    for variant in variants:
        difference = output(load(kernel), variant) - output(append_and_attend, variant)
        if not (error := float(difference.abs().max())) <= _TOLERANCE:
            raise RuntimeError(f"its results are {error:.2g} off; the limit is {_TOLERANCE}")
