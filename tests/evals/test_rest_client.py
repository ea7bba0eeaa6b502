"""Services that answer otherwise than Winnow does, on a real socket."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from evals import rest_client
from evals.endpoint import EndpointModel
from evals.rest_client import RestClient
from winnow.errors import InvalidSetting

MODELS = {"data": [{"id": "m", "max_model_len": 2048}]}
# Status, headers, body.
Reply = tuple[int, dict[str, str], Any]


@contextmanager
def served(reply: Callable[[str], Reply]) -> Iterator[RestClient]:
    """A client of a server that answers each path so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = reply(self.path)
            content = json.dumps(body).encode()
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        with RestClient(f"http://127.0.0.1:{server.server_port}", 1) as client:
            yield client
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("body", [{}, {"tokens": None}, {"tokens": 7}])
def test_a_service_that_does_not_tokenize_is_no_winnow_service(body: dict[str, Any]) -> None:
    def reply(path: str) -> Reply:
        return 200, {}, MODELS if path == "/v1/models" else body

    with served(reply) as client, pytest.raises(InvalidSetting, match="is not a Winnow service"):
        EndpointModel(client, model=None, chat=False, pruning={})


@pytest.mark.parametrize("body", [{}, [], {"data": []}, {"data": [{"id": "m"}]}, {"data": 3}])
def test_a_service_without_model_cards_is_no_winnow_service(body: Any) -> None:
    def reply(path: str) -> Reply:
        return 200, {}, body

    with served(reply) as client, pytest.raises(InvalidSetting, match="is not a Winnow service"):
        client.model_card(None)


@pytest.mark.parametrize("after", ["0", "Wed, 21 Oct 2026 07:28:00 GMT", "soon", "-1", None])
def test_a_busy_service_is_asked_again_whatever_its_retry_after_says(
    after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_client, "_PAUSE_S", 0.01)
    replies = iter(
        [(503, {} if after is None else {"retry-after": after}, {}), (200, {}, {"a": 1})]
    )

    with served(lambda _: next(replies)) as client:
        assert client.post("/v1/completions", {}) == {"a": 1}
