"""KvTransfer.Push of parts: each rank of a worker takes the KV of its own heads.

The part that has head 0 comes to rank 0, where it begins the attempt (push.py). Then each rank
knows what it is to take. That part ends last; so by its end the others are whole, or the transfer
has failed.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import grpc
import torch

from services.common.rpc import abort
from services.decode.active_request import ActiveRequest
from services.decode.frames import Buffers, first_frame, receipt_of, refusal_logged, take_frames
from winnow.distributed.arrivals import Arrival, Arrivals
from winnow.distributed.split_pool import SplitPool
from winnow.errors import EngineFailed, TransferDamaged, WinnowError
from winnow.wire import Expected, Header, ReceiveBuffer, TransferDecoder, read_header

logger = logging.getLogger(__name__)

BEGIN_TIMEOUT_S = 10.0  # for which a part waits for its attempt, which may begin after it


class PartReceiver:
    """Serves KvTransfer.Push of a rank other than 0.

    on_failure: called when the device may have kept a part from its place.
    """

    def __init__(
        self, arrivals: Arrivals, device: torch.device, on_failure: Callable[[], object]
    ) -> None:
        self._arrivals = arrivals
        self._on_failure = on_failure
        self._buffers = Buffers(device)

    def push(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """The serialized receipt, after the part was received, checked and written."""
        try:
            with self._buffers.lent() as buffer, refusal_logged():
                first = first_frame(frames, context)
                return take_part(self._arrivals, first, frames, context.cancel, buffer)
        except WinnowError as error:
            abort(context, error)
        except RuntimeError as error:  # the device's
            logger.exception("a part of a transfer could not be put in place")
            self._on_failure()
            abort(context, EngineFailed(f"KV could not be put in place: {error}"))


def take_part(
    arrivals: Arrivals,
    first: bytes,
    frames: Iterator[bytes],
    cancel: Callable[[], object],
    buffer: ReceiveBuffer,
) -> bytes:
    """Take a part of an attempt that another one begins.  first: its header's frame."""
    header = read_header(first)
    arrival = arrivals.of(header.request_id, header.attempt, BEGIN_TIMEOUT_S)
    decoder = TransferDecoder(arrival.expected, buffer)
    decoder.feed(first)
    heads = heads_of(header)
    with arrival.part(heads, cancel):
        take_frames(frames, decoder, lambda layer: arrival.add(heads, layer))
        arrival.count(decoder.payload_bytes)
    return receipt_of(decoder)


def heads_of(part: Header) -> range:
    assert part.heads is not None, "the decoder refuses whole transfers where parts are due"
    return part.heads


class RankedParts:
    """Rank 0's side: has all ranks take their parts of an attempt.

    pool: of all ranks.  arrivals: of KV of rank 0's heads.
    """

    def __init__(self, pool: SplitPool) -> None:
        self.arrivals = Arrivals()
        self._pool = pool

    def expected(self, whole: Expected) -> Expected:
        """What a part for rank 0 may contain."""
        return replace(whole, heads=self._pool.own_heads)

    @contextmanager
    def arriving(
        self, request: ActiveRequest, header: Header, whole: Expected
    ) -> Iterator[Arrival]:
        """Have every rank take the parts of the attempt that a header begins."""
        key = header.request_id, header.attempt
        own = Arrival(
            self.expected(whole), lambda layer: request.write_own_heads(header.attempt, layer)
        )
        request.at_row(header.attempt, lambda row: self._pool.expect(row, *key, whole))
        self.arrivals.expect(*key, own)
        try:
            yield own
        finally:
            self.arrivals.drop(*key)

    def collect(self, request: ActiveRequest, attempt: int, own: Arrival) -> int:
        """The payload bytes of all parts.  Raises TransferDamaged unless they all came whole."""
        own.head_lengths()
        others = request.at_row(attempt, self._pool.take_arrived) or []
        for rank, arrived in enumerate(others, start=1):
            if arrived.damage is not None:
                raise TransferDamaged(f"at rank {rank}, {arrived.damage}")
        return own.payload_bytes + sum(arrived.payload_bytes for arrived in others)
