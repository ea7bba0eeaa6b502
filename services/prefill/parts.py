"""A transfer in parts: each rank sends the KV of its heads to those that have them in decode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from services.prefill.channels import Channels
from services.prefill.sender import Delivered, Push
from winnow.distributed.arrivals import MAX_PARTS
from winnow.distributed.heads import Split, take_heads
from winnow.engine.outgoing import OutgoingBuffers
from winnow.engine.prefill import PrefillResult
from winnow.errors import WinnowError
from winnow.kv import LayerKV
from winnow.report import PrefillReport
from winnow.wire import Header, TransferEncoder

Outcome = Delivered | WinnowError


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank sends to one of decode's. heads: among the sender's own KV heads."""

    address: str
    header: Header
    heads: range


def plan_parts(header: Header, num_ranks: int, addresses: Sequence[str]) -> list[list[Part]] | None:
    """Each rank's parts, the first of which has head 0; None where rank 0 has to send all.

    addresses: of decode's ranks; empty or one if its rank 0 takes all.
    """
    num_kv_heads, num_receivers = header.shape.num_kv_heads, len(addresses)
    too_few = num_ranks == 1 or num_receivers <= 1
    if too_few or num_kv_heads % num_receivers or num_ranks > MAX_PARTS * num_receivers:
        return None
    receivers = [Split(rank, num_receivers).heads(num_kv_heads) for rank in range(num_receivers)]
    plan = []
    for rank in range(num_ranks):
        own = Split(rank, num_ranks).heads(num_kv_heads)
        parts = []
        for address, theirs in zip(addresses, receivers, strict=True):
            heads = range(max(own.start, theirs.start), min(own.stop, theirs.stop))
            if heads:
                among_own = range(heads.start - own.start, heads.stop - own.start)
                parts.append(Part(address, replace(header, heads=heads), among_own))
        plan.append(parts)
    return plan


class PartPushes:
    """One rank's parts of a transfer.

    on_end, on_room, on_moved: as for Push, with the part's index.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        buffers: OutgoingBuffers,
        on_end: Callable[[int, Outcome], None],
        on_room: Callable[[int], object],
        trace_context: str,
        on_moved: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._parts = parts
        self.pushes = [
            Push(
                part.address,
                TransferEncoder(part.header),
                partial(on_end, idx),
                buffers=buffers,
                trace_context=trace_context,
                on_room=partial(on_room, idx),
                on_moved=partial(on_moved, idx),
            )
            for idx, part in enumerate(parts)
        ]

    def open(self, channels: Channels, timeout_s: float) -> None:
        for push in self.pushes:
            push.open(channels, timeout_s)

    def send(self, layer: LayerKV) -> None:
        """Hand over a layer of this rank's heads.  Raises as Push.send."""
        is_int8 = self._parts[0].header.kv_dtype == "int8"
        if is_int8 and layer.keys.device.type != "cpu":  # a CPU's sending thread does it
            layer = layer.quantized()
        for part, push in zip(self._parts, self.pushes, strict=True):
            push.send(take_heads(layer, part.heads))

    def finish(self, report: PrefillReport, *, start: int = 0) -> None:
        """End the parts from `start` on. They have not head 0, with which the hidden state goes."""
        for part, push in zip(self._parts[start:], self.pushes[start:], strict=True):
            shape = part.header.shape
            unused = torch.zeros(shape.hidden_size, dtype=shape.dtype)
            push.finish(PrefillResult(unused, report))

    def abort(self, error: WinnowError) -> None:
        for push in self.pushes:
            push.abort(error)
