"""How long calls may go on when their server is about to end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from winnow.errors import DeadlineExceeded


class Shutdown:
    """Endless until `end_in` is called. Belongs to one event loop."""

    def __init__(self) -> None:
        self._ends_s: float | None = None
        self._open: set[asyncio.Timeout] = set()

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """A block for one call; raises DeadlineExceeded in it when the time is up."""
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
        """Ends the calls that are still open by then."""
        self._ends_s = asyncio.get_running_loop().time() + seconds
        for timeout in self._open:
            if not timeout.expired():
                timeout.reschedule(self._ends_s)
