"""Who is let in, and how often: everybody, or whoever shows an API key of the file."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from services.common.settings import Settings
from services.gateway.http_errors import refusal
from services.gateway.keys import ApiKey, ApiKeys
from services.gateway.metrics import GatewayMetrics
from services.gateway.rate_limits import RateLimits
from winnow.errors import InvalidKey

# What probes ask; they tell nothing that a key would have to guard.
_OPEN_PATHS = frozenset({"/health", "/ready"})
_KEY = "winnow.key"


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


def key_of(scope: Scope) -> ApiKey | None:
    """The key that `KeyGuard` found."""
    key: ApiKey | None = scope.get(_KEY)
    return key


class KeyGuard:
    """Middleware that answers 401 before a request's body is read.

    OPTIONS needs no key: it only tells which methods there are.
    """

    def __init__(self, app: ASGIApp, access: Access, metrics: GatewayMetrics) -> None:
        self._app = app
        self._access = access
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope):
            try:
                scope[_KEY] = self._access.require(Headers(scope=scope).get("authorization"))
            except InvalidKey as error:
                await refusal(error, self._metrics)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    return scope["path"] in _OPEN_PATHS or scope["method"] == "OPTIONS"
