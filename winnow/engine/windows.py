"""How many entries and pages the heads of windowed layers hold, as the host knows it.

The host knows how many entries a head has, not their positions. But these ascend, and the last one
is the newest token's: the i-th from the end lies at least i positions before it. What that puts out
of the window no later token attends to, and once it fills a page, the page is freed. An entry that
lies farther back than it must stays a little longer; attention hides it by its position.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from winnow.kv import ModelShape

ENDLESS = 2**62  # entries: more than any head has

Lengths = NDArray[np.int64]


class Windows:
    """The windows of a model's layers, for pages of `page_size` entries.

    Every layer has the heads of the one with the most; those that it lacks hold nothing.

    layers: indices of the layers with a window.  full: of those that attend to everything.
    has_head: [L, H_kv] bool.
    most: [L, H_kv] entries that a head holds at most, up to a page more than it sees.
    width: pages that a head of a windowed layer holds at most.
    """

    def __init__(self, shape: ModelShape, page_size: int) -> None:
        self._page_size = page_size
        self.layers = [idx for idx, layer in enumerate(shape.layers) if layer.window is not None]
        self.full = list(shape.full_layers)
        self._windowed = [shape.layers[idx] for idx in self.layers]
        windows = [ENDLESS if layer.window is None else layer.window for layer in shape.layers]
        num_heads = np.array([size.num_kv_heads for size in shape.sizes])
        self.has_head: NDArray[np.bool_] = np.arange(shape.num_kv_heads) < num_heads[:, None]
        self.most = (np.array(windows)[:, None] + page_size - 1) * self.has_head
        self.width = int((-(-self.most[self.layers] // page_size)).max(initial=0))

    def of_every_head(self, lengths: Sequence[int]) -> Lengths:
        """Entries [H_kv] of a layer's heads, with 0 for those that it lacks."""
        every = np.zeros(self.has_head.shape[1], dtype=np.int64)
        every[: len(lengths)] = lengths
        return every

    def held(self, lengths: Lengths) -> Lengths:
        """The most entries that heads hold which would have `lengths` [..., L, H_kv] otherwise."""
        held: Lengths = np.minimum(lengths, self.most)
        return held

    def cut(self, lengths: Lengths, budgets: Sequence[int]) -> Lengths:
        """Entries that recompression leaves to heads: in full layers, each row's budget at most.

        lengths: [B, L, H_kv].  budgets: [B].
        """
        after = lengths.copy()
        after[:, self.full] = np.minimum(after[:, self.full], np.array(budgets)[:, None, None])
        return after

    def pages_lost(self, lengths: Lengths, positions: Sequence[int]) -> Lengths:
        """First pages that windowed heads lose as a token comes: [B, windowed layers, H_kv].

        lengths: [B, windowed layers, H_kv], that token's entry included.  positions: [B] of it.
        """
        seen = {
            layer: [position + 1 - layer.first_visible(position) for position in positions]
            for layer in set(self._windowed)
        }
        by_layer = np.array([seen[layer] for layer in self._windowed], dtype=np.int64)
        most = by_layer.reshape(-1, len(positions)).T  # [B, windowed layers]
        lost: Lengths = np.maximum(lengths - most[..., None], 0) // self._page_size
        return lost
