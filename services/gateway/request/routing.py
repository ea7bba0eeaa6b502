"""Routing of prompts: to the decode worker with the same model and the most free KV memory."""

import asyncio
import logging
import time

from services.common.registry import Registry, WorkerRecord
from services.common.tls import PeerTls, open_aio_channel
from winnow.errors import RegistryUnavailable
from winnow.v1.decode_pb2_grpc import DecodeStub
from winnow.wire import WIRE_VERSIONS, newest_common

logger = logging.getLogger(__name__)

_REFRESH_S = 0.5
# A worker that could not be reached is tried last for this long: its record outlives it.
_SUSPECT_S = 5.0


class _Peer:
    """The gateway's own state for one worker, besides its record."""

    def __init__(self, address: str, peers: PeerTls | None) -> None:
        self.channel = open_aio_channel(address, peers)
        self.num_places = 0
        self.pages_held = 0
        self.suspect_until_s = 0.0


class WorkerConnection:
    """One request's use of a worker: keeps its channel open and counts the pages it holds."""

    def __init__(self, peer: _Peer) -> None:
        self._peer = peer
        self._num_pages = 0
        self.stub = DecodeStub(peer.channel)
        peer.num_places += 1

    def count_pages(self, num_pages: int) -> None:
        """Count the request's reserved pages against the worker."""
        self._num_pages += num_pages
        self._peer.pages_held += num_pages

    def suspect(self) -> None:
        """Note that the worker could not be reached."""
        self._peer.suspect_until_s = time.monotonic() + _SUSPECT_S

    def leave(self) -> None:
        """End the use; call it once, when the request has ended."""
        self._peer.num_places -= 1
        self._peer.pages_held -= self._num_pages


class Router:
    """Tracks the live workers and holds one channel to each.

    Records are some seconds old, so pages held by this gateway's own requests also count against a
    worker. If the registry does not answer, the last known records stay in use; if it has lost all
    records, as after a restart of Redis, they stay in use for `refill_s`.
    """

    def __init__(
        self,
        registry: Registry,
        fingerprint: str,
        peer_tls: PeerTls | None = None,
        refill_s: float = 0.0,
    ) -> None:
        self._peer_tls = peer_tls
        self._registry = registry
        self._fingerprint = fingerprint
        self._refill_s = refill_s
        self._emptied_s: float | None = None  # when the registry was first found empty
        self._records: list[WorkerRecord] | None = None
        self._read_s = -_REFRESH_S
        self._refreshing = asyncio.Lock()
        self._peers: dict[str, _Peer] = {}

    async def candidates(self) -> list[WorkerRecord]:
        """Compatible workers that take requests, best first; may be empty.

        Raises RegistryUnavailable if the registry has never answered.
        """
        async with self._refreshing:
            if time.monotonic() - self._read_s >= _REFRESH_S:
                await self._refresh()
        return sorted(filter(self._takes, self._records or []), key=self._rank)

    def enter(self, worker: WorkerRecord) -> WorkerConnection:
        """A connection to the worker for one more request."""
        peer = self._peers.get(worker.worker_id)
        if peer is None:
            peer = self._peers[worker.worker_id] = _Peer(worker.address, self._peer_tls)
        return WorkerConnection(peer)

    async def close(self) -> None:
        """Close all channels, which ends calls still open on them."""
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            await peer.channel.close()

    @property
    def num_incompatible(self) -> int:
        """Number of live workers that cannot serve this gateway's requests."""
        return sum(self._fault(record) is not None for record in self._records or [])

    def _takes(self, record: WorkerRecord) -> bool:
        return not record.draining and self._fault(record) is None

    def _fault(self, record: WorkerRecord) -> str | None:
        """Why the worker and this gateway are incompatible; None if they are compatible."""
        if record.fingerprint != self._fingerprint:
            return f"it holds model {record.fingerprint}; this gateway's is {self._fingerprint}"
        if newest_common(record.wire_versions) is None:
            return f"it speaks wire versions {record.wire_versions}; this gateway {WIRE_VERSIONS}"
        return None

    def _report_new_faults(self, before: set[str]) -> None:
        for record in self._records or []:
            fault = self._fault(record)
            if fault is not None and record.worker_id not in before:
                logger.warning("decode worker %s gets no requests: %s", record.worker_id, fault)

    def _rank(self, record: WorkerRecord) -> tuple[bool, int]:
        peer = self._peers.get(record.worker_id)
        if peer is None:
            return False, -record.pages_free
        suspect = peer.suspect_until_s > time.monotonic()
        return suspect, peer.pages_held - record.pages_free

    async def _refresh(self) -> None:
        before = {record.worker_id for record in self._records or []}
        try:
            self._records = self._believed(await self._registry.workers())
        except RegistryUnavailable as error:
            if self._records is None:
                raise
            logger.warning("%s; %d workers are known from before", error, len(self._records))
            self._emptied_s = None
        self._read_s = time.monotonic()
        self._report_new_faults(before)
        await self._forget_gone({record.worker_id for record in self._records})

    def _believed(self, records: list[WorkerRecord]) -> list[WorkerRecord]:
        """The registry's records, or the last known ones if it may just have lost them."""
        if records or not self._records:
            self._emptied_s = None
            return records
        if self._emptied_s is None:
            self._emptied_s = time.monotonic()
        refilling = time.monotonic() - self._emptied_s < self._refill_s
        return self._records if refilling else records

    async def _forget_gone(self, known: set[str]) -> None:
        """Close channels to workers that are gone and have no requests of this gateway."""
        gone = [i for i, peer in self._peers.items() if i not in known and not peer.num_places]
        for worker_id in gone:
            await self._peers.pop(worker_id).channel.close()
