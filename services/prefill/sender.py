"""Pushes one attempt's KV to its decode worker while the next layers are computed.

The engine thread hands layers over and continues; gRPC's own thread encodes and sends them. At most
`LAYERS_AHEAD` layers wait, so a slow network slows the prompt down instead of filling the memory.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from services.common.rpc import error_from_rpc
from services.common.tracing import metadata_of
from services.prefill.channels import Channels
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
_PUSH_METHOD = "/winnow.v1.KvTransfer/Push"
_PASSED_ON = (TransferRefused, ModelMismatch, DeadlineExceeded)


@dataclass(frozen=True, slots=True)
class Delivered:
    """The decode worker has all KV. at_s: time.monotonic() of the receipt."""

    transfer_s: float
    at_s: float
    wire_bytes: int


class Push:
    """One transfer. `on_end` is called once with its outcome, on any thread."""

    def __init__(
        self,
        kv_address: str,
        encoder: TransferEncoder,
        on_end: Callable[[Delivered | WinnowError], None],
        *,
        trace_context: str = "",
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._kv_address = kv_address
        self._encoder = encoder
        self._on_end = on_end
        self._trace_context = trace_context
        self._stall_timeout_s = stall_timeout_s
        self._changed = threading.Condition()
        self._waiting: deque[LayerKV | PrefillResult] = deque()
        self._error: WinnowError | None = None
        self._ended = False
        self._num_layers = 0  # handed over so far
        self._complete = False  # everything has been handed over
        self._wire_bytes = 0
        self._sent_s = 0.0  # when a layer was last handed over
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
        """Whether `send` returns or raises at once."""
        return self._ended or len(self._waiting) < LAYERS_AHEAD or self._stalls_in_s <= 0

    @property
    def is_held(self) -> bool:
        """Whether there has been no room for HELD_AFTER_S."""
        return not self.has_room and time.monotonic() - self._sent_s >= HELD_AFTER_S

    def wait_for_room(self) -> bool:
        """Wait for HELD_AFTER_S at most; returns whether there is room."""
        with self._changed:
            return self._changed.wait_for(lambda: self.has_room, HELD_AFTER_S)

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
            if self._ended:
                assert self._error is not None  # there is no receipt before `finish`
                raise self._error
            if len(self._waiting) < LAYERS_AHEAD:
                self._waiting.append(layer)
                self._num_layers += 1
                self._sent_s = self._moved_s = time.monotonic()
                self._changed.notify_all()
                return
        self.abort(self._stalled())
        raise self._stalled()

    def finish(self, result: PrefillResult) -> None:
        """Hand over the last item and return; `on_end` is called when it has arrived.

        A thread aborts the transfer if it stalls. gRPC's keepalive cannot detect that, because its
        pings wait behind frames that the worker does not read.
        """
        with self._changed:
            self._waiting.append(result)
            self._complete = True
            self._moved_s = time.monotonic()
            self._changed.notify_all()
        threading.Thread(target=self._watch, name="kv-push-end", daemon=True).start()

    def _watch(self) -> None:
        with self._changed:
            while not self._ended:
                left_s = self._stalls_in_s
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
        self.abort(self._stalled())  # no-op after its end

    def abort(self, error: WinnowError) -> None:
        """End the transfer with `error`, unless it has ended."""
        with self._changed:
            if self._ended:
                return
            self._error = error
        self._end()
        if self._call is not None:
            self._call.cancel()

    def _stalled(self) -> DeliveryFailed:
        return DeliveryFailed(
            f"decode worker {self._kv_address} took no KV for {self._stall_timeout_s:g} s"
        )

    def _frames(self) -> Iterator[bytes]:
        """The frames to send; gRPC asks for the next one when the last one has left."""
        for frame in self._encoded():
            self._wire_bytes += len(frame)
            self._moved_s = time.monotonic()
            yield frame

    def _encoded(self) -> Iterator[bytes]:
        yield self._encoder.header()
        while (item := self._take()) is not None:
            if isinstance(item, PrefillResult):
                yield self._encoder.trailer(item.final_hidden, item.report)
                return
            yield from self._encoder.layer(item)

    def _take(self) -> LayerKV | PrefillResult | None:
        """The next item, or None once the transfer has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or bool(self._waiting))
            if self._ended:
                return None
            self._changed.notify_all()
            return self._waiting.popleft()

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._waiting.clear()
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


def _error_of(failure: grpc.RpcError, address: str) -> WinnowError:
    error = error_from_rpc(failure)
    if isinstance(error, _PASSED_ON):
        return error
    return DeliveryFailed(f"KV could not be delivered to decode worker {address}: {error.message}")
