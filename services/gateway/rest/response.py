"""HTTP response of a completion: a JSON object, or server-sent events while it is generated."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from services.common.tasks import end
from services.gateway.access.keys import ApiKey
from services.gateway.errors import public_error
from services.gateway.gateway import Gateway
from services.gateway.request.choices import Delta
from services.gateway.request.running_request import RunningRequest
from services.gateway.rest.errors import refusal
from services.gateway.rest.event_stream import EventStream, event_text, request_ids
from services.gateway.rest.key_guard import key_of
from services.gateway.rest.requests import OpenAIRequest
from services.gateway.rest.responses import Event, ResponseFormatter
from winnow.errors import DeadlineExceeded, Overloaded


class OpenAIResponse(Response):
    """Runs the request while responding; a client's disconnect cancels it at once."""

    def __init__(
        self,
        gateway: Gateway,
        request: OpenAIRequest,
        formatter: ResponseFormatter,
        trace_context: str,
    ) -> None:
        super().__init__()
        self._gateway = gateway
        self._request = request
        self._formatter = formatter
        self._trace_context = trace_context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _unless_disconnected(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        keepalive_s = self._gateway.settings.sse_keepalive_s
        request_id = self._request.generation.request_id
        repeats = self._formatter.repeats_request
        first = (
            await _texts(self._formatter.begin, in_thread=repeats) if self._request.stream else ()
        )
        events = EventStream(send, request_id, keepalive_s, first)
        try:
            response = await self._run(events, key_of(scope))
        except Exception as error:  # the client always gets one typed error
            failure = public_error(error)
            if events.started:
                (told,) = await _texts(
                    lambda: [self._formatter.failure(failure)], in_thread=repeats
                )
                await events.fail(told)
                return
            response = refusal(failure, self._gateway.metrics, scope["path"], request_id)
        if response is not None:
            response.headers.update(request_ids(request_id))
            await response(scope, receive, send)

    async def _run(self, events: EventStream, key: ApiKey | None) -> Response | None:
        """The response still to be sent, after all resources have been freed; None if streamed."""
        request, timeout_s = self._request, self._gateway.settings.request_timeout_s
        end_s = asyncio.get_running_loop().time() + timeout_s
        async with self._gateway.open(request.generation, key, self._trace_context) as running:
            if not request.stream:
                return await self._whole(running)
            await self._stream(running, events)
        # A client that has the end closes the connection, which would cancel what is left to do.
        await self._finish(events, end_s)
        return None

    async def _stream(self, running: RunningRequest, events: EventStream) -> None:
        try:
            await self._stream_deltas(running, events)
        except Overloaded:  # sent as an HTTP status if the stream has not started
            raise
        except Exception:
            await events.start()
            raise
        for text in await self._last_texts(running):
            await events.send(text)

    async def _finish(self, events: EventStream, end_s: float) -> None:
        """End the stream.  Raises DeadlineExceeded if the client does not read by then."""
        try:
            async with asyncio.timeout_at(end_s):
                await events.finish(self._formatter.done)
        except TimeoutError as error:
            raise DeadlineExceeded("the client did not read the whole answer in time") from error

    async def _stream_deltas(self, running: RunningRequest, events: EventStream) -> None:
        async with aclosing(running.paced_deltas(events.patience_s)) as deltas:
            async for delta in deltas:
                texts = [] if delta is None else await self._event_texts(delta)
                for text in texts:
                    await events.send(text)
                if not texts:
                    await events.keep_alive()

    async def _event_texts(self, delta: Delta) -> list[str]:
        """Format in a thread if the delta has prompt log-probabilities, which may be many."""
        return await _texts(lambda: self._formatter.events(delta), in_thread=bool(delta.prompt))

    async def _last_texts(self, running: RunningRequest) -> list[str]:
        """Format in a thread if the usage tells of every token of the prompt."""
        in_thread = self._request.generation.explains or self._formatter.repeats_request
        return await _texts(lambda: self._formatter.end(running.usage()), in_thread=in_thread)

    async def _whole(self, running: RunningRequest) -> Response:
        async with aclosing(running.deltas()) as deltas:
            collected = [delta async for delta in deltas]
        return await asyncio.to_thread(
            lambda: JSONResponse(self._formatter.whole(collected, running.usage()))
        )


async def _texts(events: Callable[[], list[Event]], *, in_thread: bool) -> list[str]:
    """What `events` returns, as lines.  in_thread: for what may be long."""

    def texts() -> list[str]:
        return [event_text(event) for event in events()]

    return await asyncio.to_thread(texts) if in_thread else texts()


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, and cancel it when the client disconnects."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        finished = working.done()
        await end(working, watching)
    if finished:
        working.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
