"""Deadline of open calls during a server's shutdown."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from winnow.errors import DeadlineExceeded


class Shutdown:
    """No deadline until `end_in` is called. Used on one event loop."""

    def __init__(self) -> None:
        self._ends_s: float | None = None
        self._open: set[asyncio.Timeout] = set()

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """Context manager for one call; raises DeadlineExceeded in it at the deadline."""
        try:
            async with asyncio.timeout_at(self._ends_s) as timeout:
                self._open.add(timeout)
                try:
                    yield
                finally:
                    self._open.discard(timeout)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise DeadlineExceeded("the gateway ends, and the request did not before it") from error

    def end_in(self, seconds: float) -> None:
        """Set the deadline: calls still open after `seconds` end."""
        self._ends_s = asyncio.get_running_loop().time() + seconds
        for timeout in self._open:
            if not timeout.expired():
                timeout.reschedule(self._ends_s)
