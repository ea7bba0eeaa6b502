"""A redis-server of a test's own."""

import subprocess

from tests.deadlines import SOON_S


def start_redis(*flags: str) -> subprocess.Popen[str]:
    """The process, once it takes connections; `stop_redis` ends it."""
    server = subprocess.Popen(
        ["redis-server", "--save", "", *flags], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    for line in server.stdout:
        if "ready to accept connections" in line.lower():
            return server
    raise AssertionError(f"redis-server ended with {server.wait()}")


def stop_redis(server: subprocess.Popen[str]) -> None:
    server.terminate()
    server.communicate(timeout=SOON_S)
