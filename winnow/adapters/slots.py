"""AdapterSlots: the adapters that a worker has in its model, each in a slot.

An adapter is read when the first request needs it. One that no request uses stays until its slot is
needed, the least recently used first.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from winnow.adapters.description import (
    WEIGHTS_FILE,
    AdapterDescription,
    LinearSizes,
    describe_adapter,
    digest_of,
)
from winnow.adapters.ref import AdapterRef, AdapterRoom
from winnow.adapters.rows import AdapterRows
from winnow.adapters.stack import AdapterStack, Pair, pair_of
from winnow.errors import ModelMismatch, Overloaded, UnusableAdapter
from winnow.folder_errors import as_unusable

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class LoadedAdapter:
    """An adapter in a slot, of which some requests make use.

    used_s: when a request last began or ended to, in time.monotonic() seconds.
    """

    ref: AdapterRef
    slot: int
    owner: "AdapterSlots"
    num_users: int = 0
    used_s: float = field(default_factory=time.monotonic)

    @property
    def rows(self) -> AdapterRows:
        """For a forward pass all of whose tokens have this adapter."""
        return AdapterRows(self.slot)

    def end_use(self) -> None:
        """Call it once for each `AdapterSlots.use`; another adapter may get the slot then."""
        self.owner.end_use(self)


class AdapterSlots:
    """Every method may be called from any thread; reading an adapter blocks only other reads.

    sizes: of the model's linear layers.
    fill_others: has other ranks do the same `fill`; raises UnusableAdapter if one cannot.
    """

    fill_others: Callable[[int, AdapterDescription], object] = staticmethod(lambda *_: None)

    def __init__(
        self, stacks: Sequence[AdapterStack], sizes: LinearSizes, room: AdapterRoom
    ) -> None:
        self.room = room
        self._stacks = stacks
        self._sizes = sizes
        self._free = list(range(room.max_adapters, 0, -1))
        self._loaded: dict[str, LoadedAdapter] = {}  # by digest
        self._lock = threading.Lock()
        self._reading = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory set aside."""
        return sum(stack.nbytes for stack in self._stacks)

    @property
    def loaded(self) -> tuple[AdapterRef, ...]:
        with self._lock:
            return tuple(one.ref for one in self._loaded.values())

    def preload(self, folders: Mapping[str, str | Path]) -> dict[str, LoadedAdapter]:
        """Read adapters and keep them in use, by name.  Raises UnusableAdapter."""
        found = {name: self.describe(name, folder) for name, folder in folders.items()}
        return {name: self._read(description) for name, description in found.items()}

    def read(self, folders: Mapping[str, str | Path]) -> None:
        """Read adapters before any request needs them.  Raises UnusableAdapter."""
        for adapter in self.preload(folders).values():
            adapter.end_use()

    def describe(self, name: str, folder: str | Path) -> AdapterDescription:
        """Raises UnusableAdapter for one that does not fit the model or the room."""
        return describe_adapter(name, folder, self._sizes, self.room.max_rank)

    def use(self, ref: AdapterRef) -> LoadedAdapter:
        """The adapter in its slot, which stays its own until `end_use`; read if it is not here.

        Raises ModelMismatch if it cannot be read here or is another one, and Overloaded if all
        slots are in use.
        """
        used = self._taken(ref.digest)
        return used or self._read_as(ref)

    def end_use(self, adapter: LoadedAdapter) -> None:
        """See LoadedAdapter."""
        with self._lock:
            adapter.num_users -= 1
            adapter.used_s = time.monotonic()

    def _taken(self, digest: str) -> LoadedAdapter | None:
        with self._lock:
            found = self._loaded.get(digest)
            if found is not None:
                found.num_users += 1
                found.used_s = time.monotonic()
            return found

    def _read_as(self, ref: AdapterRef) -> LoadedAdapter:
        try:
            description = self.describe(ref.name, ref.folder)
            if description.digest != ref.digest:
                raise UnusableAdapter(
                    f"adapter {ref.name} in {ref.folder} has digest {description.digest} here; "
                    f"the request's has {ref.digest}"
                )
            return self._read(description)
        except UnusableAdapter as error:
            raise ModelMismatch(f"this worker lacks an adapter: {error.message}") from error

    def _read(self, description: AdapterDescription) -> LoadedAdapter:
        with self._reading:
            if (taken := self._taken(description.digest)) is not None:
                return taken
            slot = self._take_slot(description.name)
            try:
                self.fill(slot, description)
                self.fill_others(slot, description)
            except BaseException:
                with self._lock:
                    self._free.append(slot)
                raise
            with self._lock:
                adapter = LoadedAdapter(description.ref, slot, self, num_users=1)
                self._loaded[description.digest] = adapter
        logger.info(
            "adapter %s (rank %d, %d linear layers) is in slot %d of %d",
            description.name,
            description.rank,
            len(description.modules),
            slot,
            self.room.max_adapters,
        )
        return adapter

    def _take_slot(self, name: str) -> int:
        with self._lock:
            if self._free:
                return self._free.pop()
            idle = [one for one in self._loaded.values() if not one.num_users]
            if not idle:
                raise Overloaded(
                    f"no slot is free for adapter {name}: all {self.room.max_adapters} "
                    "(max_adapters) are in use"
                )
            oldest = min(idle, key=lambda one: one.used_s)
            del self._loaded[oldest.ref.digest]
            logger.info("adapter %s gives way to %s", oldest.ref.name, name)
            return oldest.slot

    def fill(self, slot: int, description: AdapterDescription) -> None:
        """Raises UnusableAdapter, also if the files are not the described ones any more."""
        name, folder = description.name, description.folder
        with as_unusable(f"adapter {name} in {folder} cannot be read", UnusableAdapter):
            with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
                for stack in self._stacks:
                    stack.fill(slot, dict(_pairs(file.get_tensor, description, stack)))
            if digest_of(folder) != description.digest:
                raise UnusableAdapter(f"adapter {name}: {folder} was changed while it was read")


def _pairs(
    read: Callable[[str], Tensor], description: AdapterDescription, stack: AdapterStack
) -> Iterator[tuple[str, Pair]]:
    for name in stack.names:
        module = description.modules.get(name)
        if module is None:
            continue
        pair = pair_of(read(module.down), read(module.up), module.scale, stack.dtype)
        if not all(bool(one.isfinite().all()) for one in pair):
            raise UnusableAdapter(
                f"adapter {description.name} has NaN or inf in {name}, as {stack.dtype}"
            )
        yield name, pair
