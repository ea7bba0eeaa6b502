"""Rank 0's page table, and those of the other ranks as they will be once they have caught up.

Every rank does the same to its own table, so rank 0 can keep theirs without asking. A head may be
shorter on one rank than on another; what KVManager counts are the pages of the rank that has most.
"""

from collections.abc import Mapping, Sequence

from winnow.engine.page_table import Lengths, Pages, PageTable, TableChanges
from winnow.kv import LayerKV, ModelShape


class SplitTable(PageTable):
    """Its own pages are rank 0's.  others: the tables of ranks 1 and up."""

    def __init__(
        self, shape: ModelShape, page_size: int, num_pages: int, num_rows: int, num_ranks: int
    ) -> None:
        super().__init__(shape, page_size, num_pages, num_rows)
        self.others = [
            PageTable(shape, page_size, num_pages, num_rows) for _ in range(num_ranks - 1)
        ]

    @property
    def num_free(self) -> int:
        return min([super().num_free, *(table.num_free for table in self.others)])

    def all_lengths(self, rows: list[int]) -> list[Lengths]:
        """Each rank's `lengths`."""
        return [self.lengths(rows), *(table.lengths(rows) for table in self.others)]

    def pages_held(self, row: int) -> int:
        return max([super().pages_held(row), *(table.pages_held(row) for table in self.others)])

    def pages_within_reach(self, row: int, extra_entries: int, cap: int) -> int:
        reach = [table.pages_within_reach(row, extra_entries, cap) for table in self.others]
        return max([super().pages_within_reach(row, extra_entries, cap), *reach])

    def pages_after_step(self, rows: list[int]) -> dict[int, int]:
        after = [table.pages_after_step(rows) for table in self.others]
        after.append(super().pages_after_step(rows))
        return {row: max(pages[row] for pages in after) for row in rows}

    def width_after_step(self, rows: list[int]) -> int:
        widths = [table.width_after_step(rows) for table in self.others]
        return max([super().width_after_step(rows), *widths])

    def add_entries(self, rows: list[int], positions: Sequence[int]) -> TableChanges:
        for table in self.others:
            table.add_entries(rows, positions)
        return super().add_entries(rows, positions)

    def replace_queries(self, row: int, num_pages: int) -> Pages:
        for table in self.others:
            table.replace_queries(row, num_pages)
        return super().replace_queries(row, num_pages)

    def clear(self, row: int) -> None:
        for table in self.others:
            table.clear(row)
        super().clear(row)

    def replace_others(self, row: int, parts: list[LayerKV]) -> None:
        """`replace_layer` on the ranks 1 and up; parts: their heads of the layer."""
        self.replace_arrived(row, [{part.layer_idx: part.head_lengths} for part in parts])

    def replace_arrived(self, row: int, arrived: Sequence[Mapping[int, tuple[int, ...]]]) -> None:
        """`replace_layer` of some layers; of each rank from 1 on their head lengths, by layer."""
        for table, layers in zip(self.others, arrived, strict=True):
            for layer_idx, head_lengths in layers.items():
                table.replace_layer(row, layer_idx, head_lengths)

    def cut_others(self, rows: list[int], budgets: list[int]) -> None:
        """Recompression of rows to their budgets of entries per head, on the ranks 1 and up."""
        for table in self.others:
            table.shorten(rows, self.windows.cut(table.lengths(rows), budgets))
