"""KV heads that recompression must cut, as the host knows them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from winnow.engine.page_table import Lengths, Pages, Slots


@dataclass(frozen=True, slots=True, eq=False)
class LongHeads:
    """N heads, of any rows and layers, that have more entries than they keep.

    pages: [N, P].  before, after: [N] entries.
    queries: [N, group, w], where each head's window queries are.
    places: [N], each head's place among all KV heads of all layers.
    """

    pages: Pages
    before: Lengths
    after: Lengths
    queries: Slots
    places: Slots

    def passes(self, page_size: int, limit_bytes: int) -> Iterator["LongHeads"]:
        """The heads, the longest first, and of those that follow as many as one pass may take.

        A pass has float32 logits [N, group, w, T] of at most `limit_bytes`, or one head.
        """
        order = np.argsort(-self.before, kind="stable")
        group, window = self.queries.shape[1:]
        while len(order):
            width = -(-int(self.before[order[0]]) // page_size)
            count = max(1, limit_bytes // (4 * group * window * width * page_size))
            some, order = order[:count], order[count:]
            yield LongHeads(
                self.pages[some, :width],
                self.before[some],
                self.after[some],
                self.queries[some],
                self.places[some],
            )
