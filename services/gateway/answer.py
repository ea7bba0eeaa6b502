"""One request's HTTP answer: a JSON object, or server-sent events while it is generated."""

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from services.common.tasks import end
from services.gateway.access import key_of
from services.gateway.choices import Delta
from services.gateway.completion import Completion
from services.gateway.event_stream import EventStream, event_text
from services.gateway.gateway import Gateway
from services.gateway.http_errors import public_error, refusal
from services.gateway.keys import ApiKey
from services.gateway.openai_asks import OpenAIAsk
from services.gateway.openai_format import AnswerFormat
from winnow.errors import Overloaded


class Answer(Response):
    """Runs the request while it answers; a client that goes away ends it at once."""

    def __init__(
        self,
        gateway: Gateway,
        asked: OpenAIAsk,
        answer_format: AnswerFormat,
        trace_context: str,
    ) -> None:
        super().__init__()
        self._gateway = gateway
        self._asked = asked
        self._format = answer_format
        self._trace_context = trace_context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _unless_disconnected(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        keepalive_s = self._gateway.settings.sse_keepalive_s
        events = EventStream(send, self._asked.ask.request_id, keepalive_s)
        try:
            response = await self._run(events, key_of(scope))
        except Exception as error:  # whatever it is, the client gets one typed error
            failure = public_error(error)
            if events.started:
                await events.fail(failure)
                return
            response = refusal(failure, self._gateway.metrics)
        if response is not None:
            response.headers["x-request-id"] = self._asked.ask.request_id
            await response(scope, receive, send)

    async def _run(self, events: EventStream, key: ApiKey | None) -> Response | None:
        """The response that is still to be sent, once nothing is held for it any more."""
        asked = self._asked
        async with self._gateway.open(asked.ask, key, self._trace_context) as completion:
            if asked.stream:
                await self._stream(completion, events)
                return None
            return await self._whole(completion)

    async def _stream(self, completion: Completion, events: EventStream) -> None:
        try:
            await self._stream_deltas(completion, events)
        except Overloaded:  # as a refusal, if prefill refuses at once
            raise
        except Exception:
            await events.start()
            raise
        if self._asked.include_usage:
            await events.send(event_text(self._format.usage_chunk(completion.usage())))
        await events.finish()

    async def _stream_deltas(self, completion: Completion, events: EventStream) -> None:
        async with aclosing(completion.paced_deltas(events.patience_s)) as deltas:
            async for delta in deltas:
                text = None if delta is None else await self._event_text(delta)
                if text is None:
                    await events.keep_alive()
                else:
                    await events.send(text)

    async def _event_text(self, delta: Delta) -> str | None:
        """In a thread where a prompt's log-probabilities are in it, which may be many."""
        if delta.prompt:
            return await asyncio.to_thread(self._format_event, delta)
        return self._format_event(delta)

    def _format_event(self, delta: Delta) -> str | None:
        chunk = self._format.chunk(delta)
        return None if chunk is None else event_text(chunk)

    async def _whole(self, completion: Completion) -> Response:
        async with aclosing(completion.deltas()) as deltas:
            collected = [delta async for delta in deltas]
        usage = completion.usage()
        return await asyncio.to_thread(lambda: JSONResponse(self._format.whole(collected, usage)))


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`, and cancels it when the client goes away."""
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
