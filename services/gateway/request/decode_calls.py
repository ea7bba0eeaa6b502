"""The open Generate calls of one prompt: to its current worker, and to its next one in a move."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from services.common.tasks import end, note_error
from services.gateway.request.generate_call import (
    NOBODY_TAKES_IT,
    GenerateCall,
    PromptRequest,
    open_generate_call,
)
from services.gateway.request.routing import Router
from winnow.errors import RequestCancelled, UnknownReservation, WinnowError
from winnow.model_files import ModelDescription
from winnow.v1 import decode_pb2 as pb

logger = logging.getLogger(__name__)

_PAUSE_S = 0.25


class DecodeCalls:
    """Always close it: that frees what the workers hold for the prompt.

    left_s: seconds until the prompt's deadline; raises DeadlineExceeded after it.
    """

    current: GenerateCall

    def __init__(
        self, router: Router, model: ModelDescription, left_s: Callable[[], float]
    ) -> None:
        self._router = router
        self._model = model
        self._left_s = left_s
        self._open: set[GenerateCall] = set()
        self._closed = False
        self._next: asyncio.Task[GenerateCall] | None = None
        self._fetching: GenerateCall | None = None
        self._stopped = False  # the current worker has stopped, for another one to continue
        self._num_moves = 0

    async def admit(self, request: PromptRequest) -> None:
        """Reserve KV memory for the prompt.  Raises as `open_generate_call`."""
        self.current = await self._admitted(request)

    async def admit_elsewhere(self, request: PromptRequest, patience_s: float) -> None:
        """`admit`, but waiting up to `patience_s` seconds for a worker with room."""
        self.current = await self._sought(request, time.monotonic() + patience_s)

    def begin_move(self, request: PromptRequest) -> None:
        """Look for a worker that fetches the prompt, which keeps running meanwhile."""
        if self._next is None:
            self._stopped, self._fetching = False, None
            request = replace(request, sampler_version=self.current.sampler_version)
            self._next = asyncio.create_task(self._move(request, self.current.origin))
            self._next.add_done_callback(note_error)  # its error may never be awaited

    async def follow_move(self) -> None:
        """Continue with the events of the worker that fetches; the current one has stopped.

        Returns after that worker's first event.  Raises the error of a failed fetch.
        """
        self._stopped = True
        if self._next is None or self._fetching is None:
            raise UnknownReservation("no worker is there that fetches the prompt")
        self.current, self._next = await self._next, None

    async def _move(self, request: PromptRequest, origin: pb.Origin) -> GenerateCall:
        """Open a call that fetches the prompt; retries on failure while the prompt still runs."""
        while True:
            self._num_moves += 1
            request_id = f"{request.request_id}.m{self._num_moves}"
            asked = replace(request, request_id=request_id, origin=origin)
            self._fetching = await self._sought(asked, float("inf"))
            try:
                await self._fetching.peek()
                return self._fetching
            except WinnowError as error:
                about = {"request_id": request.request_id}
                logger.warning("it could not move: %s", error, extra=about)
                if self._stopped:
                    raise UnknownReservation(f"it could not move: {error.message}") from error
                self._drop(self._fetching)
                self._fetching = None
                await asyncio.sleep(_PAUSE_S)

    def _drop(self, call: GenerateCall) -> None:
        if call in self._open:
            self._open.remove(call)
            call.close()

    def end_move(self) -> None:
        """Close the calls to other workers, because the current one has all the KV."""
        for call in self._open - {self.current}:
            self._drop(call)

    async def close(self) -> None:
        """End all calls at once, then wait for the task that looks for a worker."""
        self._closed = True
        for call in list(self._open):
            self._drop(call)
        if self._next is not None:
            await end(self._next)

    async def _admitted(self, request: PromptRequest) -> GenerateCall:
        self._require_open()
        call = await open_generate_call(self._router, request, self._model, self._left_s())
        self._open.add(call)
        if self._closed:
            self._drop(call)
        self._require_open()
        return call

    def _require_open(self) -> None:
        """Raise RequestCancelled after `close`, which a task looking for a worker may outlive."""
        if self._closed:
            raise RequestCancelled("the prompt needs no worker any more")

    async def _sought(self, request: PromptRequest, give_up_s: float) -> GenerateCall:
        is_told = False
        while True:
            try:
                return await self._admitted(request)
            except NOBODY_TAKES_IT as error:
                if time.monotonic() > give_up_s:
                    raise
                if not is_told:
                    about = {"request_id": request.request_id}
                    logger.info("no other worker takes it yet: %s", error, extra=about)
                    is_told = True
                await asyncio.sleep(_PAUSE_S)
