"""One request's HTTP answer: a JSON object, or server-sent events while it is generated."""

import asyncio
import json
import logging
import math
import time
from collections.abc import Coroutine
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from services.common.tasks import end
from services.gateway.access import key_of
from services.gateway.completion import Completion
from services.gateway.gateway import Gateway
from services.gateway.http_errors import error_object, public_error, refusal
from services.gateway.keys import ApiKey
from services.gateway.openai_asks import OpenAIAsk
from services.gateway.openai_format import AnswerFormat
from winnow.errors import Overloaded, WinnowError

logger = logging.getLogger(__name__)

# An error is told to a client that reads; one that does not is not waited for.
_ERROR_TIMEOUT_S = 5.0
# A prefill worker whose queue is full says so at once. Until then an admitted stream could still be
# refused with 429; afterwards its headers go out.
_REFUSAL_TIMEOUT_S = 0.25


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

    async def _run(self, events: "EventStream", key: ApiKey | None) -> Response | None:
        """The response that is still to be sent, once nothing is held for it any more."""
        asked = self._asked
        async with self._gateway.open(asked.ask, key, self._trace_context) as completion:
            if asked.stream:
                await self._stream(completion, events)
                return None
            return JSONResponse(await self._whole(completion))

    async def _stream(self, completion: Completion, events: "EventStream") -> None:
        try:
            await self._stream_deltas(completion, events)
        except Overloaded:  # as a refusal, if prefill refuses at once
            raise
        except Exception:
            await events.start()
            raise
        if self._asked.include_usage:
            await events.send(self._format.usage_chunk(completion.usage()))
        await events.finish()

    async def _stream_deltas(self, completion: Completion, events: "EventStream") -> None:
        async with aclosing(completion.paced_deltas(events.patience_s)) as deltas:
            async for delta in deltas:
                chunk = None if delta is None else self._format.chunk(delta)
                if chunk is None:
                    await events.keep_alive()
                else:
                    await events.send(chunk)

    async def _whole(self, completion: Completion) -> dict[str, Any]:
        async with aclosing(completion.deltas()) as deltas:
            collected = [delta async for delta in deltas]
        return self._format.whole(collected, completion.usage())


class EventStream:
    """Server-sent events: chunks, and comments where there would be silence.

    keepalive_s: how long a silence may be; None or 0 for as long as it takes.
    After an error the stream ends without `[DONE]`.
    """

    def __init__(self, send: Send, request_id: str, keepalive_s: float | None) -> None:
        self._send = send
        self._request_id = request_id
        self._keepalive_s = keepalive_s
        self._said_s = -math.inf
        self.started = False

    def patience_s(self) -> float | None:
        """After so many seconds without an event, `keep_alive` is due; None is never."""
        return (self._keepalive_s or None) if self.started else _REFUSAL_TIMEOUT_S

    async def send(self, event: dict[str, Any]) -> None:
        """One event, `data: {...}`."""
        await self._send_data(json.dumps(event, ensure_ascii=False, separators=(",", ":")))

    async def keep_alive(self) -> None:
        """The HTTP status, if it was not sent, and a comment, if nothing was for long."""
        await self.start()
        if self._keepalive_s and time.monotonic() - self._said_s >= self._keepalive_s:
            await self._send_text(": keep-alive")

    async def finish(self) -> None:
        await self._send_data("[DONE]")
        await self._end()

    async def fail(self, error: WinnowError) -> None:
        """The error as the last event."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_ERROR_TIMEOUT_S):
                await self.send(error_object(error))
                await self._end()

    async def start(self) -> None:
        """The HTTP status and the headers, once."""
        if self.started:
            return
        self.started = True
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would hold events back
            "x-request-id": self._request_id,
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def _send_data(self, data: str) -> None:
        await self.start()
        await self._send_text(f"data: {data}")

    async def _send_text(self, text: str) -> None:
        body = f"{text}\n\n".encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self._said_s = time.monotonic()

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


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
