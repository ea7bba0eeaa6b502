"""API key check of HTTP requests."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.access.access import Access
from services.gateway.access.keys import ApiKey
from services.gateway.metrics import GatewayMetrics
from services.gateway.rest.errors import refusal
from winnow.errors import InvalidKey

# Called by probes; the answers reveal nothing that needs a key.
_OPEN_PATHS = frozenset({"/health", "/ready"})
_KEY = "winnow.key"


def key_of(scope: Scope) -> ApiKey | None:
    """The key that `KeyGuard` found; None if none is needed."""
    key: ApiKey | None = scope.get(_KEY)
    return key


class KeyGuard:
    """Middleware that answers 401 before a request's body is read.

    OPTIONS needs no key: it returns only the allowed methods.
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
