"""Records of live processes (decode workers, metrics endpoints) and adapters, each under a lease.

A process puts its records again before the lease ends; a record whose lease has expired is gone.
With `redis_url` set the records live in Redis, otherwise in a small Ray actor.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

# Features of this release's decode workers that older workers would ignore.
MIN_TOKENS = "min_tokens"
FEATURES = (MIN_TOKENS,)
GRAMMAR = "grammar"  # of those that have the model's tokenizer
ADAPTERS = "adapters"  # of those that have room for some


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A decode worker's description of itself.

    address, kv_address: host:port of Decode and of KvTransfer. model_name is informational; models
    are compared by fingerprint. running: sequences in the batch plus requests waiting for KV.
    features: from FEATURES, GRAMMAR, ADAPTERS, or unknown ones of newer releases.
    sampler_version: 1 of those that do not tell it.
    """

    worker_id: str
    address: str
    kv_address: str
    fingerprint: str
    model_name: str
    wire_versions: tuple[int, ...]
    pages_total: int
    pages_free: int
    running: int
    draining: bool = False
    features: tuple[str, ...] = ()
    sampler_version: int = 1

    KIND: ClassVar = "worker"


@dataclass(frozen=True, slots=True)
class MetricsTarget:
    """Where a process of any role serves /metrics.  address: host:port."""

    worker_id: str
    address: str
    role: str
    model_name: str

    KIND: ClassVar = "metrics"


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """An adapter that was loaded, or dropped, while the service runs.

    worker_id: the adapter's name.  version: Unix time in nanoseconds; of a name the newest counts.
    Registries have each version apart: whoever renews an older one takes nothing from a newer one.
    """

    worker_id: str
    digest: str
    folder: str
    version: int
    is_dropped: bool = False

    KIND: ClassVar = "adapter"


Record = WorkerRecord | MetricsTarget | AdapterRecord
KINDS = (WorkerRecord.KIND, MetricsTarget.KIND)  # of a process
RecordT = TypeVar("RecordT", WorkerRecord, MetricsTarget, AdapterRecord)


def key_of(record: Record) -> str:
    """Under which a registry has one record of a kind at a time."""
    if isinstance(record, AdapterRecord):
        return f"{record.worker_id}:{record.version}"
    return record.worker_id


def newest(records: Iterable[AdapterRecord]) -> list[AdapterRecord]:
    """Of each name the newest version, sorted by name."""
    by_name = {one.worker_id: one for one in sorted(records, key=lambda one: one.version)}
    return [by_name[name] for name in sorted(by_name)]


def record_to_json(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record))


def record_from_json(cls: type[RecordT], text: str | bytes) -> RecordT:
    """Parse the output of `record_to_json`, also of a newer version with more fields.

    Raises ValueError for anything else.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    try:
        values = {k: _frozen(v) for k, v in json.loads(text).items() if k in known}
        return cls(**values)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a {cls.KIND} record: {error!r}") from error


def _frozen(value: Any) -> Any:  # noqa: ANN401 - what JSON can hold
    return tuple(value) if isinstance(value, list) else value


class Registry(Protocol):
    """Every method raises RegistryUnavailable if the registry does not answer."""

    async def put(self, record: Record, lease_s: float) -> None:
        """Store or renew a record for the next `lease_s` seconds."""

    async def remove(self, worker_id: str) -> None:
        """Remove all records of a process; no-op if there are none."""

    async def workers(self) -> list[WorkerRecord]:
        """Decode workers whose lease has not expired, sorted by worker_id."""

    async def targets(self) -> list[MetricsTarget]:
        """Metrics endpoints whose lease has not expired, sorted by worker_id."""

    async def adapters(self) -> list[AdapterRecord]:
        """Adapters whose lease has not expired: of each name the newest version, sorted by name."""

    async def close(self) -> None:
        """Close the connection; the records stay."""


class LeasedRecords:
    """Records in this process's memory, removed when their lease expires."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._leases: dict[tuple[str, str], tuple[float, Record]] = {}

    def put(self, record: Record, lease_s: float) -> None:
        self._leases[record.KIND, key_of(record)] = (self._clock_s() + lease_s, record)

    def remove(self, worker_id: str) -> None:
        for kind in KINDS:
            self._leases.pop((kind, worker_id), None)

    def live(self, cls: type[RecordT]) -> list[RecordT]:
        """Live records of one class, sorted by worker_id."""
        now = self._clock_s()
        self._leases = {k: lease for k, lease in self._leases.items() if lease[0] > now}
        records = [self._leases[key][1] for key in sorted(self._leases)]
        return [record for record in records if isinstance(record, cls)]
