"""The adapters that requests may ask for: those of the settings, and others while the service runs.

Workers read an adapter when the first request needs it. Gateways agree on the names through the
registry: each tells it what it knows, and of a name the newest change counts.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from services.common.registry import AdapterRecord, Registry
from services.common.settings import Settings
from services.common.tasks import end
from winnow.adapters.description import AdapterDescription, describe_adapter
from winnow.adapters.layers import described_sizes
from winnow.adapters.ref import AdapterRef, AdapterRoom
from winnow.errors import InvalidSetting, RegistryUnavailable, UnknownModel
from winnow.model_files import ModelDescription

logger = logging.getLogger(__name__)

SYNC_S = 1.0  # in which a change reaches the other gateways
MAX_NAMES = 1000


class ServedAdapters:
    """`find`, `names` may be called from any thread, the rest on the event loop.

    Create it on its event loop.  Raises UnusableAdapter for one of the settings.
    """

    def __init__(self, settings: Settings, model: ModelDescription, registry: Registry) -> None:
        self._settings = settings
        self._registry = registry
        self._room = settings.adapter_room()
        self._reader = _Reader(model)
        self._records: dict[str, AdapterRecord] = {}  # the newest of each name
        for name, folder in settings.adapters.items():
            found = self._reader.describe(name, folder, self._require_room())
            self._records[name] = _record(found.ref, version=0)
        self._syncing = asyncio.create_task(self._keep_in_sync()) if self._room else None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are served, in order."""
        records = self._records.copy().values()
        return tuple(sorted(one.worker_id for one in records if not one.is_dropped))

    def find(self, name: str) -> AdapterRef | None:
        record = self._records.get(name)
        if record is None or record.is_dropped:
            return None
        return AdapterRef(record.worker_id, record.digest, record.folder)

    async def describe(self, name: str, folder: str) -> AdapterDescription:
        """An adapter that can be served under the name.  Raises InvalidSetting, UnusableAdapter."""
        room = self._require_room()
        if name in (self._settings.served_name, *self._settings.model_aliases):
            raise InvalidSetting(f"adapter {name} has a name of the model itself", param="name")
        if name not in self._records and len(self._records) >= MAX_NAMES:
            raise InvalidSetting(
                f"{len(self._records):,} adapters are known; the limit is {MAX_NAMES:,}"
            )
        if not Path(folder).is_absolute():
            raise InvalidSetting(
                f"folder {folder!r} is relative; workers need an absolute path", param="folder"
            )
        return await asyncio.to_thread(self._reader.describe, name, Path(folder), room)

    async def add(self, found: AdapterDescription) -> None:
        """Serve an adapter, in the place of another one of that name, whose requests go on.

        Returns when the other gateways know it.  Raises RegistryUnavailable.
        """
        await self._change(_record(found.ref, version=self._next_version(found.name)))
        logger.info("adapter %s is served from %s", found.name, found.folder)

    async def drop(self, name: str) -> None:
        """Refuse further requests for an adapter; those that run finish with it.

        Raises UnknownModel, or RegistryUnavailable.
        """
        ref = self.find(name)
        if ref is None:
            raise UnknownModel(f"adapter {name!r} is not served here", param="name")
        await self._change(_record(ref, version=self._next_version(name), is_dropped=True))
        logger.info("adapter %s is served no more", name)

    async def close(self) -> None:
        if self._syncing is not None:
            await end(self._syncing)

    def _require_room(self) -> AdapterRoom:
        if self._room is None:
            raise InvalidSetting(
                "there is room for 0 adapters; start the service with max_adapters",
                param="max_adapters",
            )
        return self._room

    def _next_version(self, name: str) -> int:
        """Above the one that is known, also if that came from a clock ahead of this one."""
        own = self._records.get(name)
        return max(time.time_ns(), own.version + 1 if own else 0)

    async def _change(self, record: AdapterRecord) -> None:
        await self._registry.put(record, self._settings.lease_s)
        self._take(record)
        if self._settings.gateway_replicas > 1:
            await asyncio.sleep(SYNC_S)

    def _take(self, record: AdapterRecord) -> bool:
        """Whether it is newer than what was known of its name; it is served, or dropped, then."""
        own = self._records.get(record.worker_id)
        if own is not None and own.version >= record.version:
            return False
        self._records[record.worker_id] = record
        return True

    async def _keep_in_sync(self) -> None:
        while True:
            try:
                await self._sync()
            except RegistryUnavailable as error:
                logger.warning("adapters are not in step with other gateways: %s", error)
            await asyncio.sleep(min(SYNC_S, self._settings.lease_s / 3))

    async def _sync(self) -> None:
        """Take in newer records, and keep all that are not of the settings from expiring."""
        for record in await self._registry.adapters():
            if self._take(record):
                change = "served no more" if record.is_dropped else f"served from {record.folder}"
                logger.info("adapter %s is %s, as another gateway says", record.worker_id, change)
        for record in list(self._records.values()):
            if record.version:
                await self._registry.put(record, self._settings.lease_s)


class _Reader:
    """Reads adapters of one model, whose layers it looks at when it reads the first."""

    def __init__(self, model: ModelDescription) -> None:
        self._model = model
        self._sizes: Mapping[str, tuple[int, int]] = {}

    def describe(self, name: str, folder: Path, room: AdapterRoom) -> AdapterDescription:
        if not self._sizes:
            self._sizes = described_sizes(self._model)
        return describe_adapter(name, folder, self._sizes, room.max_rank)


def require_adapters(settings: Settings, model: ModelDescription) -> None:
    """Raise UnusableAdapter unless the model can have all adapters of the settings."""
    room, reader = settings.adapter_room(), _Reader(model)
    for name, folder in settings.adapters.items():
        assert room is not None
        reader.describe(name, folder, room)


def _record(ref: AdapterRef, *, version: int, is_dropped: bool = False) -> AdapterRecord:
    return AdapterRecord(ref.name, ref.digest, ref.folder, version, is_dropped)
