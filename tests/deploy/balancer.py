"""What stands before several gateways: it hands each new connection to the next one that is ready.

As a Service of Kubernetes: connections that are open stay where they are.
"""

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable

_CHUNK_BYTES = 65536


class Balancer:
    """backends: ports. is_ready: asked for each connection."""

    def __init__(self, backends: Callable[[], list[int]], is_ready: Callable[[int], bool]) -> None:
        self._backends = backends
        self._is_ready = is_ready
        self._turn = itertools.count()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> "Balancer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            ready = [port for port in self._backends() if self._is_ready(port)]
            port = ready[next(self._turn) % len(ready)]
            with socket.create_connection(("127.0.0.1", port)) as backend:
                answers = threading.Thread(target=_copy, args=(backend, client), daemon=True)
                answers.start()
                _copy(client, backend)
                answers.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK_BYTES):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
