"""A hub's model comes to this machine before anything is started."""

import http.server
import json
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import ClassVar

from services.common.ports import listening
from services.common.settings import Settings
from winnow.hub.download import Pause
from winnow.hub.store import local_model

_RETRY_S = 10
_TIMEOUT_S = 5.0


def fetch(settings: Settings) -> str:
    """Where the model is on this machine.  Raises UnusableModel."""
    hub_model = settings.hub_model
    return settings.model if hub_model is None else str(local_model(hub_model).path)


def with_fetched_model(settings: Settings, pause: Pause) -> Settings:
    """`settings` with the commit that all processes are to load, which is on this machine then.

    Meanwhile the service's ports say that the model is being downloaded.
    pause: see `local_model`.  Raises UnusableModel.
    """
    hub_model = settings.hub_model
    if hub_model is None:
        return settings
    with _answering(settings) as told:
        found = local_model(hub_model, pause=pause, on_progress=told.set)
    return settings.model_copy(update={"model": str(found.pinned), "revision": None})


class Downloaded:
    """Bytes of the model that are there, and in all."""

    def __init__(self) -> None:
        self.done_bytes = self.total_bytes = 0

    def set(self, done_bytes: int, total_bytes: int) -> None:
        self.done_bytes, self.total_bytes = done_bytes, total_bytes


@contextmanager
def _answering(settings: Settings) -> Iterator[Downloaded]:
    downloaded, context = Downloaded(), _tls(settings)
    servers = [_Server(settings.host, settings.port, _Handler, context)]
    if settings.admin_port is not None:
        admin = type("Admin", (_Handler,), {"downloaded": downloaded, "model": settings.model})
        servers.append(_Server(settings.decode_host, settings.admin_port, admin, None))
    threads = [threading.Thread(target=one.serve_forever, args=(0.1,)) for one in servers]
    for thread in threads:
        thread.start()
    try:
        yield downloaded
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def _tls(settings: Settings) -> ssl.SSLContext | None:
    """Raises InvalidSetting for files that cannot be used."""
    from services.common.tls import public_credentials  # noqa: PLC0415 - loads gRPC

    if settings.tls_cert_file is None:
        return None
    public_credentials(settings)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
    return context


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def __init__(
        self,
        host: str,
        port: int,
        handler: type[http.server.BaseHTTPRequestHandler],
        context: ssl.SSLContext | None,
    ) -> None:
        super().__init__((host, port), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening(host, port)
        if context is not None:  # each connection's thread shakes hands, not the one that accepts
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away, or spoke no TLS, is nothing to report."""


class _Handler(http.server.BaseHTTPRequestHandler):
    """downloaded: told on the admin port alone, as all details are."""

    downloaded: ClassVar[Downloaded | None] = None
    model: ClassVar[str] = ""
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        body: dict[str, object] = {"status": "downloading"}
        if self.path.partition("?")[0] not in ("/ready", "/health"):
            body = {"error": _ERROR}
        elif self.downloaded is not None:
            body |= {"model": self.model, **vars(self.downloaded)}
        content = json.dumps(body).encode()
        self.send_response(HTTPStatus.SERVICE_UNAVAILABLE)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Retry-After", str(_RETRY_S))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None: ...


_ERROR = {
    "message": "the model is being downloaded",
    "type": "service_unavailable_error",
    "code": "downloading",
    "param": None,
}
