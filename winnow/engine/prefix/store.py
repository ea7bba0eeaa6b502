"""The prefix store: keys, values and hidden states of prompts' beginnings, for later prompts."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from winnow.adapters.ref import variant_fingerprint
from winnow.checks import require_choice
from winnow.decoder import DecoderModel
from winnow.engine.prefix.block import Block, IdleBlocks
from winnow.engine.prefix.hashes import BLOCK_TOKENS, block_hashes, prefix_salt
from winnow.engine.prefix.memory import BlockMemory
from winnow.engine.prefix.tiers import LOCATIONS, make_tiers, require_free
from winnow.errors import InvalidSetting
from winnow.kv import KvDtype
from winnow.kv_quantization import pack, unpack


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """num_blocks, num_blocks_in_use, used_bytes: now.  The others: since the start.

    used_bytes, max_bytes: of all memory.  device_used_bytes, device_max_bytes: beside the model.
    looked_up_tokens: of all prompts.  hit_tokens: those of them that layer 0 did not compute.
    moved_blocks: to host memory, for lack of memory beside the model.
    evicted_blocks: for lack of memory.  damaged_blocks: that failed their checksum.
    """

    num_blocks: int
    num_blocks_in_use: int
    used_bytes: int
    max_bytes: int
    device_used_bytes: int
    device_max_bytes: int
    looked_up_tokens: int
    hit_tokens: int
    moved_blocks: int
    evicted_blocks: int
    damaged_blocks: int


class PrefixStore:
    """Blocks within `max_bytes`; the least recently used are evicted, children before parents.

    location: `device` keeps the blocks beside the model, `host` in host memory, pinned for a GPU.
    device_bytes: of `host`, memory beside the model, besides `max_bytes`. Blocks are there first,
    move to host memory when others need the place, and come back when they are used.
    block_tokens: a multiple of 8.
    kv_dtype: how keys and values are kept; hidden states keep the model's dtype.

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
        device_bytes: int = 0,
        block_tokens: int = BLOCK_TOKENS,
        kv_dtype: KvDtype = "auto",
    ) -> None:
        require_choice("prefix_cache_device", location, LOCATIONS)
        assert block_tokens % 8 == 0, "checksums are of 64-bit words"
        shape = model.shape
        self.block_tokens = block_tokens
        self._fingerprint = model.fingerprint
        self._dtype, self._is_int8 = shape.dtype, kv_dtype == "int8"
        self.shape = shape
        self._layer_bytes = shape.kv_bytes(block_tokens * shape.num_kv_heads, kv_dtype)  # at most
        self._hidden_bytes = block_tokens * shape.hidden_size * shape.dtype.itemsize
        self._require_least(max_bytes, "prefix_cache_bytes")
        if device_bytes:
            self._require_least(device_bytes, "prefix_cache_device_bytes")
        tiers = make_tiers(model.device, location, max_bytes, device_bytes)
        self._idle = IdleBlocks(tiers)
        frontier_bytes = 0 if shape.has_states else self._hidden_bytes
        self.memory = BlockMemory(tiers, frontier_bytes, self._idle, self._evict)
        self._blocks: dict[bytes, Block] = {}
        self._abandoned: deque[Callable[[], None]] = deque()
        self._looked_up_tokens = self._hit_tokens = 0
        self._evicted_blocks = self._damaged_blocks = 0

    @classmethod
    def within(
        cls,
        model: DecoderModel,
        prefix_cache_bytes: int,
        prefix_cache_device: str,
        kv_dtype: KvDtype = "auto",
        *,
        prefix_cache_device_bytes: int = 0,
    ) -> "PrefixStore | None":
        """The store of these settings; None for 0 bytes.

        On a CPU all memory is the host's, and prefix_cache_device_bytes is not used.
        Raises InvalidSetting for more memory than the device has free.
        """
        require_choice("prefix_cache_device", prefix_cache_device, LOCATIONS)
        if prefix_cache_bytes == 0:
            return None
        device_bytes = 0
        if prefix_cache_device == "device":
            require_free(model.device, prefix_cache_bytes, "prefix_cache_bytes")
        elif model.device.type != "cpu":
            device_bytes = prefix_cache_device_bytes
            require_free(model.device, device_bytes, "prefix_cache_device_bytes")
        return cls(
            model,
            prefix_cache_bytes,
            location=prefix_cache_device,
            device_bytes=device_bytes,
            kv_dtype=kv_dtype,
        )

    def _require_least(self, num_bytes: int, setting: str) -> None:
        least = self._layer_bytes + self._hidden_bytes
        if num_bytes < least:
            raise InvalidSetting(
                f"{setting} is {num_bytes:,}; one layer of {self.block_tokens} tokens takes "
                f"{least:,}",
                param=setting,
            )

    # For any thread

    def stats(self) -> PrefixStats:
        blocks, tiers = tuple(self._blocks.values()), self.memory.tiers
        return PrefixStats(
            num_blocks=sum(block.depth > 0 for block in blocks),
            num_blocks_in_use=sum(block.num_users > 0 for block in blocks),
            used_bytes=sum(tier.used_bytes for tier in tiers),
            max_bytes=sum(tier.limit_bytes for tier in tiers),
            device_used_bytes=sum(tier.used_bytes for tier in tiers if tier.beside_model),
            device_max_bytes=sum(tier.limit_bytes for tier in tiers if tier.beside_model),
            looked_up_tokens=self._looked_up_tokens,
            hit_tokens=self._hit_tokens,
            moved_blocks=self.memory.moved_blocks,
            evicted_blocks=self._evicted_blocks,
            damaged_blocks=self._damaged_blocks,
        )

    def held(self) -> dict[bytes, int]:
        """The depth of each block, by its hash (see `block_hashes`)."""
        blocks = tuple(self._blocks.values())  # a copy, since the owner may change the dictionary
        return {block.hash: depth for block in blocks if (depth := block.depth)}

    def num_held(
        self, token_ids: Sequence[int], cache_salt: str, variant: str | None = None
    ) -> int:
        """The number of a prompt's tokens, from the first on, that layer 0 need not compute now."""
        held = takewhile(self._holds, self.hashes(token_ids, cache_salt, variant))
        return self.block_tokens * sum(1 for _ in held)

    def _holds(self, block_hash: bytes) -> bool:
        block = self._blocks.get(block_hash)
        return block is not None and block.depth > 0

    def hashes(
        self, token_ids: Sequence[int], cache_salt: str, variant: str | None = None
    ) -> list[bytes]:
        """The hashes of a prompt's whole blocks.

        variant: from `kv_variant`.
        """
        salt = prefix_salt(variant_fingerprint(self._fingerprint, variant), cache_salt)
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
            self._idle.remove(block)
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
                self.memory.free(block)
            elif block.depth:
                self._idle.add(block)
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
        return self.grow_kept(block, self.as_kept(layer), frontier)

    def grow_kept(self, block: Block, layer: Tensor, frontier: Tensor) -> bool:
        """As `grow`, with the layer as it is kept."""
        self.release_abandoned()
        if block.dropped:
            return False
        return self.memory.grow(block, layer, frontier)

    def fetch_layer(self, blocks: Sequence[Block], layer_idx: int) -> list[Tensor]:
        """Keys and values [2, num_kv_heads, B, D] of each block.  Raises DamagedBlock."""
        return [self.as_used(part) for part in self.memory.fetch_layer(blocks, layer_idx)]

    @property
    def kept_dtype(self) -> torch.dtype:
        return torch.int8 if self._is_int8 else self._dtype

    def as_kept(self, layer: Tensor) -> Tensor:
        """Keys and values [..., head_dim], packed if they are kept as int8."""
        return pack(layer) if self._is_int8 else layer

    def as_used(self, kept: Tensor) -> Tensor:
        """Keys and values [..., head_dim] that `as_kept` gave `kept` of."""
        return unpack(kept, self._dtype) if self._is_int8 else kept

    def settle(self, block: Block) -> None:
        """Replace the view that `grow` was given by a copy in the store's own memory.

        Without memory for it the block is removed, as are those that follow it.
        """
        if not self.memory.settle(block) and not block.dropped:
            self._remove_with_children(block)

    def _evict(self) -> None:
        """Free the least recently used block; it has both keys and values, and hidden states."""
        block = self._idle.oldest()
        self._idle.remove(block)
        self._remove(block)
        self.memory.free(block)
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
            if self._idle.remove(block):
                self.memory.free(block)
            doomed.extend(block.children)

    def _remove(self, block: Block) -> None:
        """Remove a block from its parent's children, and so that no prompt finds it."""
        del self._blocks[block.hash]
        if block.parent is not None:
            block.parent.children.discard(block)
