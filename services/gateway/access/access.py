"""Access control of the gateway: open to all, or API keys with rate limits."""

import hashlib

from services.common.settings import Settings
from services.gateway.access.keys import ApiKey, ApiKeys
from services.gateway.access.rate_limits import RateLimits


class Access:
    """Checks keys and rate limits.  Raises InvalidSetting if the key file cannot be used."""

    def __init__(self, settings: Settings) -> None:
        path = settings.api_keys_file
        self._keys = None if path is None else ApiKeys(path)
        self._limits = None if path is None else RateLimits(settings)

    async def close(self) -> None:
        """Close the connections to the store of rate limits."""
        if self._limits is not None:
            await self._limits.close()

    def require(self, authorization: str | None) -> ApiKey | None:
        """The caller's key; None if no key is needed.  Raises InvalidKey."""
        return None if self._keys is None else self._keys.require(authorization)

    async def charge_request(self, key: ApiKey | None) -> None:
        """Count a request against its key's limit.  Raises RateLimited."""
        if key is not None and self._limits is not None:
            await self._limits.charge(key, "requests", key.requests_per_minute, 1)

    async def require_tokens(self, key: ApiKey | None, num_tokens: int) -> None:
        """Raise RateLimited if `charge_tokens` would now."""
        if key is not None and self._limits is not None:
            await self._limits.require(key, "tokens", key.tokens_per_minute, num_tokens)

    async def charge_tokens(self, key: ApiKey | None, num_tokens: int) -> None:
        """Count the most tokens a request can use.  Raises RateLimited."""
        if key is not None and self._limits is not None:
            await self._limits.charge(key, "tokens", key.tokens_per_minute, num_tokens)

    def cache_salt(self, key: ApiKey | None, cache_salt: str | None) -> str:
        """The salt of a request's prefixes: the same only for the same key and the same own salt.

        It is a hash, so that what it is made of does not leave the gateway.
        """
        tenant = "" if key is None else key.sha256  # has no colon, so no two pairs are mixed alike
        mixed = f"{tenant}:{cache_salt or ''}"
        return hashlib.sha256(mixed.encode()).hexdigest()
