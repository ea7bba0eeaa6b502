"""Limits the size of a request's line and headers."""

from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.metrics import GatewayMetrics
from services.gateway.rest.errors import refusal
from winnow.errors import HeadersTooLarge

MAX_HEADER_BYTES = 32 << 10


class HeaderLimit:
    """Middleware that answers 431 to more than MAX_HEADER_BYTES, before anything reads them.

    By then the HTTP server has them in memory; limiting that is up to the server.
    """

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (size := _size(scope)) > MAX_HEADER_BYTES:
            error = HeadersTooLarge(
                f"request line and headers have {size:,} bytes; the limit is {MAX_HEADER_BYTES:,}"
            )
            await refusal(error, self._metrics, scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _size(scope: Scope) -> int:
    line = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
    return line + sum(len(name) + len(value) for name, value in scope["headers"])
