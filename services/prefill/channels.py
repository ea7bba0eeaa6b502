"""Channels to decode workers, kept between pushes and closed when a worker is lost."""

import threading
from dataclasses import dataclass

import grpc

from services.common.tls import PeerTls, open_channel


@dataclass(slots=True)
class _Connection:
    address: str
    channel: grpc.Channel
    users: int = 0
    lost: bool = False


class Channels:
    """One channel per address; thread-safe."""

    def __init__(self, peers: PeerTls | None = None) -> None:
        self._peers = peers
        self._lock = threading.Lock()
        self._connections: dict[str, _Connection] = {}  # those that are lent out again
        self._borrowed: dict[grpc.Channel, _Connection] = {}
        # Channels are given back on gRPC's threads, where closing one can deadlock.
        self._retired: list[grpc.Channel] = []

    def borrow(self, address: str) -> grpc.Channel:
        """A channel to `address`; give it back when its call has ended."""
        self._close_retired()
        with self._lock:
            connection = self._connections.get(address)
            if connection is None:
                channel = open_channel(address, self._peers)
                connection = self._connections[address] = _Connection(address, channel)
            connection.users += 1
            self._borrowed[connection.channel] = connection
            return connection.channel

    def give_back(self, channel: grpc.Channel, *, lost: bool) -> None:
        """`lost`: the worker could not be reached; its channel is closed after its last user."""
        with self._lock:
            connection = self._borrowed[channel]
            connection.users -= 1
            connection.lost = connection.lost or lost
            if connection.lost and self._connections.get(connection.address) is connection:
                del self._connections[connection.address]
            if not connection.users:
                del self._borrowed[channel]
                if connection.lost:
                    self._retired.append(channel)

    def close(self) -> None:
        """Close all channels, which cancels running calls."""
        with self._lock:
            idle = [connection.channel for connection in self._connections.values()]
            self._retired += {*idle, *self._borrowed}
        self._close_retired()

    def _close_retired(self) -> None:
        with self._lock:
            retired, self._retired = self._retired, []
        for channel in retired:
            channel.close()
