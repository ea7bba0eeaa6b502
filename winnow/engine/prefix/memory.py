"""The memory of a prefix store: what of its blocks is in which tier, and what makes room there."""

import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from winnow.engine.prefix.block import Block, IdleBlocks
from winnow.engine.prefix.storage import StorageFull, Stored
from winnow.engine.prefix.tiers import Tier, tier_of

logger = logging.getLogger(__name__)


class BlockMemory:
    """Puts blocks into the first tier that has room. For room there idle ones move to the next.

    frontier_bytes: of one block.
    idle: blocks that may be moved, or evicted.  evict: frees the oldest of them.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        frontier_bytes: int,
        idle: IdleBlocks,
        evict: Callable[[], None],
    ) -> None:
        self.tiers = tiers
        self._frontier_bytes = frontier_bytes
        self._idle = idle
        self._evict = evict
        self.moved_blocks = 0

    def fetch(self, stored: Sequence[Stored]) -> list[Tensor]:
        """The tensors on the device, as Storage.fetch gives them."""
        return self.tiers[-1].fetch(stored)

    def fetch_layer(self, blocks: Sequence[Block], layer_idx: int) -> list[Tensor]:
        """`fetch` of a layer of held blocks, which then is in the first tier as far as it fits."""
        parts = self.fetch([block.layers[layer_idx] for block in blocks])
        for idx, block in enumerate(blocks):
            if tier_of(block.layers[layer_idx]) is self.tiers[0]:
                continue
            if not self._bring_back(block, layer_idx, parts[idx]):
                break
            parts[idx] = block.layers[layer_idx].tensor  # the other memory may be used again
        return parts

    def grow(self, block: Block, layer: Tensor, frontier: Tensor) -> bool:
        """Add a layer to a held block; False without room for it."""
        num_bytes = layer.nbytes + (0 if block.depth else self._frontier_bytes)
        for tier in self.tiers:
            if not self._make_room(tier, num_bytes):
                continue
            stored = self._put(tier, layer)
            if stored is not None:
                tier.used_bytes += num_bytes
                block.frontier_tier = block.frontier_tier or tier
                block.frontier = Stored(frontier)
                block.layers.append(stored)
                return True
        return False

    def replace(self, block: Block, layer_idx: int, layer: Tensor) -> bool:
        """Have another layer in the place of one; False without room for it."""
        tier = tier_of(block.layers[layer_idx])
        if not self._make_room(tier, layer.nbytes):
            return False
        stored = self._put(tier, layer)
        if stored is not None:
            tier.used_bytes += layer.nbytes - block.layers[layer_idx].tensor.nbytes
            block.layers[layer_idx] = stored
        return stored is not None

    def settle(self, block: Block) -> bool:
        """Replace a lent frontier by a copy; False without memory for it."""
        assert block.frontier is not None and block.frontier_tier is not None
        stored = self._put(block.frontier_tier, block.frontier.tensor)
        if stored is not None:
            block.frontier = stored
        return stored is not None

    def free(self, block: Block) -> None:
        """Forget what the block has."""
        for stored in block.layers:
            tier_of(stored).used_bytes -= stored.tensor.nbytes
        if block.frontier_tier is not None:
            block.frontier_tier.used_bytes -= self._frontier_bytes
        block.layers.clear()
        block.frontier = block.frontier_tier = None

    def _bring_back(self, block: Block, layer_idx: int, tensor: Tensor) -> bool:
        """Have a layer, fetched as `tensor`, in the first tier; False without room."""
        first, tier = self.tiers[0], tier_of(block.layers[layer_idx])
        stored = self._put(first, tensor) if self._make_room(first, tensor.nbytes) else None
        if stored is not None:
            block.layers[layer_idx] = stored
            _charge(tier, first, tensor.nbytes)
        return stored is not None

    def _put(self, tier: Tier, tensor: Tensor) -> Stored | None:
        """A copy of a tensor; None if all the memory for such tensors is held by runs."""
        while True:
            try:
                return tier.put(tensor)
            except StorageFull as full:
                if self._free_some(tier):
                    continue
                if tier is self.tiers[-1]:
                    logger.warning("the prefix store cannot keep a block: %s", full)
                return None

    def _make_room(self, tier: Tier, num_bytes: int) -> bool:
        while not tier.has_room(num_bytes):
            if not self._free_some(tier):
                return False
        return True

    def _free_some(self, tier: Tier) -> bool:
        """Move the tier's oldest idle block to the next one; False if there is none.

        If it cannot move, the oldest of all is evicted.
        """
        block = self._idle.oldest_in(tier)
        if block is None:
            return False
        slower = self.tiers[self.tiers.index(tier) + 1 :]
        if not slower or not self._move(block, tier, slower[0]):
            self._evict()
        return True

    def _move(self, block: Block, tier: Tier, to: Tier) -> bool:
        """Free what an idle block has in a tier by moving it to another; False if that is full.

        Making room there may evict the block itself, after which nothing is left to move.
        """
        layers = [idx for idx, stored in enumerate(block.layers) if tier_of(stored) is tier]
        moves_frontier = block.frontier_tier is tier
        num_bytes = sum(block.layers[idx].tensor.nbytes for idx in layers)
        num_bytes += moves_frontier * self._frontier_bytes
        while not to.has_room(num_bytes):
            if not self._free_some(to):
                return False
            if block not in self._idle:
                return True
        try:
            for idx in layers:
                block.layers[idx] = to.put(block.layers[idx].tensor)
                _charge(tier, to, block.layers[idx].tensor.nbytes)
            if moves_frontier:
                assert block.frontier is not None
                block.frontier, block.frontier_tier = to.put(block.frontier.tensor), to
                _charge(tier, to, self._frontier_bytes)
        except StorageFull:
            return False
        finally:
            self._idle.note_tiers(block)
        self.moved_blocks += 1
        return True


def _charge(tier: Tier, to: Tier, num_bytes: int) -> None:
    tier.used_bytes -= num_bytes
    to.used_bytes += num_bytes
