"""Heartbeat: keeps a process's records in the registry, and removes them at the end."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from services.common.registry import Record, Registry
from winnow.errors import RegistryUnavailable

logger = logging.getLogger(__name__)

BEATS_PER_LEASE = 3


class Heartbeat:
    """Puts `records()` three times per lease; retries if the registry is unavailable.

    records: all with the same worker_id.
    """

    def __init__(
        self, registry: Registry, records: Callable[[], Sequence[Record]], lease_s: float
    ) -> None:
        self._registry = registry
        self._records = records
        self._lease_s = lease_s
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._stopping = False

    async def start(self) -> None:
        """Register the process once, then continue in a task."""
        await self._beat()
        self._task = asyncio.create_task(self._run())

    def hurry(self) -> None:
        """Send the next heartbeat now, because the records changed."""
        self._hurry.set()

    async def stop(self) -> None:
        """Remove the records; if the registry is unavailable, they expire with their lease."""
        if self._task is not None:
            # Not cancelled: redis-py may swallow a cancellation in the middle of a command.
            self._stopping = True
            self._hurry.set()
            await self._task
            self._task = None
            try:
                await self._registry.remove(self._records()[0].worker_id)
            except RegistryUnavailable as error:
                logger.warning("the records of this process stay until their lease ends: %s", error)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._lease_s / BEATS_PER_LEASE):
                    await self._hurry.wait()
            self._hurry.clear()
            if self._stopping:
                return
            await self._beat()

    async def _beat(self) -> None:
        try:
            for record in self._records():
                await self._registry.put(record, self._lease_s)
        except RegistryUnavailable as error:
            logger.warning("this process is not registered: %s", error)
