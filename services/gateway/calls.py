"""The open Generate calls of one prompt: where it runs, and where it is about to go on."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from services.gateway.generation import Generation, PromptRequest, open_generation
from services.gateway.routing import Router
from winnow.errors import NoDecodeWorker, Overloaded, UnknownReservation
from winnow.model_files import ModelDescription

# A worker that takes over is sought for this long after a loss: the lost one may be back by then.
_PATIENCE_S = 30.0
_PAUSE_S = 0.25


class Calls:
    """Close it in any case: that frees what the workers hold for the prompt.

    left_s: seconds until the prompt's deadline; raises DeadlineExceeded after it.
    """

    current: Generation

    def __init__(
        self, router: Router, model: ModelDescription, left_s: Callable[[], float]
    ) -> None:
        self._router = router
        self._model = model
        self._left_s = left_s
        self._open: list[Generation] = []
        self._next: asyncio.Task[Generation] | None = None
        self._num_moves = 0

    async def admit(self, request: PromptRequest) -> None:
        """Reserve KV memory for the prompt; raises as `open_generation`."""
        self.current = await self._admitted(request)

    async def admit_elsewhere(self, request: PromptRequest) -> None:
        """As `admit`, but waits a while for a worker with room."""
        self.current = await self._sought(request, time.monotonic() + _PATIENCE_S)

    def begin_move(self, request: PromptRequest) -> None:
        """Seeks a worker that fetches the prompt, which runs on meanwhile."""
        if self._next is not None or not self.current.grant.allows_fetch:
            return
        self._num_moves += 1
        asked = replace(
            request,
            request_id=f"{request.request_id}.m{self._num_moves}",
            origin=self.current.origin,
        )
        self._next = asyncio.create_task(self._sought(asked, float("inf")))

    async def follow_move(self) -> None:
        """The worker has stopped and gives the prompt away: from now on, the other one's events."""
        if self._next is None:
            raise UnknownReservation("the decode worker gave the prompt to nobody that was asked")
        self.current, self._next = await self._next, None

    def end_move(self) -> None:
        """The other worker has all it needs; the first one may forget the prompt."""
        for call in self._open:
            if call is not self.current:
                call.close()
        self._open = [self.current]

    async def close(self) -> None:
        seeking, self._next = self._next, None
        if seeking is not None:
            seeking.cancel()
            await asyncio.gather(seeking, return_exceptions=True)
        for call in self._open:
            call.close()
        self._open = []

    async def _admitted(self, request: PromptRequest) -> Generation:
        call = await open_generation(self._router, request, self._model, self._left_s())
        self._open.append(call)
        return call

    async def _sought(self, request: PromptRequest, give_up_s: float) -> Generation:
        while True:
            try:
                return await self._admitted(request)
            except (NoDecodeWorker, Overloaded):
                if time.monotonic() > give_up_s:
                    raise
                await asyncio.sleep(_PAUSE_S)
