"""Server-sent events."""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import suppress

from starlette.types import Send

from services.gateway.rest.request_ids import request_ids
from services.gateway.rest.responses import Event

# How long to wait for a client to read an error.
_ERROR_TIMEOUT_S = 5.0
# A full prefill queue refuses at once. Until this time a stream can still be refused with HTTP 429;
# then its headers are sent.
_REFUSAL_TIMEOUT_S = 0.25


def event_text(event: Event) -> str:
    """An event's lines."""
    data = json.dumps(event.data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {data}" if event.name is None else f"event: {event.name}\ndata: {data}"


class EventStream:
    """An event stream, with comments as keepalive during silence.

    keepalive_s: the longest silence in seconds; None or 0 means no keepalive.  first: the events
    that go out with the headers, as `event_text` has them.
    """

    def __init__(
        self, send: Send, request_id: str, keepalive_s: float | None, first: Sequence[str] = ()
    ) -> None:
        self._send = send
        self._first = first
        self._request_id = request_id
        self._keepalive_s = keepalive_s
        self._said_s = 0.0
        self.started = False

    def patience_s(self) -> float | None:
        """Seconds of silence after which `keep_alive` is due; None for never."""
        if not self.started:
            return _REFUSAL_TIMEOUT_S
        return max(0.0, self._left_s()) if self._keepalive_s else None

    async def send(self, lines: str) -> None:
        """Send one event, as `event_text` has it."""
        await self.start()
        await self._send_text(lines)

    async def keep_alive(self) -> None:
        """Send the headers if they were not sent; a comment if the silence is too long."""
        await self.start()
        if self._keepalive_s and self._left_s() <= 0:
            await self._send_text(": keep-alive")

    async def finish(self, done: str | None) -> None:
        """End the stream, after a last line of data if there is one."""
        if done is not None:
            await self.send(f"data: {done}")
        await self._end()

    async def fail(self, lines: str) -> None:
        """Send what tells of an error as the last event."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_ERROR_TIMEOUT_S):
                await self.send(lines)
                await self._end()

    async def start(self) -> None:
        """Send the HTTP status and headers, once."""
        if self.started:
            return
        self.started = True
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would hold events back
            **request_ids(self._request_id),
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})
        self._said_s = time.monotonic()
        for lines in self._first:
            await self._send_text(lines)

    def _left_s(self) -> float:
        """Seconds until the silence reaches its limit."""
        return self._said_s + (self._keepalive_s or 0) - time.monotonic()

    async def _send_text(self, text: str) -> None:
        body = f"{text}\n\n".encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self._said_s = time.monotonic()

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
