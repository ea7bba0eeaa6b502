"""Each kernel with inputs of one decode step, and its result in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.on_device import exact
from benchmarks.on_device.pages import append_and_attend, kernel, random_pages
from winnow.kernels import recompression as reference
from winnow.kv_quantization import quantize

_WINDOW = 32  # queries that score, per head
_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Case:
    """run: the kernel; it may be called again.  wanted: its result.  nbytes: what it must move."""

    run: Callable[[], Tensor]
    wanted: Tensor
    nbytes: int
    is_exact: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the model, and of the batch."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    entries: int
    page_size: int
    device: torch.device
    dtype: torch.dtype

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def lengths(self, *shape: int) -> Tensor:
        """Ragged ones: half of the entries to all of them, but in the first head only one."""
        drawn = torch.randint(self.entries // 2, self.entries + 1, shape, device=self.device)
        drawn.view(-1)[0] = 1
        return drawn


def attention_case(sizes: Sizes, *, is_int8: bool = False) -> Case:
    pages = random_pages(
        sizes.lengths(sizes.batch, sizes.num_kv_heads),
        sizes.page_size,
        sizes.head_dim,
        sizes.dtype,
    )
    query = sizes.random(sizes.batch, sizes.num_heads, sizes.head_dim)
    new_keys, new_values = sizes.random(2, sizes.batch, sizes.num_kv_heads, sizes.head_dim)
    entries = torch.stack([pages.keys, pages.values])
    entries.view(2, -1, sizes.head_dim)[:, pages.slots] = torch.stack([new_keys, new_values])
    if is_int8:
        levels, scales = quantize(entries)
        entries = levels.double() * scales.double()[..., None]
        own_scales = scales.movedim(0, -1).contiguous()
        pages = replace(pages, keys=levels[0], values=levels[1], scales=own_scales)
    entry_bytes = sizes.head_dim + 2 if is_int8 else sizes.head_dim * sizes.dtype.itemsize
    return Case(
        lambda: append_and_attend(query, (new_keys, new_values), pages),
        exact.attention(
            query, entries[0], entries[1], pages.table, pages.lengths, sizes.head_dim**-0.5
        ),
        int(pages.lengths.sum()) * 2 * entry_bytes,
    )


def norm_case(sizes: Sizes) -> Case:
    hidden = sizes.random(sizes.batch, sizes.hidden_size)
    weight = sizes.random(sizes.hidden_size)
    norm = kernel("norm", sizes.device).rms_norm
    wanted = exact.rms_norm(hidden, weight, _EPS)
    return Case(lambda: norm(hidden, weight, _EPS), wanted, 2 * hidden.nbytes)


def residual_norm_case(sizes: Sizes) -> Case:
    hidden, residual = sizes.random(2, sizes.batch, sizes.hidden_size)
    weight = sizes.random(sizes.hidden_size)
    norm = kernel("norm", sizes.device).add_rms_norm
    return Case(
        lambda: torch.cat(norm(hidden, residual, weight, _EPS)),
        torch.cat(
            [
                exact.rms_norm(hidden.double() + residual.double(), weight, _EPS),
                hidden.double() + residual.double(),
            ]
        ),
        4 * hidden.nbytes,
    )


def activation_case(sizes: Sizes) -> Case:
    gate_up = sizes.random(sizes.batch, 2 * sizes.intermediate_size)
    silu_mul = kernel("activation", sizes.device).silu_mul
    wanted = exact.silu_mul(gate_up)
    return Case(lambda: silu_mul(gate_up), wanted, gate_up.nbytes * 3 // 2)


def rope_case(sizes: Sizes) -> Case:
    counts = (sizes.num_heads, sizes.num_kv_heads)
    num_turned = sum(counts)
    heads = sizes.random(sizes.batch, num_turned + sizes.num_kv_heads, sizes.head_dim)
    angle = torch.rand(sizes.batch, sizes.head_dim // 2, device=sizes.device).repeat(1, 2) * 6
    cos, sin = angle.cos().to(sizes.dtype), angle.sin().to(sizes.dtype)
    rotate = kernel("rope", sizes.device).rotate
    turned = exact.rotated(heads[:, :num_turned], cos, sin)
    wanted = torch.cat([turned, heads[:, num_turned:].double()], dim=1)

    def run() -> Tensor:
        own = heads.clone()
        rotate(own, cos, sin, *counts)
        return own

    return Case(run, wanted, 4 * heads.nbytes)


def scatter_case(sizes: Sizes) -> Case:
    count = sizes.entries * sizes.num_kv_heads
    entries = (
        sizes.random(count, sizes.head_dim),
        sizes.random(count, sizes.head_dim),
        torch.arange(count, dtype=torch.int32, device=sizes.device),
    )
    slots = torch.randperm(2 * count, device=sizes.device)[:count]
    pool = tuple(part.new_zeros(2 * count, *part.shape[1:]) for part in entries)
    wanted = pool[0].clone().index_copy_(0, slots, entries[0])
    scatter = kernel("scatter", sizes.device).scatter

    def run() -> Tensor:
        scatter(entries, slots, pool)
        return pool[0]

    nbytes = 2 * sum(part.nbytes for part in entries)
    return Case(run, wanted, nbytes, is_exact=True)


def scores_case(sizes: Sizes) -> Case:
    lengths = sizes.lengths(sizes.batch, sizes.num_kv_heads).clamp_min(_WINDOW)
    pages = random_pages(lengths, sizes.page_size, sizes.head_dim, sizes.dtype)
    group = sizes.num_heads // sizes.num_kv_heads
    queries = sizes.random(lengths.numel(), group, _WINDOW, sizes.head_dim)
    given = (
        queries,
        pages.keys,
        pages.table.flatten(0, 1),
        lengths.flatten(),
        sizes.head_dim**-0.5,
    )
    score = kernel("recompression", sizes.device).window_scores
    return Case(
        lambda: score(*given),
        exact.window_scores(*given),
        int(lengths.sum()) * sizes.head_dim * sizes.dtype.itemsize,
    )


def compaction_case(sizes: Sizes) -> Case:
    lengths = torch.full((sizes.batch, sizes.num_kv_heads), sizes.entries, device=sizes.device)
    pages = random_pages(lengths, sizes.page_size, sizes.head_dim, sizes.dtype)
    table, num_kept = pages.table.flatten(0, 1), sizes.entries // 2
    drawn = torch.rand(len(table), sizes.entries, device=sizes.device)
    kept = drawn.topk(num_kept).indices.sort(-1).values
    counts = torch.full((len(table),), num_kept, device=sizes.device)
    wanted = (pages.keys.clone(), pages.values.clone(), pages.positions.clone())
    reference.compact(wanted, table, kept, counts)
    compact = kernel("recompression", sizes.device).compact
    start = (pages.keys, pages.values, pages.positions)
    pool = tuple(part.clone() for part in start)

    def run() -> Tensor:
        compact(pool, table, kept, counts)
        return pool[0]

    num_moved = kept.numel()
    nbytes = 2 * num_moved * 2 * sizes.head_dim * sizes.dtype.itemsize
    return Case(run, wanted[0], nbytes, is_exact=True)


CASES: dict[str, Callable[[Sizes], Case]] = {
    "attention": attention_case,
    "attention to int8": partial(attention_case, is_int8=True),
    "norm": norm_case,
    "norm with residual": residual_norm_case,
    "activation": activation_case,
    "rope, and a copy before it": rope_case,
    "scatter": scatter_case,
    "window scores": scores_case,
    "compaction": compaction_case,
}
