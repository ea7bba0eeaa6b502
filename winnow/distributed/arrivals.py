"""KV that comes to a rank in parts: each has some of the rank's heads, and a call of its own.

The parts of a layer that came are kept until the layer is whole; a sender computes a layer of all
heads before the next, so these are few.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from winnow.distributed.heads import join_heads
from winnow.errors import StaleAttempt, TransferDamaged, TransferMalformed
from winnow.kv import LayerKV, named_heads
from winnow.wire import Expected

MAX_PARTS = 4  # of one transfer that come to a rank, which has to take all of them at once


class Arrival:
    """One attempt's KV of this rank's heads. Every method may be called from any thread.

    expected: of each part.  write: puts a layer of all the rank's heads into pages.
    """

    def __init__(self, expected: Expected, write: Callable[[LayerKV], object]) -> None:
        assert expected.heads is not None
        self.expected = expected
        self.payload_bytes = 0
        self._heads = expected.heads
        self._write = write
        self._lock = threading.Lock()
        self._begun: list[range] = []
        self._cancels: dict[range, Callable[[], object]] = {}  # of parts that have not come whole
        self._whole: set[int] = set()  # heads whose part came whole
        self._layers: dict[int, dict[range, LayerKV]] = {}  # not written yet
        self._head_lengths: dict[int, tuple[int, ...]] = {}  # of layers that are
        self._dropped = False

    @contextmanager
    def part(self, heads: range, cancel: Callable[[], object] | None = None) -> Iterator[None]:
        """Around the receipt of a part, which is whole if the block ends.

        cancel: ends its call; None if somebody else does.

        Raises TransferDamaged if one of its heads has come before, StaleAttempt after `drop`.
        """
        with self._lock:
            self._require_wanted()
            if any(set(heads) & set(other) for other in self._begun):
                raise TransferDamaged(f"KV {named_heads(heads)} arrive a second time")
            self._begun.append(heads)
            if cancel is not None:
                self._cancels[heads] = cancel
        yield
        with self._lock:
            self._cancels.pop(heads, None)
            self._whole.update(heads)

    def add(self, heads: range, layer: LayerKV) -> None:
        """Take a layer of a part; the buffers may be used again afterwards."""
        with self._lock:
            self._require_wanted()
            whole = self._joined(heads, layer)
            if whole is not None:
                self._write(whole)
                self._head_lengths[layer.layer_idx] = whole.head_lengths

    def _joined(self, heads: range, layer: LayerKV) -> LayerKV | None:
        """The layer of all the rank's heads; None, and the part is kept, until all have come."""
        if heads == self._heads:
            return layer
        parts = self._layers.setdefault(layer.layer_idx, {})
        for other_heads, other in parts.items():
            if _kind(other) != _kind(layer):
                raise TransferMalformed(
                    f"layer {layer.layer_idx} has {_described(layer)} of KV {named_heads(heads)}, "
                    f"and {_described(other)} of KV {named_heads(other_heads)}"
                )
        if sum(map(len, parts)) + len(heads) < len(self._heads):
            parts[heads] = _owned(layer)
            return None
        parts[heads] = layer
        del self._layers[layer.layer_idx]
        return join_heads([parts[own] for own in sorted(parts, key=lambda own: own.start)])

    def count(self, payload_bytes: int) -> None:
        """Count what a part has brought."""
        with self._lock:
            self.payload_bytes += payload_bytes

    def drop(self) -> None:
        """Take no more, and end the calls of its parts."""
        with self._lock:
            self._dropped = True
            cancels = list(self._cancels.values())
        for cancel in cancels:
            cancel()

    def head_lengths(self) -> list[tuple[int, ...]]:
        """Entries of each of the rank's heads, by layer.

        Raises TransferDamaged unless all parts came whole.
        """
        with self._lock:
            missing = [head for head in self._heads if head not in self._whole]
            if missing:
                raise TransferDamaged(f"KV heads {missing} did not arrive whole")
            return [self._head_lengths[idx] for idx in range(self.expected.shape.num_layers)]

    def _require_wanted(self) -> None:
        if self._dropped:
            raise StaleAttempt("the attempt of which this is a part has ended")


class Arrivals:
    """The arrivals of a rank, by request and attempt. Any thread may use it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._arrivals: dict[tuple[str, int], Arrival] = {}

    def expect(self, request_id: str, attempt: int, arrival: Arrival) -> None:
        with self._changed:
            self._arrivals[request_id, attempt] = arrival
            self._changed.notify_all()

    def drop(self, request_id: str, attempt: int) -> None:
        with self._changed:
            arrival = self._arrivals.pop((request_id, attempt), None)
        if arrival is not None:
            arrival.drop()

    def of(self, request_id: str, attempt: int, timeout_s: float = 0) -> Arrival:
        """Waits for an attempt that may not have begun.  Raises StaleAttempt.

        The request may be admitted all the same: another attempt can serve it.
        """
        with self._changed:
            self._changed.wait_for(lambda: (request_id, attempt) in self._arrivals, timeout_s)
            arrival = self._arrivals.get((request_id, attempt))
        if arrival is None:
            raise StaleAttempt(
                f"attempt {attempt} of request {request_id} did not begin within {timeout_s:g} s"
            )
        return arrival


def _kind(layer: LayerKV) -> tuple[torch.dtype, int]:
    """What all parts of a layer have alike."""
    return layer.keys.dtype, layer.window_queries.shape[1]


def _described(layer: LayerKV) -> str:
    dtype, num_queries = _kind(layer)
    return f"{str(dtype).removeprefix('torch.')} keys and {num_queries} window queries"


def _owned(layer: LayerKV) -> LayerKV:
    return replace(
        layer,
        keys=layer.keys.clone(),
        values=layer.values.clone(),
        positions=layer.positions.clone(),
        window_queries=layer.window_queries.clone(),
        scales=None if layer.scales is None else layer.scales.clone(),
    )
