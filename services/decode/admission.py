"""Admission control of a decode worker: its active requests, and whether it accepts more."""

import asyncio
import contextlib
import time

from services.decode.active_request import ActiveRequest
from winnow.engine.decode import DecodeEngine
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.outputs import StepOutput
from winnow.errors import (
    InvalidSetting,
    NoDecodeWorker,
    Overloaded,
    UnknownReservation,
    WinnowError,
)
from winnow.wire import Grant

_OWED_S = 2.0  # gateways retry four times a second
_ROOM_TIMEOUT_S = 2.0  # a few engine steps


class Admission:
    """The active requests by ID. Used on the event loop only, except `find` (any thread)."""

    def __init__(self, engine: DecodeEngine) -> None:
        self.draining = False
        self._engine = engine
        self._owed_until_s = 0.0  # until then a refused `assured` request is next to get memory
        self._requests: dict[str, ActiveRequest] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._requests)

    async def admit(self, spec: GenerationSpec, grant: Grant) -> ActiveRequest:
        """Reserve memory for a request; if it is short, sequences that may shrink do so first.

        Raises NoDecodeWorker while draining, Overloaded without memory or places now, and
        InvalidSetting for a request that can never fit or an ID that is in use.
        """
        self._require_turn(spec)
        try:
            return self._admit(spec, grant)
        except Overloaded:
            if not await self._others_shrank(spec):
                self._note_refusal(spec)
                raise
        return self._admit(spec, grant)

    def _require_turn(self, spec: GenerationSpec) -> None:
        """Raises Overloaded for a new request while a preempted one waits for memory."""
        is_new = not (spec.assured or spec.moved or spec.replayed)
        if is_new and time.monotonic() < self._owed_until_s:
            raise Overloaded("a request that was given up for want of KV memory waits for it")

    def _note_refusal(self, spec: GenerationSpec) -> None:
        """Keep memory for an assured request while it retries; this lapses when it stops."""
        if spec.assured:
            self._owed_until_s = time.monotonic() + _OWED_S

    def _admit(self, spec: GenerationSpec, grant: Grant) -> ActiveRequest:
        if self.draining:
            raise NoDecodeWorker("this decode worker is draining")
        if spec.request_id in self._requests:
            raise InvalidSetting(f"request {spec.request_id} is admitted already")
        request = self._requests[spec.request_id] = ActiveRequest(self._engine, spec, grant)
        if spec.assured:
            self._owed_until_s = 0.0
        self._idle.clear()
        return request

    async def _others_shrank(self, spec: GenerationSpec) -> bool:
        """Whether sequences have shrunk for the request, as far as they can."""
        loop, made = asyncio.get_running_loop(), asyncio.Event()
        if not self._engine.request_room(spec, lambda: loop.call_soon_threadsafe(made.set)):
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ROOM_TIMEOUT_S):
                await made.wait()
        return made.is_set()

    def find(self, request_id: str) -> ActiveRequest:
        """Raises UnknownReservation."""
        request = self._requests.get(request_id)
        if request is None:
            raise UnknownReservation(f"no request {request_id} is admitted here")
        return request

    def remove(self, request: ActiveRequest) -> None:
        """Remove a request and free all it holds."""
        del self._requests[request.spec.request_id]
        request.close()
        if not self._requests:
            self._idle.set()

    def send_away(self) -> None:
        """Ask every running request to move to another worker."""
        for request in self._requests.values():
            request.should_move()

    def deliver(self, outputs: list[StepOutput]) -> None:
        """Give each request its output of a step; output of requests that have left is dropped."""
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is not None:
                request.events.put_nowait(output)

    def fail_all(self, error: WinnowError) -> None:
        """End every active request with `error`."""
        for request in self._requests.values():
            request.events.put_nowait(error)

    async def wait_until_idle(self, timeout_s: float) -> int:
        """Wait until no request is left or the time has passed; returns how many are left."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return len(self)
