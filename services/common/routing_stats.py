"""What a prefill worker tells the gateways' routers, by way of Ray Serve's controller."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

# Enough to tell blocks apart: two that are taken for one cost some time, and nothing else.
_HASH_BYTES = 8
# A report, sent every second, has 64 KiB at most.
_MAX_BLOCKS = 8192


def short_hash(block_hash: bytes) -> bytes:
    """The part of a block's hash that is reported."""
    return block_hash[:_HASH_BYTES]


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """A worker's prefix store and its work.

    fingerprint: the model's. block_tokens: tokens per block.
    blocks: short hashes of the blocks it holds; if there are very many, of every second, or third.
    work: tokens still to be computed, by request ID.
    """

    fingerprint: str
    block_tokens: int
    blocks: Collection[bytes]
    work: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain types only: the controller, which passes it on, does not import ours."""
        stride = max(1, -(-len(self.blocks) // _MAX_BLOCKS))
        return {
            "fingerprint": self.fingerprint,
            "block_tokens": self.block_tokens,
            "blocks": b"".join(list(self.blocks)[::stride]),
            "work": dict(self.work),
        }

    @classmethod
    def from_dict(cls, stats: Mapping[str, Any]) -> Self:
        """Raises KeyError for anything else than `to_dict` returns."""
        joined = stats["blocks"]
        starts = range(0, len(joined), _HASH_BYTES)
        blocks = frozenset(joined[start : start + _HASH_BYTES] for start in starts)
        return cls(stats["fingerprint"], stats["block_tokens"], blocks, stats["work"])
