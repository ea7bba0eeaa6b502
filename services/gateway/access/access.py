"""Who is let in, and how often: everybody, or whoever shows an API key of the file."""

from services.common.settings import Settings
from services.gateway.access.keys import ApiKey, ApiKeys
from services.gateway.access.rate_limits import RateLimits


class Access:
    """Raises InvalidSetting for a file of keys that is no use."""

    def __init__(self, settings: Settings) -> None:
        path = settings.api_keys_file
        self._keys = None if path is None else ApiKeys(path)
        self._limits = None if path is None else RateLimits(settings)

    async def close(self) -> None:
        """Drop the connections to where limits are counted."""
        if self._limits is not None:
            await self._limits.close()

    def require(self, authorization: str | None) -> ApiKey | None:
        """The caller's key, None where none is needed; raises InvalidKey."""
        return None if self._keys is None else self._keys.require(authorization)

    async def charge_request(self, key: ApiKey | None) -> None:
        """Counts a request against its key's limit; raises RateLimited."""
        if key is not None and self._limits is not None:
            await self._limits.charge(key, "requests", key.requests_per_minute, 1)

    async def require_tokens(self, key: ApiKey | None, num_tokens: int) -> None:
        """Raises RateLimited if `charge_tokens` would now."""
        if key is not None and self._limits is not None:
            await self._limits.require(key, "tokens", key.tokens_per_minute, num_tokens)

    async def charge_tokens(self, key: ApiKey | None, num_tokens: int) -> None:
        """Counts the most tokens that a request can use; raises RateLimited."""
        if key is not None and self._limits is not None:
            await self._limits.charge(key, "tokens", key.tokens_per_minute, num_tokens)
