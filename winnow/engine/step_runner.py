"""StepRunner: the layers of decode steps, replayed where steps can be recorded, else launched."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from winnow.attention import GatherBackend, decode_backend
from winnow.decoder import DecoderModel
from winnow.engine.graph import Agree, Recorder, RecordingFailed, StepGraphs, alone
from winnow.engine.kv_pool import KVPool
from winnow.engine.step_forward import LayerOutputs, StepForward

logger = logging.getLogger(__name__)


class StepRunner:
    """Runs steps of rows whose KV is in `pool`.

    new_recorder: for steps that are recorded at the start and replayed; None: launched kernel by
    kernel, as they also are where they cannot be recorded.  agree: see StepGraphs.
    gives_logits: also where steps are launched; those that are recorded always do.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: DecoderModel,
        pool: KVPool,
        max_batch_size: int,
        new_recorder: Callable[[], Recorder] | None = None,
        agree: Agree = alone,
        *,
        gives_logits: bool = False,
    ) -> None:
        self._model = model
        self._pool = pool
        self._backend = decode_backend(pool, *pool.shape.groups)
        self._forward = StepForward(model, pool, self._backend)
        self._gives_logits = gives_logits
        self._graphs = self._recorded(new_recorder, max_batch_size, agree)

    @property
    def replays(self) -> bool:
        """Whether steps are recorded."""
        return self._graphs is not None

    @property
    def newest(self) -> Tensor:
        """See StepForward."""
        return self._forward.newest

    @torch.inference_mode()
    def run(
        self,
        rows: list[int],
        positions: list[int],
        tokens: list[int],
        slots: Sequence[int] = (),
    ) -> tuple[Tensor, LayerOutputs]:
        """Feed each row's last token through all layers.

        tokens: UNREAD for one that only `newest` has.  slots: of the rows' adapters, if the model
        takes any.
        Returns the rows on the device, [B], and what the layers computed.
        """
        if self._forward.slots is not None:
            self._forward.slots.put(rows, slots)
        inputs = [rows, positions, tokens]
        padded = self._graphs.padded(inputs) if self._graphs is not None else None
        sent, longest = self._pool.begin_step(rows, positions, padded or inputs)
        own = sent[:, : len(rows)]
        outputs = self._replay(sent) if padded else None
        if outputs is None:
            outputs = self._launch(own, longest, rows)
        return own[0], outputs.first(len(rows))

    def _launch(self, inputs: Tensor, longest: list[int], rows: list[int]) -> LayerOutputs:
        outputs = self._forward(inputs, longest, rows)
        if not self._gives_logits:
            return outputs
        return replace(outputs, logits=self._model.logits(outputs.hidden))

    def close(self) -> None:
        """Let go of the recorded steps; there are no more."""
        self._graphs = None

    def _replay(self, sent: Tensor) -> LayerOutputs | None:
        """The outputs of a replay; None if steps cannot be recorded any more."""
        assert self._graphs is not None
        try:
            return self._graphs.run(sent)
        except RecordingFailed as error:
            self._graphs = None
            _warn_of(error)
            return None

    def _recorded(
        self, new_recorder: Callable[[], Recorder] | None, max_batch_size: int, agree: Agree
    ) -> StepGraphs | None:
        if new_recorder is None:
            return None
        copies_pages = isinstance(self._backend, GatherBackend)
        on_gpu = self._model.device.type == "cuda"
        try:
            if reason := agree("attention copies pages" if copies_pages and on_gpu else None):
                raise RecordingFailed(reason)
            return StepGraphs(
                new_recorder, self._model, self._pool.mirror, self._forward, max_batch_size, agree
            )
        except RecordingFailed as error:
            _warn_of(error)
            return None


def _warn_of(error: RecordingFailed) -> None:
    logger.warning("decode runs without CUDA graphs, because a step cannot be recorded: %s", error)
