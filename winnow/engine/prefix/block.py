"""A cached block, and the blocks that nobody uses."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from winnow.engine.prefix.storage import Stored
from winnow.engine.prefix.tiers import Tier, tier_of


@dataclass(slots=True, eq=False)
class Block:
    """Consecutive tokens of prompts that begin alike, B of them, as far as they were computed.

    layers: of each layer computed, keys and values of all tokens, [2, num_kv_heads, B, D] of its
    own sizes (see `winnow.kv.stacked`), or packed as int8.
    frontier: their hidden states [B, hidden_size] after the last of these layers.
    frontier_tier: where these have their place, if there is a layer.
    num_users: runs that hold it.  dropped: it is found no more; its users still have it.

    The depth, len(layers), never grows from a parent to its child.
    """

    hash: bytes
    parent: "Block | None"
    children: "set[Block]" = field(default_factory=set)
    layers: list[Stored] = field(default_factory=list)
    frontier: Stored | None = None
    frontier_tier: Tier | None = None
    num_users: int = 0
    dropped: bool = False

    @property
    def depth(self) -> int:
        return len(self.layers)


class IdleBlocks:
    """Blocks without users, the least recently used first, and which of them are in which tier.

    A run lets go of a child before its parent, so the oldest block never has children.
    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self._blocks: OrderedDict[Block, None] = OrderedDict()
        self._by_tier: dict[Tier, OrderedDict[Block, None]] = {
            tier: OrderedDict() for tier in tiers
        }

    def __contains__(self, block: Block) -> bool:
        return block in self._blocks

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    def add(self, block: Block) -> None:
        self._blocks[block] = None
        self.note_tiers(block)

    def note_tiers(self, block: Block) -> None:
        """Note where an idle block is now."""
        tiers = {block.frontier_tier, *map(tier_of, block.layers)}
        for tier, blocks in self._by_tier.items():
            if tier in tiers:
                blocks.setdefault(block)
            else:
                blocks.pop(block, None)

    def remove(self, block: Block) -> bool:
        """Whether it was idle."""
        for blocks in self._by_tier.values():
            blocks.pop(block, None)
        return self._blocks.pop(block, block) is None

    def oldest(self) -> Block:
        return next(iter(self._blocks))

    def oldest_in(self, tier: Tier) -> Block | None:
        return next(iter(self._by_tier[tier]), None)
