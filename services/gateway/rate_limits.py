"""Requests and tokens per key and minute, counted in Redis where there is one.

Without Redis each gateway process counts for itself.
"""

import logging
import time

import limits.aio.strategies
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.errors import StorageError
from limits.storage import storage_from_string

from services.common.settings import Settings
from services.gateway.keys import ApiKey
from winnow.errors import RateLimited

logger = logging.getLogger(__name__)

# A Redis that does not answer must not keep requests waiting.
_REDIS: dict[str, str | float] = {
    "implementation": "redispy",
    "socket_timeout": 0.5,
    "socket_connect_timeout": 0.5,
}


class RateLimits:
    """Sliding minutes, approximated by two counters per limit."""

    def __init__(self, settings: Settings) -> None:
        url = settings.redis_url.get_secret_value() if settings.redis_url else "memory://"
        url = url.replace("unix://", "redis+unix://", 1) if url.startswith("unix://") else url
        more = {} if url == "memory://" else _REDIS
        storage = storage_from_string(f"async+{url}", wrap_exceptions=True, **more)
        self._limiter = limits.aio.strategies.SlidingWindowCounterRateLimiter(storage)
        self._namespace = f"{settings.namespace}:limits"

    async def charge(self, key: ApiKey, what: str, limit: int | None, amount: int) -> None:
        """Counts `amount` of `what`; raises RateLimited, and counts nothing, if that is too much.

        While Redis does not answer nobody is refused: the keys are checked all the same.
        """
        if limit is None:
            return
        if amount > limit:
            raise RateLimited(
                f"the request has {amount:,} {what}; key {key.name} may use {limit:,} a minute"
            )
        item = RateLimitItemPerMinute(limit, namespace=self._namespace)
        try:
            if not await self._limiter.hit(item, key.name, what, cost=amount):
                raise await self._refusal(item, key, what, limit)
        except StorageError as error:
            logger.warning("rate limits are not counted: %s", error)

    async def _refusal(
        self, item: RateLimitItem, key: ApiKey, what: str, limit: int
    ) -> RateLimited:
        window = await self._limiter.get_window_stats(item, key.name, what)
        return RateLimited(
            f"key {key.name} may use {limit:,} {what} a minute; {window.remaining:,} are left now",
            retry_after_s=max(1, round(window.reset_time - time.time())),
        )
