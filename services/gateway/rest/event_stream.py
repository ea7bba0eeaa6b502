"""Server-sent events, as OpenAI's API streams them."""

import asyncio
import json
import time
from contextlib import suppress
from typing import Any

from starlette.types import Send

from services.gateway.rest.errors import error_object
from winnow.errors import WinnowError

# An error is told to a client that reads; one that does not is not waited for.
_ERROR_TIMEOUT_S = 5.0
# A prefill worker whose queue is full says so at once. Until then an admitted stream could still be
# refused with 429; afterwards its headers go out.
_REFUSAL_TIMEOUT_S = 0.25


def event_text(event: dict[str, Any]) -> str:
    """What an event of a stream carries."""
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"))


class EventStream:
    """Server-sent events: chunks, and comments where there would be silence.

    keepalive_s: how long a silence may be; None or 0 for as long as it takes.
    After an error the stream ends without `[DONE]`.
    """

    def __init__(self, send: Send, request_id: str, keepalive_s: float | None) -> None:
        self._send = send
        self._request_id = request_id
        self._keepalive_s = keepalive_s
        self._said_s = 0.0
        self.started = False

    def patience_s(self) -> float | None:
        """If nothing comes for so many seconds, `keep_alive` is due; None is never."""
        if not self.started:
            return _REFUSAL_TIMEOUT_S
        return max(0.0, self._left_s()) if self._keepalive_s else None

    async def send(self, data: str) -> None:
        """One event, `data: ...`."""
        await self.start()
        await self._send_text(f"data: {data}")

    async def keep_alive(self) -> None:
        """The HTTP status, if it was not sent; a comment, if nothing was for long."""
        await self.start()
        if self._keepalive_s and self._left_s() <= 0:
            await self._send_text(": keep-alive")

    async def finish(self) -> None:
        await self.send("[DONE]")
        await self._end()

    async def fail(self, error: WinnowError) -> None:
        """The error as the last event."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_ERROR_TIMEOUT_S):
                await self.send(event_text(error_object(error)))
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
        self._said_s = time.monotonic()

    def _left_s(self) -> float:
        """Until the silence is as long as it may be."""
        return self._said_s + (self._keepalive_s or 0) - time.monotonic()

    async def _send_text(self, text: str) -> None:
        body = f"{text}\n\n".encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self._said_s = time.monotonic()

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
