"""Pushes one attempt's KV to its decode worker while the next layers are computed.

The engine thread hands layers over and continues; gRPC's own thread encodes and sends them, from
host memory, into which a GPU's layers are copied meanwhile. At most `LAYERS_AHEAD` layers wait, so
a slow network slows the prompt down instead of filling the memory.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from services.common.rpc import error_from_rpc
from services.common.tracing import metadata_of
from services.prefill.channels import Channels
from winnow.engine.outgoing import Outgoing, OutgoingBuffers
from winnow.engine.prefill import PrefillResult
from winnow.errors import (
    DeadlineExceeded,
    DeliveryFailed,
    ModelMismatch,
    PrefillFailed,
    TransferRefused,
    WinnowError,
)
from winnow.kv import LayerKV
from winnow.v1 import decode_pb2 as pb
from winnow.wire import TransferEncoder

logger = logging.getLogger(__name__)

LAYERS_AHEAD = 2
HELD_AFTER_S = 0.05  # a layer's way through a network that keeps pace with the engine
STALL_TIMEOUT_S = 15.0
MOVED_EVERY_S = 1.0
_PUSH_METHOD = "/winnow.v1.KvTransfer/Push"
_PASSED_ON = (TransferRefused, ModelMismatch, DeadlineExceeded)


@dataclass(frozen=True, slots=True)
class Delivered:
    """The decode worker has all KV. at_s: time.monotonic() of the receipt."""

    transfer_s: float
    at_s: float
    wire_bytes: int


class Paced(ABC):
    """A transfer that slows the prompt down: layers are handed over when there is room."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._error: WinnowError | None = None
        self._ended = False
        self._sent_s = 0.0  # when a layer was last handed over

    @property
    @abstractmethod
    def has_room(self) -> bool:
        """Whether handing a layer over returns or raises at once."""

    @property
    def is_held(self) -> bool:
        """Whether there has been no room for HELD_AFTER_S."""
        return not self.has_room and time.monotonic() - self._sent_s >= HELD_AFTER_S

    def wait_for_room(self) -> bool:
        """Wait for HELD_AFTER_S at most; returns whether there is room."""
        with self._changed:
            return self._changed.wait_for(lambda: self.has_room, HELD_AFTER_S)


class Push(Paced):
    """One transfer. `on_end` is called once with its outcome, on any thread.

    buffers: host memory for what is on a GPU.  on_room: called when a layer no longer waits.
    on_moved: called while frames leave, every MOVED_EVERY_S at most.
    """

    def __init__(
        self,
        kv_address: str,
        encoder: TransferEncoder,
        on_end: Callable[[Delivered | WinnowError], None],
        *,
        buffers: OutgoingBuffers | None = None,
        trace_context: str = "",
        stall_timeout_s: float = STALL_TIMEOUT_S,
        on_room: Callable[[], object] = lambda: None,
        on_moved: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__()
        self._kv_address = kv_address
        self._encoder = encoder
        self._on_end = on_end
        self._buffers = buffers or OutgoingBuffers()
        self._trace_context = trace_context
        self._stall_timeout_s = stall_timeout_s
        self._on_room = on_room
        self._on_moved = on_moved
        self._waiting: deque[Outgoing[LayerKV | PrefillResult]] = deque()
        self._num_layers = 0  # handed over so far
        self._complete = False  # everything has been handed over
        self._wire_bytes = 0
        self._moved_s = 0.0  # when an item was last handed over, or a frame taken
        self._call: grpc.Future | None = None

    def open(self, channels: Channels, timeout_s: float) -> None:
        """Start the call, which ends within `timeout_s`; the header is sent at once."""
        self._started_s = time.monotonic()
        channel = channels.borrow(self._kv_address)
        push = channel.stream_unary(
            _PUSH_METHOD,
            request_serializer=None,  # frames are bytes already
            response_deserializer=pb.PushReceipt.FromString,
        )
        self._call = push.future(
            self._frames(), timeout=timeout_s, metadata=metadata_of(self._trace_context)
        )
        self._call.add_done_callback(lambda call: self._finish(call, channels, channel))

    @property
    def has_room(self) -> bool:
        return self._ended or len(self._waiting) < LAYERS_AHEAD or self._stalls_in_s <= 0

    @property
    def _stalls_in_s(self) -> float:
        return self._moved_s + self._stall_timeout_s - time.monotonic()

    def send(self, layer: LayerKV) -> None:
        """Hand over a layer; blocks while LAYERS_AHEAD others are waiting.

        Raises the error that ended the transfer, or DeliveryFailed if it stalls.
        """
        with self._changed:
            while not self.has_room:
                self._changed.wait(self._stalls_in_s)
            stalls = not self._ended and len(self._waiting) >= LAYERS_AHEAD
        if stalls:
            self.abort(stalled(self._kv_address, self._stall_timeout_s))
        if not self._add(layer):
            assert self._error is not None  # there is no receipt before `finish`
            raise self._error

    def finish(self, result: PrefillResult) -> None:
        """Hand over the last item and return; `on_end` is called when it has arrived.

        A thread aborts the transfer if it stalls. gRPC's keepalive cannot detect that, because its
        pings wait behind frames that the worker does not read.
        """
        self._add(result)
        threading.Thread(target=self._watch, name="kv-push-end", daemon=True).start()

    def _add(self, item: LayerKV | PrefillResult) -> bool:
        """Have the item sent after those that wait; False if the transfer has ended."""
        outgoing = self._buffers.copy(item)
        with self._changed:
            if self._ended:
                outgoing.release()
                return False
            self._waiting.append(outgoing)
            self._moved_s = time.monotonic()
            if isinstance(item, PrefillResult):
                self._complete = True
            else:
                self._num_layers += 1
                self._sent_s = self._moved_s
            self._changed.notify_all()
            return True

    def _watch(self) -> None:
        with self._changed:
            while not self._ended:
                left_s = self._stalls_in_s
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
        self.abort(stalled(self._kv_address, self._stall_timeout_s))  # no-op after its end

    def abort(self, error: WinnowError) -> None:
        """End the transfer with `error`, unless it has ended."""
        with self._changed:
            if self._ended:
                return
            self._error = error
        self._end()
        if self._call is not None:
            self._call.cancel()

    def _frames(self) -> Iterator[bytes]:
        """The frames to send; gRPC asks for the next one when the last one has left."""
        told_s = -MOVED_EVERY_S
        for frame in self._encoded():
            self._wire_bytes += len(frame)
            self._moved_s = time.monotonic()
            if self._moved_s - told_s >= MOVED_EVERY_S:
                told_s = self._moved_s
                self._on_moved()
            yield frame

    def _encoded(self) -> Iterator[bytes]:
        yield self._encoder.header()
        while (outgoing := self._take()) is not None:
            with outgoing as item:
                if isinstance(item, PrefillResult):
                    yield self._encoder.trailer(item.final_hidden, item.report)
                    return
                yield from self._encoder.layer(item)

    def _take(self) -> Outgoing[LayerKV | PrefillResult] | None:
        """The next item, or None once the transfer has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or bool(self._waiting))
            if self._ended:
                return None
            self._changed.notify_all()
            item = self._waiting.popleft()
            is_layer = bool(self._waiting) or not self._complete
        if is_layer:
            self._on_room()
        return item

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            while self._waiting:
                self._waiting.popleft().release()
            self._changed.notify_all()

    def _finish(self, call: grpc.Future, channels: Channels, channel: grpc.Channel) -> None:
        """Called on gRPC's thread when the call has ended, in whatever way."""
        now = time.monotonic()
        error = self._error or self._failure(call)
        self._error = error
        self._end()
        channels.give_back(channel, lost=isinstance(error, DeliveryFailed))
        self._on_end(error or Delivered(now - self._started_s, now, self._wire_bytes))

    def _failure(self, call: grpc.Future) -> WinnowError | None:
        """The call's error; None if it succeeded.  `abort` has set its own error before."""
        address = self._kv_address
        if call.cancelled():
            return PrefillFailed(f"the transfer to decode worker {address} was cut off")
        failure = call.exception()
        if failure is not None:
            return _error_of(failure, address)
        if not self._complete or call.result().num_layers != self._num_layers:
            return PrefillFailed(f"decode worker {address} took a part of the KV for all")
        return None


def stalled(address: str, timeout_s: float) -> DeliveryFailed:
    return DeliveryFailed(f"decode worker {address} took no KV for {timeout_s:g} s")


def _error_of(failure: grpc.RpcError, address: str) -> WinnowError:
    error = error_from_rpc(failure)
    if isinstance(error, _PASSED_ON):
        return error
    return DeliveryFailed(f"KV could not be delivered to decode worker {address}: {error.message}")
