"""Rate limits: requests and tokens per key and minute.

They are counted in Redis if there is one; otherwise each gateway process counts for itself.
"""

import logging
import time
from collections.abc import Awaitable, Callable

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError

from services.common.redis_access import RedisPool, open_redis_pool
from services.common.settings import Settings
from services.gateway.access.keys import ApiKey
from winnow.errors import RateLimited

logger = logging.getLogger(__name__)

# An unresponsive Redis must not delay requests.
_TIMEOUT_S = 0.5


def _storage(pool: RedisPool | None) -> RedisStorage | MemoryStorage:
    if pool is None:
        return MemoryStorage()
    return RedisStorage(
        "async+redis://",
        implementation="redispy",
        wrap_exceptions=True,
        connection_pool=pool,  # type: ignore[arg-type]  # documented, but missing in its types
    )


class RateLimits:
    """Limits over a sliding minute, approximated with two counters per limit."""

    def __init__(self, settings: Settings) -> None:
        self._pool = open_redis_pool(settings, _TIMEOUT_S)
        self._limiter = SlidingWindowCounterRateLimiter(_storage(self._pool))
        self._namespace = f"{settings.namespace}:limits"

    async def close(self) -> None:
        """Close the connections; the counts stay."""
        if self._pool is not None:
            await self._pool.aclose()

    async def require(self, key: ApiKey, what: str, limit: int | None, amount: int) -> None:
        """Raise RateLimited if `charge` would now; counts nothing."""
        await self._ask(self._limiter.test, key, what, limit, amount)

    async def charge(self, key: ApiKey, what: str, limit: int | None, amount: int) -> None:
        """Count `amount` of `what`.  Raises RateLimited, and counts nothing, if over the limit.

        While Redis does not answer, limits are not applied; keys are still checked.
        """
        await self._ask(self._limiter.hit, key, what, limit, amount)

    async def _ask(
        self,
        allows: Callable[..., Awaitable[bool]],
        key: ApiKey,
        what: str,
        limit: int | None,
        amount: int,
    ) -> None:
        if limit is None:
            return
        if amount > limit:
            raise RateLimited(
                f"the request has {amount:,} {what}; key {key.name} may use {limit:,} a minute"
            )
        item = RateLimitItemPerMinute(limit, namespace=self._namespace)
        try:
            if not await allows(item, key.name, what, cost=amount):
                raise await self._refusal(item, key, what, limit)
        except (StorageError, RuntimeError) as error:  # RuntimeError: see redis_registry.py
            logger.warning("rate limits are not counted: %s", error)

    async def _refusal(
        self, item: RateLimitItem, key: ApiKey, what: str, limit: int
    ) -> RateLimited:
        window = await self._limiter.get_window_stats(item, key.name, what)
        return RateLimited(
            f"key {key.name} may use {limit:,} {what} a minute; {window.remaining:,} are left now",
            retry_after_s=max(1, round(window.reset_time - time.time())),
        )
