"""Finds a free TCP port for a process that starts later."""

import random
import socket

from winnow.errors import InvalidSetting

# Below Linux's ephemeral ports (32768 and up), above those of Ray's workers (10002 to 19999): no
# other connection or server that asks for any free port is given one of these in the meantime.
_CANDIDATES = range(20_000, 32_768)
_MAX_TRIES = 100


def free_port(host: str = "127.0.0.1") -> int:
    """A port with no listener.  Raises InvalidSetting if there is none, or the host is invalid."""
    error = OSError("every one that was tried is taken")
    for port in random.sample(_CANDIDATES, _MAX_TRIES):
        try:
            listening(host, port).close()
            return port
        except OSError as taken:
            error = taken
    raise InvalidSetting(f"no free port on {host}: {error.strerror or error}") from error


def listening(host: str, port: int, *, share: bool = False) -> socket.socket:
    """A socket listening on the port.  Raises OSError if it cannot.

    share: the port may be shared with other processes that allow it too.
    """
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(share))
        probe.bind((host, port))
        probe.listen(1)  # without listen, bind alone does not collide with every listener
    except OSError:
        probe.close()
        raise
    return probe
