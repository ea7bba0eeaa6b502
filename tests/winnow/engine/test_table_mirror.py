"""What a step tells the device of the page table. Its contents are tested in test_kv_pool.py."""

import numpy as np
import torch

from tests.winnow.pools import SHAPE, layer_of, make_pool
from winnow.engine.kv_pool import KVPool

HEADS = SHAPE.num_layers * SHAPE.num_kv_heads


def step(pool: KVPool, rows: list[int]) -> None:
    (sent_rows, positions), longest = pool.begin_step(
        rows, [0] * len(rows), [rows, [0] * len(rows)]
    )
    pool.plan_step(sent_rows, positions, longest)


def filled(lengths: tuple[int, int], rows: int) -> KVPool:
    pool = make_pool(rows=rows)
    for row in range(rows):
        for layer_idx in range(SHAPE.num_layers):
            pool.write_layer(row, layer_of(layer_idx, lengths))
    return pool


def test_a_step_tells_of_new_pages_and_of_rows_that_were_written() -> None:
    """Pages hold 4 entries."""
    pool = filled((5, 6), rows=2)
    written = pool.table.add_entries([0], [9])
    assert (len(written.pages), written.lengths.shape) == (2 * HEADS, (2, 2))
    assert len(pool.table.add_entries([0], [9]).pages) == 0
    assert len(pool.table.add_entries([0], [9]).pages) == HEADS / 2  # the longer heads
    pool.write_layer(0, layer_of(1, (1, 1)))
    both = pool.table.add_entries([0, 1], [9, 9])
    of_first = SHAPE.num_kv_heads / 2 + SHAPE.num_kv_heads  # one layer goes on, one was written
    assert len(both.pages) == of_first + 2 * HEADS
    assert np.array_equal(both.longest, [10, 7])


def test_a_row_that_was_cleared_starts_from_nothing() -> None:
    pool = filled((5, 6), rows=1)
    step(pool, [0])
    pool.clear(0)
    step(pool, [0])
    assert torch.equal(pool.mirror.lengths[:, 0], torch.ones(2, 2, dtype=torch.int32))


def test_the_copy_gets_twice_as_wide_when_a_head_outgrows_it_and_loses_nothing() -> None:
    pool = make_pool(num_pages=600, rows=2)
    for row, length in ((0, 9), (1, 513)):
        for layer_idx in range(2):
            pool.write_layer(row, layer_of(layer_idx, (length, 3)))
        step(pool, [row])
        assert pool.mirror.width == (128, 256)[row]
    for row in (0, 1):
        pages = torch.from_numpy(pool.table._pages[row]).long()
        copied = pool.mirror.pages[:, row, :, : pages.shape[-1]]
        assert torch.equal(copied[pages > 0], pages[pages > 0])


def test_dummy_rows_take_no_page_and_stay_empty() -> None:
    pool = filled((5, 6), rows=1)
    used, dummy = pool.num_used, pool.mirror.dummy_row
    sent, _ = pool.begin_step([0], [6], [[0, dummy, dummy], [6, 0, 0]])
    plan = pool.plan_step(*sent)
    assert plan.slots[:, 1:].eq(0).all()
    assert plan.lengths[:, 1:].eq(1).all()
    pool.mirror.empty_dummy()
    assert pool.mirror.lengths[:, dummy].eq(0).all()
    assert pool.num_used == used
