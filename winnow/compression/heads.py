"""KV heads as recompression sees them: many at once, of any lengths, in the pages of a pool."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.kernels import recompression


@dataclass(frozen=True, slots=True)
class RecompressionKernels:
    """window_scores, compact: see `winnow.kernels.recompression`.  rkv_scores: see rkv.py.
    best_entries: see recompress.py.
    """

    window_scores: Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
    rkv_scores: Callable[..., Tensor]
    best_entries: Callable[[Tensor, Tensor, int, Tensor, int, int], Tensor]
    compact: Callable[[tuple[Tensor, ...], Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True, eq=False)
class PagedHeads:
    """N KV heads, and the queries of the last w tokens, whose entries are each head's last.

    queries: [N, group, w, D].  keys: [num_pages, page_size, D] of the whole pool.
    pages: [N, P] and lengths: [N] of each head, more than w entries.
    scaling: of the attention logits.  scales: [num_pages, page_size, 2] of int8 keys and values.
    softcap, sinks: as in `winnow.kernels.recompression.window_scores`.
    """

    queries: Tensor
    keys: Tensor
    pages: Tensor
    lengths: Tensor
    scaling: float
    kernels: RecompressionKernels
    scales: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def window(self) -> int:
        return self.queries.shape[2]

    def is_candidate(self) -> Tensor:
        """Whether an entry is before the window: [N, T] bool, T = P * page_size."""
        entry = torch.arange(self.pages.shape[1] * self.keys.shape[1], device=self.pages.device)
        return entry < (self.lengths - self.window)[:, None]

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor | None]:
        """What every kernel that scores begins with."""
        return (self.queries, self.keys, self.pages, self.lengths, self.scaling, self.scales)

    def window_scores(self) -> Tensor:
        """Attention that each entry receives from its head's window, summed: [N, T] float32."""
        if self.softcap is None and self.sinks is None:
            return self.kernels.window_scores(*self.operands)
        return recompression.window_scores(*self.operands, self.softcap, self.sinks)

    def best_entries(self, scores: Tensor, budgets: Tensor, smallest: int, largest: int) -> Tensor:
        """The window's entries, and those before it with the best scores: see recompress.py.

        scores: [N, T] float32.  budgets: [N] int64, from `smallest` to `largest`.
        """
        return self.kernels.best_entries(
            scores, self.lengths, self.window, budgets, smallest, largest
        )
