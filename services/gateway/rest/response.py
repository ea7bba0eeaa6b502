"""HTTP response of a completion: a JSON object, or server-sent events while it is generated."""

import asyncio
from collections.abc import Coroutine
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
from services.gateway.rest.event_stream import EventStream, event_text
from services.gateway.rest.key_guard import key_of
from services.gateway.rest.requests import OpenAIRequest
from services.gateway.rest.responses import ResponseFormatter
from winnow.errors import Overloaded


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
        events = EventStream(send, self._request.generation.request_id, keepalive_s)
        try:
            response = await self._run(events, key_of(scope))
        except Exception as error:  # the client always gets one typed error
            failure = public_error(error)
            if events.started:
                await events.fail(failure)
                return
            response = refusal(failure, self._gateway.metrics)
        if response is not None:
            response.headers["x-request-id"] = self._request.generation.request_id
            await response(scope, receive, send)

    async def _run(self, events: EventStream, key: ApiKey | None) -> Response | None:
        """The response still to be sent, after all resources have been freed; None if streamed."""
        request = self._request
        async with self._gateway.open(request.generation, key, self._trace_context) as running:
            if request.stream:
                await self._stream(running, events)
                return None
            return await self._whole(running)

    async def _stream(self, running: RunningRequest, events: EventStream) -> None:
        try:
            await self._stream_deltas(running, events)
        except Overloaded:  # sent as an HTTP status if the stream has not started
            raise
        except Exception:
            await events.start()
            raise
        if self._request.include_usage:
            await events.send(event_text(self._formatter.usage_chunk(running.usage())))
        await events.finish()

    async def _stream_deltas(self, running: RunningRequest, events: EventStream) -> None:
        async with aclosing(running.paced_deltas(events.patience_s)) as deltas:
            async for delta in deltas:
                text = None if delta is None else await self._event_text(delta)
                if text is None:
                    await events.keep_alive()
                else:
                    await events.send(text)

    async def _event_text(self, delta: Delta) -> str | None:
        """Format in a thread if the delta has prompt log-probabilities, which may be many."""
        if delta.prompt:
            return await asyncio.to_thread(self._format_event, delta)
        return self._format_event(delta)

    def _format_event(self, delta: Delta) -> str | None:
        chunk = self._formatter.chunk(delta)
        return None if chunk is None else event_text(chunk)

    async def _whole(self, running: RunningRequest) -> Response:
        async with aclosing(running.deltas()) as deltas:
            collected = [delta async for delta in deltas]
        usage = running.usage()
        return await asyncio.to_thread(
            lambda: JSONResponse(self._formatter.whole(collected, usage))
        )


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
