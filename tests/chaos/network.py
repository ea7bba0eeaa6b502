"""A network of the tests' own: a TCP proxy before each port, which is slow, silent or breaks."""

import asyncio
import contextlib
import math
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

_CHUNK_BYTES = 65536
_CLOSE_TIMEOUT_S = 1.0
_LOOPBACK = "127.0.0.1"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s


@dataclass(frozen=True, slots=True)
class Condition:
    """What a link does to its bytes.

    bytes_per_s: of each connection and direction. delay_s: before every 64 KiB at most.
    up, down: whether bytes pass towards the server, and back. Those that do not pass wait, and
    connections stay open: the ends see silence.
    """

    bytes_per_s: float = math.inf
    delay_s: float = 0.0
    up: bool = True
    down: bool = True


CLEAR = Condition()
SILENT = Condition(up=False, down=False)
CRAWLING = Condition(bytes_per_s=2e5)

_Direction = Callable[[Condition], bool]


def _up(condition: Condition) -> bool:
    return condition.up


def _down(condition: Condition) -> bool:
    return condition.down


class Link:
    """One listening port of the proxy.

    target_port: where it leads to; connections made from then on do. num_held: connections and
    pieces of data that wait. Belongs to the network's event loop.
    """

    def __init__(self) -> None:
        self.target_port = 0
        self.num_held = 0
        self._condition = CLEAR
        self._changed = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accepted, _LOOPBACK, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await self._server.wait_closed()

    def become(self, condition: Condition) -> None:
        """From now on; bytes that waited for it pass."""
        self._condition = condition
        self._changed.set()
        self._changed = asyncio.Event()

    def reset(self) -> None:
        """Every connection breaks at both ends; new ones can be made."""
        for writer in self._writers:
            _abort(writer)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            pass  # the network closes
        finally:
            self._connections.remove(connection)

    async def _serve(
        self, client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter
    ) -> None:
        async with contextlib.AsyncExitStack() as opened:
            opened.push_async_callback(self._forget, client_writer)
            self._writers.add(client_writer)
            await self._until(_up)
            try:
                reader, writer = await asyncio.open_connection(_LOOPBACK, self.target_port)
            except OSError:
                _abort(client_writer)
                return
            opened.push_async_callback(self._forget, writer)
            self._writers.add(writer)
            await _until_one_ends(
                self._carry(client_reader, writer, _up), self._carry(reader, client_writer, _down)
            )

    async def _carry(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, direction: _Direction
    ) -> None:
        """Returns when the source has ended and the target could know it."""
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK_BYTES):
                condition = self._condition
                await asyncio.sleep(condition.delay_s + len(data) / condition.bytes_per_s)
                await self._until(direction)
                target.write(data)
                await target.drain()
        await self._until(direction)

    async def _until(self, direction: _Direction) -> None:
        self.num_held += 1
        try:
            while not direction(self._condition):
                await self._changed.wait()
        finally:
            self.num_held -= 1

    async def _forget(self, writer: asyncio.StreamWriter) -> None:
        self._writers.remove(writer)
        writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await writer.wait_closed()
        writer.transport.abort()  # an end that does not read


class Network:
    """Links by name, on an event loop in a thread of its own; every method is for other threads."""

    def __init__(self) -> None:
        self.links: dict[str, Link] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network")
        self._thread.start()

    def lead(self, name: str, target_port: int) -> int:
        """The port of the link `name`, which leads to `target_port` from now on."""
        if name not in self.links:
            self.links[name] = self._run(_opened())
        self.links[name].target_port = target_port
        return self.links[name].port

    def become(self, condition: Condition, *names: str) -> None:
        for name in names:
            self._loop.call_soon_threadsafe(self.links[name].become, condition)

    def heal(self) -> None:
        self.become(CLEAR, *self.links)

    def reset(self, *names: str) -> None:
        for name in names:
            self._loop.call_soon_threadsafe(self.links[name].reset)

    def close(self) -> None:
        for link in self.links.values():
            self._run(link.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)


async def _opened() -> Link:
    link = Link()
    await link.open()
    return link


def _abort(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()


async def _until_one_ends(*directions: Coroutine[Any, Any, None]) -> None:
    tasks = [asyncio.create_task(direction) for direction in directions]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
