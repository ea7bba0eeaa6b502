"""The prefix store: keys, values and hidden states of prompts' beginnings, for later prompts."""

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from torch import Tensor

from winnow.checks import require_choice
from winnow.decoder import DecoderModel
from winnow.engine.prefix.hashes import BLOCK_TOKENS, block_hashes, prefix_salt
from winnow.engine.prefix.storage import Storage, StorageFull, Stored
from winnow.errors import InvalidSetting

logger = logging.getLogger(__name__)

LOCATIONS = ("device", "host")
# Memory is taken in pieces, and blocks of other depths leave gaps in them.
_SPARE_BYTES = 64 << 20


@dataclass(slots=True, eq=False)
class Block:
    """Consecutive tokens of prompts that begin alike, B of them, as far as they were computed.

    layers: of each layer computed, keys and values [2, num_kv_heads, B, head_dim] of all tokens.
    frontier: their hidden states [B, hidden_size] after the last of these layers.
    num_users: runs that hold it.  dropped: it is found no more; its users still have it.

    The depth, len(layers), never grows from a parent to its child.
    """

    hash: bytes
    parent: "Block | None"
    children: "set[Block]" = field(default_factory=set)
    layers: list[Stored] = field(default_factory=list)
    frontier: Stored | None = None
    num_users: int = 0
    dropped: bool = False

    @property
    def depth(self) -> int:
        return len(self.layers)


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """num_blocks, num_blocks_in_use, used_bytes: now.  The others: since the start.

    looked_up_tokens: of all prompts.  hit_tokens: those of them that layer 0 did not compute.
    evicted_blocks: for lack of memory.  damaged_blocks: that failed their checksum.
    """

    num_blocks: int
    num_blocks_in_use: int
    used_bytes: int
    max_bytes: int
    looked_up_tokens: int
    hit_tokens: int
    evicted_blocks: int
    damaged_blocks: int


class PrefixStore:
    """Blocks within `max_bytes`; the least recently used are evicted, children before parents.

    location: `device` keeps the blocks beside the model, `host` in host memory, pinned for a GPU.
    block_tokens: a multiple of 8.

    One thread, the one that runs the model, uses it; `stats`, `held`, `num_held` and `abandon` are
    for all.
    Raises InvalidSetting for less memory than one layer of a block takes.
    """

    def __init__(
        self,
        model: DecoderModel,
        max_bytes: int,
        *,
        location: str = "device",
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        require_choice("prefix_cache_device", location, LOCATIONS)
        assert block_tokens % 8 == 0, "checksums are of 64-bit words"
        shape = model.shape
        self.block_tokens = block_tokens
        self.storage = Storage(
            model.device,
            in_host_memory=location == "host",
            max_bytes=max_bytes + _SPARE_BYTES,
        )
        self._fingerprint = model.fingerprint
        self._layer_bytes = shape.kv_bytes(block_tokens * shape.num_kv_heads)
        self._frontier_bytes = block_tokens * shape.hidden_size * shape.dtype.itemsize
        least = self._layer_bytes + self._frontier_bytes
        if max_bytes < least:
            raise InvalidSetting(
                f"prefix_cache_bytes is {max_bytes:,}; one layer of {block_tokens} tokens takes "
                f"{least:,}",
                param="prefix_cache_bytes",
            )
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._blocks: dict[bytes, Block] = {}
        # Blocks without users, the least recently used first. A run lets go of a child before its
        # parent, so the first block never has children.
        self._idle: OrderedDict[bytes, Block] = OrderedDict()
        self._abandoned: deque[Callable[[], None]] = deque()
        self._looked_up_tokens = self._hit_tokens = 0
        self._evicted_blocks = self._damaged_blocks = 0

    @classmethod
    def within(
        cls, model: DecoderModel, prefix_cache_bytes: int, prefix_cache_device: str
    ) -> "PrefixStore | None":
        """The store of these settings; None for 0 bytes."""
        require_choice("prefix_cache_device", prefix_cache_device, LOCATIONS)
        if prefix_cache_bytes == 0:
            return None
        return cls(model, prefix_cache_bytes, location=prefix_cache_device)

    # For any thread

    def stats(self) -> PrefixStats:
        blocks = tuple(self._blocks.values())
        return PrefixStats(
            num_blocks=sum(block.depth > 0 for block in blocks),
            num_blocks_in_use=sum(block.num_users > 0 for block in blocks),
            used_bytes=self._used_bytes,
            max_bytes=self._max_bytes,
            looked_up_tokens=self._looked_up_tokens,
            hit_tokens=self._hit_tokens,
            evicted_blocks=self._evicted_blocks,
            damaged_blocks=self._damaged_blocks,
        )

    def held(self) -> dict[bytes, int]:
        """The depth of each block, by its hash (see `block_hashes`)."""
        blocks = tuple(self._blocks.values())  # a copy, since the owner may change the dictionary
        return {block.hash: depth for block in blocks if (depth := block.depth)}

    def num_held(self, token_ids: Sequence[int], cache_salt: str) -> int:
        """The number of a prompt's tokens, from the first on, that layer 0 need not compute now."""
        held = takewhile(self._holds, self.hashes(token_ids, cache_salt))
        return self.block_tokens * sum(1 for _ in held)

    def _holds(self, block_hash: bytes) -> bool:
        block = self._blocks.get(block_hash)
        return block is not None and block.depth > 0

    def hashes(self, token_ids: Sequence[int], cache_salt: str) -> list[bytes]:
        """The hashes of a prompt's whole blocks."""
        salt = prefix_salt(self._fingerprint, cache_salt)
        return block_hashes(token_ids, salt, self.block_tokens)

    def abandon(self, release: Callable[[], None]) -> None:
        """Call `release` on the owner's thread, at the latest when it opens the next prompt."""
        self._abandoned.append(release)

    # For the thread that runs the model

    def take(self, hashes: Sequence[bytes], parent: Block | None = None) -> list[Block]:
        """Hold a chain of blocks below `parent`; those that the store lacks have depth 0."""
        chain = []
        for block_hash in hashes:
            block = self._blocks.get(block_hash) or self._add(block_hash, parent)
            self._idle.pop(block_hash, None)
            block.num_users += 1
            chain.append(block)
            parent = block
        return chain

    def _add(self, block_hash: bytes, parent: Block | None) -> Block:
        block = self._blocks[block_hash] = Block(block_hash, parent)
        if parent is not None:
            parent.children.add(block)
        return block

    def release(self, chain: Sequence[Block]) -> None:
        """Let go of a chain that was taken."""
        for block in reversed(chain):
            block.num_users -= 1
            if block.num_users:
                continue
            if block.dropped:
                self._free(block)
            elif block.depth:
                self._idle[block.hash] = block
            else:
                self._remove(block)

    def release_abandoned(self) -> None:
        """Release what `abandon` was called with."""
        while self._abandoned:
            self._abandoned.popleft()()

    def count(self, looked_up_tokens: int, hit_tokens: int) -> None:
        """Count a prompt in the statistics."""
        self._looked_up_tokens += looked_up_tokens
        self._hit_tokens += hit_tokens

    def grow(self, block: Block, layer: Tensor, frontier: Tensor) -> bool:
        """Add the next layer to a held block, if there is or can be made room.

        layer: is copied.  frontier: a view, kept as it is until the block grows again or
        `settle` copies it, which must be called if it does not.
        """
        num_bytes = self._layer_bytes + (0 if block.depth else self._frontier_bytes)
        if block.dropped or not self._make_room(num_bytes):
            return False
        stored = self._put(layer)
        if stored is None:
            return False
        self._used_bytes += num_bytes
        block.frontier = Stored(frontier)
        block.layers.append(stored)
        return True

    def settle(self, block: Block) -> None:
        """Replace the view that `grow` was given by a copy in the store's own memory.

        Without memory for it the block is removed, as are those that follow it.
        """
        assert block.frontier is not None
        stored = self._put(block.frontier.tensor)
        if stored is not None:
            block.frontier = stored
        elif not block.dropped:
            self._remove_with_children(block)

    def _put(self, tensor: Tensor) -> Stored | None:
        """A copy of a tensor; None if all the memory for such tensors is held by runs."""
        while True:
            try:
                return self.storage.put(tensor)
            except StorageFull as full:
                if not self._idle:
                    logger.warning("the prefix store cannot keep a block: %s", full)
                    return None
            self._evict()

    def _make_room(self, num_bytes: int) -> bool:
        self.release_abandoned()
        while self._used_bytes + num_bytes > self._max_bytes and self._idle:
            self._evict()
        return self._used_bytes + num_bytes <= self._max_bytes

    def _evict(self) -> None:
        """Free the least recently used block; it has both keys and values, and hidden states."""
        _, block = self._idle.popitem(last=False)
        self._remove(block)
        self._free(block)
        self._evicted_blocks += 1

    def drop(self, block: Block) -> None:
        """Remove a damaged block and all that follow it; runs that hold them keep them."""
        if not block.dropped:
            self._damaged_blocks += 1
            self._remove_with_children(block)

    def _remove_with_children(self, block: Block) -> None:
        self._remove(block)
        doomed = [block]
        while doomed:
            block = doomed.pop()
            block.dropped = True
            self._blocks.pop(block.hash, None)
            if self._idle.pop(block.hash, None) is not None:
                self._free(block)
            doomed.extend(block.children)

    def _remove(self, block: Block) -> None:
        """Remove a block from its parent's children, and so that no prompt finds it."""
        del self._blocks[block.hash]
        if block.parent is not None:
            block.parent.children.discard(block)

    def _free(self, block: Block) -> None:
        if block.depth:
            self._used_bytes -= block.depth * self._layer_bytes + self._frontier_bytes
        block.layers.clear()
        block.frontier = None
