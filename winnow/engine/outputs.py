"""What a decode engine reports: the output of each step, and stats."""

from dataclasses import dataclass

from winnow.errors import WinnowError
from winnow.tokens import Token


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One request's output of one step; the last one has `finished` or an `error`.

    tokens: new tokens; replayed ones are left out.
    recompressed_entries: KV entries dropped so far, over layers, heads and sequences.
    """

    request_id: str
    tokens: tuple[Token, ...]
    recompressed_entries: int
    finished: bool
    error: WinnowError | None = None


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Page counts of a pool, and the bytes of its used pages.

    pages_used: pages that hold entries or queries.  pages_reserved: the most that all admitted
    requests may hold, used ones included.  pages_free: pages that can be reserved now.
    """

    pages_total: int
    pages_used: int
    pages_reserved: int
    pages_free: int
    page_size: int
    kv_bytes_used: int

    @property
    def used_ratio(self) -> float:
        """Share of pages that are used, 0 to 1."""
        return self.pages_used / self.pages_total


@dataclass(frozen=True, slots=True)
class EngineStats:
    """reserved_requests: admitted requests whose KV is not complete yet.

    swapped_sequences, swapped_bytes: sequences in host memory, and their size.
    kv_unpruned_bytes: size of the running sequences' KV if nothing had been pruned.
    """

    pool: PoolStats
    running_sequences: int
    reserved_requests: int
    swapped_sequences: int
    swapped_bytes: int
    kv_unpruned_bytes: int
