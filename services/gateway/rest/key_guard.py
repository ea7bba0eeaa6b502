"""API key check of HTTP requests."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.access.access import Access
from services.gateway.access.keys import ApiKey
from services.gateway.metrics import GatewayMetrics
from services.gateway.rest.errors import refusal
from winnow.errors import InvalidKey

# Called by probes; the answers reveal nothing that needs a key.
PROBES = frozenset({"/health", "/ready"})
_KEY = "winnow.key"


def key_of(scope: Scope) -> ApiKey | None:
    """The key that `KeyGuard` found; None if none is needed."""
    key: ApiKey | None = scope.get(_KEY)
    return key


class KeyGuard:
    """Middleware that answers 401 before a request's body is read.

    open_paths: those that need no key.
    OPTIONS needs no key: it returns only the allowed methods.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        metrics: GatewayMetrics,
        open_paths: frozenset[str],
    ) -> None:
        self._app = app
        self._access = access
        self._metrics = metrics
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope):
            try:
                scope[_KEY] = self._access.require(_authorization(Headers(scope=scope)))
            except InvalidKey as error:
                await refusal(error, self._metrics, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return scope["path"] in self._open_paths or scope["method"] == "OPTIONS"


def _authorization(headers: Headers) -> str | None:
    """The Authorization header, or what Anthropic's clients send in its place."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (f"Bearer {key}" if key else None)
