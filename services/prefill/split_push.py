"""Pushes one attempt's KV in parts: every rank sends that of its heads.

Rank 0 has the part with head 0, the first one. It is ended when decode has all the others, so
decode starts with all or nothing. If a part fails, so does the transfer, with that part's error.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from services.prefill.channels import Channels
from services.prefill.parts import Outcome, Part, PartPushes
from services.prefill.rank import (
    EndShipment,
    FinishShipment,
    Moved,
    News,
    OpenShipment,
    PartEnded,
)
from services.prefill.sender import LAYERS_AHEAD, STALL_TIMEOUT_S, Delivered, Paced, stalled
from winnow.distributed.commands import Extend
from winnow.distributed.ranks import Ranks
from winnow.distributed.split_view import SplitView
from winnow.engine.outgoing import OutgoingBuffers
from winnow.engine.prefill import PrefillResult
from winnow.errors import (
    DeliveryFailed,
    EngineFailed,
    PrefillFailed,
    StaleAttempt,
    WinnowError,
)
from winnow.kv import LayerKV
from winnow.methods.base import LayerView

# When decode drops an attempt, its other parts may end before the one that says why.
REASON_TIMEOUT_S = 1.0
_OF_ANOTHER_PART = (DeliveryFailed, PrefillFailed, StaleAttempt)


class SplitPush(Paced):
    """One transfer, used as a Push; `pack` makes and ships the other ranks' layers.

    plan: each rank's parts.  forget: called when it has ended, or could not be opened.
    """

    def __init__(
        self,
        ranks: Ranks,
        shipment: int,
        plan: Sequence[list[Part]],
        on_end: Callable[[Outcome], None],
        *,
        buffers: OutgoingBuffers,
        trace_context: str = "",
        stall_timeout_s: float = STALL_TIMEOUT_S,
        forget: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__()
        self.shipment = shipment
        self._ranks = ranks
        self._plan = plan
        self._on_end = on_end
        self._trace_context = trace_context
        self._stall_timeout_s = stall_timeout_s
        self._forget = forget
        self._own = PartPushes(
            plan[0], buffers, self._take_own_end, lambda _: self._notify(), trace_context
        )
        # Layers that wait on other ranks, by rank and part.
        self._waiting = {
            (rank, idx): 0 for rank, parts in enumerate(plan) if rank for idx in range(len(parts))
        }
        self._num_left = len(self._waiting) + len(plan[0]) - 1  # parts to end before the first
        self._result: PrefillResult | None = None
        self._wire_bytes = 0
        self._sent_s = time.monotonic()
        self._moved_s = dict.fromkeys(self._waiting, self._sent_s)  # of these parts; as Push's

    def open(self, channels: Channels, timeout_s: float) -> None:
        """As Push.open, of every part; all end if one cannot be opened."""
        self._started_s = time.monotonic()
        try:
            self._ranks.tell_each(
                [
                    Extend(OpenShipment(self.shipment, parts, timeout_s, self._trace_context))
                    for parts in self._plan[1:]
                ]
            )
            self._own.open(channels, timeout_s)
        except Exception as error:
            failure = PrefillFailed(f"the transfer could not be opened: {error}")
            self._end(failure)
            self._own.abort(failure)
            raise

    @property
    def has_room(self) -> bool:
        """Whether `pack` and `send` return or raise at once."""
        own = all(push.has_room for push in self._own.pushes)
        return self._ended or (own and (not self._full or self._stalling is not None))

    @property
    def _full(self) -> list[tuple[int, int]]:
        """The parts of other ranks that have no room."""
        return [part for part, count in self._waiting.items() if count >= LAYERS_AHEAD]

    @property
    def _stalling(self) -> tuple[int, int] | None:
        """The first of them that stalls."""
        before_s = time.monotonic() - self._stall_timeout_s
        return next((part for part in self._full if self._moved_s[part] <= before_s), None)

    def pack(
        self, view: LayerView, values: Tensor, positions: Tensor, kept: list[Tensor] | None
    ) -> LayerKV:
        """The kept KV of rank 0's heads, for `send`; the others ship theirs.

        Raises the error that ended the transfer, or DeliveryFailed if it stalls.
        """
        assert isinstance(view, SplitView)
        if not self._ended and (stalling := self._stalling) is not None:
            rank, part_idx = stalling
            self.abort(stalled(self._plan[rank][part_idx].address, self._stall_timeout_s))
        self._require_open()
        with self._changed:
            self._sent_s = time.monotonic()
            for part in self._waiting:
                self._waiting[part] += 1
                self._moved_s[part] = self._sent_s
        return view.pack_own(values, positions, kept, self.shipment)

    def send(self, layer: LayerKV) -> None:
        """Hand over a layer of rank 0's heads.  Raises as Push.send."""
        self._require_open()
        self._own.send(layer)

    def finish(self, result: PrefillResult) -> None:
        """As Push.finish."""
        with self._changed:
            self._result = result
        self._tell(FinishShipment(self.shipment, result.report))
        self._own.finish(result.report, start=1)
        self._end_first()

    def abort(self, error: WinnowError) -> None:
        """End the transfer with `error`, unless it has ended."""
        if self._end(error):
            self._own.abort(error)
            self._on_end(error)

    def take_news(self, rank: int, news: News) -> None:
        """From another rank."""
        if isinstance(news, PartEnded):
            self._take_end(news.outcome)
            return
        with self._changed:
            self._moved_s[rank, news.part_idx] = time.monotonic()
            if not isinstance(news, Moved):
                self._waiting[rank, news.part_idx] -= 1
                self._changed.notify_all()

    def _take_own_end(self, part_idx: int, outcome: Outcome) -> None:
        if part_idx > 0:
            self._take_end(outcome)
        elif isinstance(outcome, WinnowError):
            self.abort(outcome)
        elif self._end(None):
            wire_bytes = self._wire_bytes + outcome.wire_bytes
            self._on_end(Delivered(outcome.at_s - self._started_s, outcome.at_s, wire_bytes))

    def _take_end(self, outcome: Outcome) -> None:
        """Take the end of another part than the first."""
        if isinstance(outcome, _OF_ANOTHER_PART):
            waiting = threading.Timer(REASON_TIMEOUT_S, self.abort, [outcome])
            waiting.daemon = True
            waiting.start()
        elif isinstance(outcome, WinnowError):
            self.abort(outcome)
        else:
            with self._changed:
                self._num_left -= 1
                self._wire_bytes += outcome.wire_bytes
            self._end_first()

    def _end_first(self) -> None:
        """End the first part, if the prompt is computed and decode has all the others."""
        with self._changed:
            if self._num_left or self._result is None:
                return
            result, self._result = self._result, None
        self._own.pushes[0].finish(result)

    def _end(self, error: WinnowError | None) -> bool:
        """Whether it had not ended before."""
        with self._changed:
            if self._ended:
                return False
            self._ended, self._error, self._result = True, error, None
            self._changed.notify_all()
        self._forget()
        self._tell(EndShipment(self.shipment, error))
        return True

    def _tell(self, message: FinishShipment | EndShipment) -> None:
        with contextlib.suppress(EngineFailed):  # the worker ends, because a rank has
            self._ranks.tell(Extend(message))

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _require_open(self) -> None:
        if self._ended:
            assert self._error is not None  # there is no receipt before `finish`
            raise self._error
