"""StepGraphs: a decode step's forward pass, recorded for a ladder of batch sizes.

A batch is padded to the next size with dummy rows, which write to the page that no row owns. All
that a replay reads has been put into tensors that stay where they are: the page table and its
lengths, `newest` tokens, and the `inputs` of its size.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from winnow.attention import AttentionOptions
from winnow.decoder import DecoderModel
from winnow.engine.graph.cuda import refusing_waits
from winnow.engine.graph.recorder import Recorder, Recording
from winnow.engine.step_forward import LayerOutputs, StepForward
from winnow.engine.table_mirror import TableMirror
from winnow.errors import one_line
from winnow.to_device import indices_to_device

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_SIZES_APART = 32  # above these
_MOST = 512  # of a larger batch, launching the kernels takes less time than running them
_TOLERANCE = 0.02  # of the largest logit
_LEAST = 1e-6  # that the largest counts as


T = TypeVar("T")


class RecordingFailed(Exception):
    """A step could not be recorded, or its recording computes something else."""


def batch_sizes(max_batch_size: int) -> list[int]:
    """The sizes that are recorded, ascending; the last is the largest batch, up to _MOST."""
    largest = min(max_batch_size, _MOST)
    above = range(_SIZES[-1] + _SIZES_APART, largest, _SIZES_APART)
    return [*(size for size in (*_SIZES, *above) if size < largest), largest]


# Given why this process cannot go on, or None: why one of all that record together cannot, or None.
Agree = Callable[[str | None], str | None]


def alone(reason: str | None) -> str | None:
    """`Agree` for a process that records by itself."""
    return reason


class StepGraphs:
    """The recordings of one model and pool. `new_recorder` is called for each width of the table.

    When a head outgrows the table that the recordings read, they are made again, each when it is
    needed next.
    agree: called whenever something was recorded or tried out, so that processes whose steps depend
    on one another replay all of them or none.
    The constructor records every size, while no other thread uses the device; raises
    RecordingFailed if that fails, or if a recording computes something else than the step itself.
    """

    def __init__(
        self,
        new_recorder: Callable[[], Recorder],
        model: DecoderModel,
        mirror: TableMirror,
        forward: StepForward,
        max_batch_size: int,
        agree: Agree = alone,
    ) -> None:
        self._new_recorder = new_recorder
        self._agree = agree
        self._model = model
        self._mirror = mirror
        self._forward = forward
        self._sizes = batch_sizes(max_batch_size)
        self._inputs = {
            size: torch.zeros(3, size, dtype=torch.int64, device=model.device)
            for size in self._sizes
        }
        self._options: list[AttentionOptions] = []
        self._recorder: Recorder | None = None
        self._start_over()
        self._agreed(self._require_no_waiting)
        for size in reversed(self._sizes):  # smaller ones fit into the memory of larger ones
            self._try_out(size)

    def padded(self, inputs: list[list[int]]) -> list[list[int]] | None:
        """A step's inputs (see StepForward), filled up with dummy rows; None if it has too many."""
        rows, positions, tokens = inputs
        size = next((size for size in self._sizes if size >= len(rows)), None)
        if size is None:
            return None
        rest = size - len(rows)
        dummies = [self._mirror.dummy_row] * rest
        return [rows + dummies, positions + [0] * rest, tokens + [0] * rest]

    def run(self, padded: Tensor) -> LayerOutputs:
        """Replay a step that the pool has begun; with logits, and overwritten by the next replay.

        padded: as from `padded`, on the device.
        Raises RecordingFailed, before any row has changed, if it must be recorded again and cannot.
        """
        size = padded.shape[1]
        if self._mirror.width != self._width:
            self._start_over()
        recording = self._recording(size)
        self._inputs[size].copy_(padded)
        hidden, logits, *queries = recording.replay()
        return LayerOutputs(hidden, queries, self._options, logits)

    def _start_over(self) -> None:
        self._recordings: dict[int, Recording] = {}
        self._recorder = None
        self._width = self._mirror.width

    def _recording(self, size: int) -> Recording:
        if size not in self._recordings:
            self._inputs[size].copy_(self._dummies(size, 0))
            self._recordings[size] = self._agreed(lambda: self._record(size))
        return self._recordings[size]

    def _record(self, size: int) -> Recording:
        if self._recorder is None:
            self._recorder = self._new_recorder()
        return self._recorder.record(lambda: self._step(size))

    def _agreed(self, do: Callable[[], T]) -> T:
        """What `do` gives; raises RecordingFailed if it fails, here or in another process."""
        reason = None
        try:
            result = do()
        except Exception as error:  # a model and Triton's compiler have errors of their own
            reason = one_line(error)
        if (agreed := self._agree(reason)) is not None:
            raise RecordingFailed(agreed)
        return result

    def _step(self, size: int) -> tuple[Tensor, ...]:
        computed = self._forward(self._inputs[size])
        self._forward.empty_dummy()
        self._options = computed.options
        return computed.hidden, self._model.logits(computed.hidden), *computed.queries

    def _dummies(self, size: int, number: int) -> Tensor:
        """A step of dummy rows alone, which all feed token `number` at position `number`."""
        rows = [[self._mirror.dummy_row] * size, [number] * size, [number] * size]
        return indices_to_device([rows], self._model.device)[0]

    def _require_no_waiting(self) -> None:
        """Raise RuntimeError if a step makes the host wait: a capture fails then, and harms others.

        What is made once, at first, may be waited for.
        """
        size = self._sizes[0]
        self._inputs[size].copy_(self._dummies(size, 0))
        self._step(size)
        with refusing_waits(self._model.device):
            self._step(size)

    def _try_out(self, size: int) -> None:
        recording = self._recording(size)
        self._agreed(lambda: self._require_same(size, recording))

    def _require_same(self, size: int, recording: Recording) -> None:
        """Raise RecordingFailed if a replay and the step itself disagree, for one of two inputs."""
        errors = [self._error(size, recording, number) for number in (1, 2)]
        if not all(error <= _TOLERANCE for error in errors):  # one may be NaN
            raise RecordingFailed(
                f"at batch size {size} its logits are {max(errors):.2g} of the largest off; the "
                f"limit is {_TOLERANCE}"
            )

    def _error(self, size: int, recording: Recording, number: int) -> float:
        """How far a replay's logits are off, as a share of the largest.

        All are 0 on a rank that has no token of the vocabulary.
        """
        self._inputs[size].copy_(self._dummies(size, number))
        expected = self._step(size)[1]
        logits = recording.replay()[1]
        return float((logits - expected).abs().max() / expected.abs().max().clamp_min(_LEAST))
