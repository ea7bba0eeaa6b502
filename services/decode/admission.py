"""Which requests a decode worker has let in, and whether it lets in more."""

import asyncio
import contextlib

from services.decode.active_request import ActiveRequest
from winnow.engine.decode import DecodeEngine, StepOutput
from winnow.engine.sequence import GenerationSpec
from winnow.errors import InvalidSetting, NoDecodeWorker, UnknownReservation, WinnowError
from winnow.wire import Grant


class Admission:
    """The active requests by id. Belongs to the event loop; `find` is for any thread."""

    def __init__(self, engine: DecodeEngine) -> None:
        self.draining = False
        self._engine = engine
        self._requests: dict[str, ActiveRequest] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._requests)

    def admit(self, spec: GenerationSpec, grant: Grant) -> ActiveRequest:
        """Reserves what the request needs.

        Raises NoDecodeWorker while draining, Overloaded without memory or places now, and
        InvalidSetting for what can never fit or an id that is in use.
        """
        if self.draining:
            raise NoDecodeWorker("this decode worker is draining")
        if spec.request_id in self._requests:
            raise InvalidSetting(f"request {spec.request_id} is admitted already")
        request = self._requests[spec.request_id] = ActiveRequest(self._engine, spec, grant)
        self._idle.clear()
        return request

    def find(self, request_id: str) -> ActiveRequest:
        """Raises UnknownReservation."""
        request = self._requests.get(request_id)
        if request is None:
            raise UnknownReservation(f"no request {request_id} is admitted here")
        return request

    def remove(self, request: ActiveRequest) -> None:
        """Forgets a request and frees all it holds."""
        del self._requests[request.spec.request_id]
        request.close()
        if not self._requests:
            self._idle.set()

    def deliver(self, outputs: list[StepOutput]) -> None:
        """Hands each request what a step gave it; a request that has left gets nothing."""
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is not None:
                request.events.put_nowait(output)

    def fail_all(self, error: WinnowError) -> None:
        """Ends every active request with `error`."""
        for request in self._requests.values():
            request.events.put_nowait(error)

    async def wait_until_idle(self, timeout_s: float) -> int:
        """Requests left when none is, or when the time has passed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return len(self)
