"""Rank 0's side of decode steps: the other ranks are told of each, and compute it with this one."""

from collections.abc import Callable

from winnow.decoder import DecoderModel
from winnow.distributed.commands import PrepareSteps, Step
from winnow.distributed.in_step import StepModel, shared_steps
from winnow.distributed.split_head import SplitHead
from winnow.distributed.split_pool import SplitPool
from winnow.engine.graph import Recorder
from winnow.engine.runner import Computed, LaunchedStep, ModelRunner
from winnow.engine.sequence import Sequence
from winnow.errors import WinnowError
from winnow.sampling import Sampled


class SplitRunner(ModelRunner):
    """Runs a step on all ranks; a step that fails on one of them is the end of all.

    new_recorder: see StepRunner; the other ranks get it through a pipe.
    """

    def __init__(
        self,
        model: DecoderModel,
        pool: SplitPool,
        max_batch_size: int,
        new_recorder: Callable[[], Recorder] | None,
    ) -> None:
        self._pool = pool
        self._ranks = pool.ranks
        with self._ranks.in_step(), self._ranks.in_time():
            self._ranks.tell(PrepareSteps(new_recorder))
            steps = shared_steps(StepModel(model), pool, max_batch_size, new_recorder)
        super().__init__(SplitHead(model, pool.ranks), steps)

    def _compute(self, going: list[Sequence]) -> Computed:
        rows = [seq.row for seq in going]
        width = self._pool.table.width_after_step(rows)
        with self._ranks.in_step():
            slots = [seq.spec.adapter_slot for seq in going]
            self._ranks.tell(Step(rows, list(map(self._rotary_position, going)), width, slots))
            self._pool.mirror.widen(width)
            return super()._compute(going)

    def read(self, launched: LaunchedStep) -> dict[Sequence, Sampled | WinnowError]:
        with self._ranks.in_time():
            return super().read(launched)
