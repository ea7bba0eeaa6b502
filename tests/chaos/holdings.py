"""What the processes hold besides KV: threads, sockets, records in the registry."""

from dataclasses import dataclass
from typing import Any

import psutil
import redis

# Pools of threads and connections grow while they are used and shrink later; what leaks grows with
# every case, and there are dozens of them on one process.
_SLACK = 16


@dataclass(frozen=True, slots=True)
class Holdings:
    num_threads: int
    num_sockets: int

    @classmethod
    def of(cls, process: psutil.Process) -> "Holdings":
        return cls(process.num_threads(), len(process.net_connections("all")))

    def is_within(self, before: "Holdings") -> bool:
        """Whether it is what it was before, but for pools."""
        return (
            self.num_threads <= before.num_threads + _SLACK
            and self.num_sockets <= before.num_sockets + _SLACK
        )


def registered_pids(redis_port: int) -> dict[str, list[int]]:
    """The processes that have records, by the records' kind."""
    found: dict[str, list[int]] = {"worker": [], "metrics": []}
    with redis.Redis(port=redis_port, socket_timeout=5) as client:
        keys: Any = client.keys("winnow:*")
    for key in keys:
        _, kind, worker_id = key.decode().split(":")
        found[kind].append(int(worker_id.rsplit("-", 2)[1]))
    return {kind: sorted(pids) for kind, pids in found.items()}
