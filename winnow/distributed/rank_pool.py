"""A follower's side of decode: its heads' pages and query rings, and its share of each step."""

from dataclasses import replace

import torch
from torch import Tensor

from winnow.attention import AttentionOptions
from winnow.distributed.arrivals import Arrival, Arrivals
from winnow.distributed.commands import (
    Arrived,
    Clear,
    Cut,
    Expect,
    OpenPool,
    OpenRing,
    PrepareSteps,
    ReadLayer,
    Record,
    Step,
    TakeArrived,
    WriteLayer,
)
from winnow.distributed.heads import Split
from winnow.distributed.in_step import StepModel, shared_steps
from winnow.engine.head_cutter import HeadCutter
from winnow.engine.kv_pool import KVPool
from winnow.engine.query_ring import QueryRing, push_queries
from winnow.engine.step_forward import UNREAD
from winnow.engine.step_runner import StepRunner
from winnow.errors import TransferDamaged
from winnow.kv import LayerKV


class RankPool:
    """The pages of one rank's heads. Whose they are is rank 0's to decide; this does as it does.

    arrivals: of KV that comes to this rank, for rows that rank 0 has named.
    """

    _steps: StepRunner

    def __init__(self, model: StepModel, opened: OpenPool, split: Split) -> None:
        self._model = model
        self._num_rows = opened.num_rows
        self._split = split
        self.arrivals = Arrivals()
        self._arriving: dict[int, tuple[str, int]] = {}  # request and attempt, by row
        self._pool = KVPool(model.shape, opened.config, opened.num_rows, model.device)
        self._cutter = HeadCutter(self._pool)
        self._rings: dict[int, QueryRing] = {}  # by row
        self._options: list[AttentionOptions] = []  # of each layer, known after a step
        self._step_rows: list[int] = []  # of the last step, and its queries
        self._queries: list[Tensor] = []

    def write(self, written: WriteLayer) -> None:
        self._place(written.row, written.layer)

    def _place(self, row: int, layer: LayerKV) -> None:
        with torch.inference_mode():  # a mode of the thread, which may be that of a transfer
            self._pool.write_layer(row, layer)
            if row in self._rings:
                self._rings[row].seed(layer.layer_idx, layer.window_queries)

    def expect(self, wanted: Expect) -> None:
        heads = self._split.heads(wanted.expected.shape.num_kv_heads)
        expected = replace(wanted.expected, heads=heads)
        arrival = Arrival(expected, lambda layer: self._place(wanted.row, layer))
        self._arriving[wanted.row] = wanted.request_id, wanted.attempt
        self.arrivals.expect(wanted.request_id, wanted.attempt, arrival)

    def take_arrived(self, wanted: TakeArrived) -> Arrived:
        key = self._arriving.pop(wanted.row)
        arrival = self.arrivals.of(*key)
        self.arrivals.drop(*key)
        try:
            return Arrived(arrival.head_lengths(), arrival.payload_bytes)
        except TransferDamaged as damage:
            return Arrived([], 0, damage.message)

    def read(self, wanted: ReadLayer) -> LayerKV:
        """A copy in host memory."""
        ring = self._rings.get(wanted.row)
        queries = ring.ordered(wanted.layer_idx) if ring else None
        return self._pool.read_layer(wanted.row, wanted.layer_idx, queries).to("cpu")

    def open_ring(self, opened: OpenRing) -> None:
        self._rings[opened.row] = QueryRing(self._pool, opened.row, opened.window_size)

    def clear(self, cleared: Clear) -> None:
        if cleared.row in self._arriving:
            self.arrivals.drop(*self._arriving.pop(cleared.row))
        self._rings.pop(cleared.row, None)
        self._pool.clear(cleared.row)

    def prepare_steps(self, prepared: PrepareSteps) -> None:
        recorder = prepared.new_recorder
        self._steps = shared_steps(self._model, self._pool, self._num_rows, recorder)

    def step(self, step: Step) -> None:
        self._pool.mirror.widen(step.width)
        self._step_rows = step.rows
        unread = [UNREAD] * len(step.rows)
        _, outputs = self._steps.run(step.rows, step.positions, unread, step.slots)
        self._options, self._queries = outputs.options, outputs.queries

    def record(self, wanted: Record) -> None:
        rings = {idx: self._rings[self._step_rows[idx]] for idx in wanted.batch_rows}
        push_queries(self._pool, rings, self._queries)

    def cut(self, cut: Cut) -> None:
        rings = [self._rings[row] for row in cut.rows]
        self._cutter.cut(cut.rows, rings, cut.budgets, cut.settings, self._options)
