"""What one run has of the prefix store: the blocks of its prompt."""

from collections.abc import Mapping, Sequence
from itertools import takewhile

import torch
from torch import Tensor

from winnow.engine.prefix.block import Block
from winnow.engine.prefix.storage import DamagedBlock, Stored
from winnow.engine.prefix.store import PrefixStore
from winnow.kv import stacked


class PromptBlocks:
    """Holds the blocks of a prompt: no other run evicts them, and all see how far each has come.

    cache_salt, variant: see PrefixStore.hashes.
    Each method that reads raises DamagedBlock with the index of the block.
    """

    def __init__(
        self,
        store: PrefixStore,
        token_ids: Sequence[int],
        cache_salt: str,
        variant: str | None = None,
    ) -> None:
        store.release_abandoned()
        self._store = store
        self._hashes = store.hashes(token_ids, cache_salt, variant)
        self._blocks = store.take(self._hashes)
        self._lent: dict[Block, Stored] = {}  # frontiers that are views of the run's hidden states

    @property
    def block_tokens(self) -> int:
        return self._store.block_tokens

    def num_cached(self, layer_idx: int) -> int:
        """The number of tokens, from the first on, whose keys of a layer are here now."""
        deep = takewhile(lambda block: block.depth > layer_idx, self._blocks)
        return self.block_tokens * sum(1 for _ in deep)

    def count(self, looked_up_tokens: int, hit_tokens: int) -> None:
        self._store.count(looked_up_tokens, hit_tokens)

    def keys_and_values(self, layer_idx: int, num_cached: int, num_tokens: int) -> Tensor:
        """[2, num_kv_heads, num_tokens, D] with the first `num_cached` tokens filled in.

        D: the numbers of the layer's keys or values, whichever are more.
        """
        blocks = self._blocks[: -(-num_cached // self.block_tokens)]
        parts = self._store.fetch_layer(blocks, layer_idx)
        _, num_kv_heads, _, head_dim = parts[0].shape
        both = parts[0].new_empty((2, num_kv_heads, num_tokens, head_dim))
        for part, start in zip(parts, range(0, num_cached, self.block_tokens), strict=True):
            end = min(start + self.block_tokens, num_cached)
            both[:, :, start:end] = part[:, :, : end - start]
        return both

    def hidden(self, layer_idx: int, start: int, end: int) -> Tensor:
        """Hidden states [end - start, hidden_size] of tokens after a layer, their blocks' last."""
        first, last = start // self.block_tokens, -(-end // self.block_tokens)
        blocks = self._blocks[first:last]
        assert {block.depth for block in blocks} == {layer_idx + 1}
        try:
            parts = self._store.memory.fetch(
                [block.frontier for block in blocks if block.frontier is not None]
            )
        except DamagedBlock as damage:
            raise DamagedBlock(first + damage.idx) from damage
        offset = first * self.block_tokens
        return torch.cat(parts)[start - offset : end - offset]

    @property
    def computes_alone(self) -> bool:
        """Whether some cached tokens can be computed without those before them."""
        return True

    @property
    def ends(self) -> Sequence[int]:
        """Numbers of tokens after which a recurrent layer's state is wanted, ascending."""
        return ()

    def state(self, layer_idx: int) -> tuple[Tensor, ...]:
        """The state of a recurrent layer after its cached tokens: [1, *shape] of each part."""
        return ()

    def grow(
        self,
        layer_idx: int,
        offset: int,
        entries: tuple[Tensor, Tensor] | None,
        hidden: Tensor,
        states: Mapping[int, tuple[Tensor, ...]],
    ) -> None:
        """Give the store what a layer computed, for each block that has this layer to come.

        entries: keys and values [num_kv_heads, T, numbers] of T tokens from the `offset`-th on;
        None for a layer without.  hidden: [T, hidden_size], of the same tokens after the layer.
        states: as `state`, after each of `ends` that the layer has passed.
        """
        assert entries is not None
        keys, values = entries
        num_tokens = offset + len(hidden)
        growing = True
        for block, start in zip(
            self._blocks, range(0, num_tokens, self.block_tokens), strict=False
        ):
            end = start + self.block_tokens
            if block.depth > layer_idx:
                self._lent.pop(block, None)  # another run has given it a later one
                continue
            growing = growing and block.depth == layer_idx and start >= offset and end <= num_tokens
            if growing:
                tokens = slice(start - offset, end - offset)
                layer = stacked(keys[:, tokens], values[:, tokens])
                growing = self._store.grow(block, layer, hidden[tokens])
            if growing:
                assert block.frontier is not None
                self._lent[block] = block.frontier
            else:
                self._settle(block)

    def _settle(self, block: Block) -> None:
        """Copy a block's frontier, if it is still the one lent."""
        lent = self._lent.pop(block, None)
        if lent is not None and block.frontier is lent:
            self._store.settle(block)

    def replace(self, block_idx: int) -> int:
        """Drop a damaged block; hold new ones in place of all that are dropped by now.

        Returns the index of the first replaced, which may be before `block_idx`.
        """
        self._store.drop(self._blocks[block_idx])
        first = next(idx for idx, block in enumerate(self._blocks) if block.dropped)
        self._release(first)
        parent = self._blocks[-1] if self._blocks else None
        self._blocks += self._store.take(self._hashes[first:], parent)
        return first

    def close(self) -> None:
        """Let go of all blocks."""
        self._release(0)

    def _release(self, first: int) -> None:
        released = self._blocks[first:]
        del self._blocks[first:]
        try:
            for block in released:
                self._settle(block)
        finally:
            self._store.release(released)
