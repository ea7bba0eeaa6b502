"""A Recorder for any device: it replays a step by running it again, onto the same tensors."""

from collections.abc import Callable

import torch
from torch import Tensor


class EagerRecording:
    """replays: how often it was replayed."""

    def __init__(self, step: Callable[[], tuple[Tensor, ...]]) -> None:
        self._step = step
        self._outputs = step()
        self.replays = 0

    def replay(self) -> tuple[Tensor, ...]:
        self.replays += 1
        for output, new in zip(self._outputs, self._step(), strict=True):
            output.copy_(new)
        return self._outputs

    def spoil(self) -> None:
        for output in self._outputs:
            output.fill_(torch.nan)


class EagerRecorder:
    """A replay spoils the outputs of other recordings, as graphs do that share memory."""

    def __init__(self) -> None:
        self.recordings: list[EagerRecording] = []

    def record(self, step: Callable[[], tuple[Tensor, ...]]) -> EagerRecording:
        recording = EagerRecording(self._spoiling_others(step, len(self.recordings)))
        self.recordings.append(recording)
        return recording

    def _spoiling_others(
        self, step: Callable[[], tuple[Tensor, ...]], own_idx: int
    ) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            for idx, other in enumerate(self.recordings):
                if idx != own_idx:
                    other.spoil()
            return step()

        return run
