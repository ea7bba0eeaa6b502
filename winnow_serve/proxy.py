"""What Ray Serve's HTTP proxy does to Winnow's answers."""

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_REQUEST_ID = "x-request-id"


def middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH in the environment of Ray's nodes."""
    return [Middleware(OneRequestId)]


class OneRequestId:
    """Middleware that leaves an answer the first of its ids.

    The proxy adds its own, or the client's, to every answer; the service's is before it and stands
    in the log.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_one_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if ids := headers.getlist(_REQUEST_ID):
                    del headers[_REQUEST_ID]
                    headers[_REQUEST_ID] = ids[0]
            await send(message)

        await self._app(scope, receive, send_one_id)
