"""What records and replays a step."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Recording(Protocol):
    """A step that can be run again on the tensors that it was recorded with."""

    def replay(self) -> tuple[Tensor, ...]:
        """Enqueue the step; its outputs, the same tensors each time, which it overwrites."""


class Recorder(Protocol):
    """Records steps. Only one of its recordings is replayed at a time, so they share memory."""

    def record(self, step: Callable[[], tuple[Tensor, ...]]) -> Recording:
        """Run a step, which neither waits for the device nor looks at its numbers; record it.

        It reads and writes tensors that stay where they are.  Raises whatever keeps it from being
        recorded.
        """
