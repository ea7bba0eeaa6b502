"""What a decode engine tells: of each step, and of itself."""

from dataclasses import dataclass

from winnow.errors import WinnowError
from winnow.tokens import Token


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step did for one request; after `finished` or an `error` nothing more follows.

    tokens: new ones; none of a sequence that replays.
    recompressed_entries: dropped so far, over layers, heads and sequences.
    """

    request_id: str
    tokens: tuple[Token, ...]
    recompressed_entries: int
    finished: bool
    error: WinnowError | None = None


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Pages in all, used, and promised (the used ones included); bytes of used pages.

    pages_used: that hold entries or queries.  pages_free: that a request could be promised now.
    """

    pages_total: int
    pages_used: int
    pages_reserved: int
    pages_free: int
    page_size: int
    kv_bytes_used: int

    @property
    def used_ratio(self) -> float:
        """Pages holding entries, of all."""
        return self.pages_used / self.pages_total


@dataclass(frozen=True, slots=True)
class EngineStats:
    """reserved_requests: admitted, KV not complete yet.

    swapped_sequences, swapped_bytes: what waits in host memory for pages.
    kv_unpruned_bytes: what the running sequences would hold had nothing been pruned.
    """

    pool: PoolStats
    running_sequences: int
    reserved_requests: int
    swapped_sequences: int
    swapped_bytes: int
    kv_unpruned_bytes: int
