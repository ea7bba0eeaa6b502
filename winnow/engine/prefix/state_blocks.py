"""What one run has of the prefix store if the model has recurrent layers.

A token cannot go through a recurrent layer alone: it needs the state after the token before it. So
a prompt's beginning is reused up to the end of a block only that has the states of all recurrent
layers there, as a prompt's last whole blocks have. A block keeps of each layer one record:

- of a layer with keys and values these, and the tokens' hidden states after it: tokens may be
  selected there, and from there a run may go on with all tokens;
- of a recurrent layer the state after the block's last token, or nothing.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from winnow.engine.prefix.block import Block
from winnow.engine.prefix.prompt_blocks import PromptBlocks
from winnow.engine.prefix.storage import DamagedBlock
from winnow.engine.prefix.store import PrefixStore
from winnow.kv import ModelShape, stacked

_NUM_ENDS = 2  # whole blocks of a prompt whose ends have states
_WORD = 8  # bytes; checksums are of whole words


def can_reuse(shape: ModelShape) -> bool:
    """Whether beginnings are reused.

    Not where a layer has both, keys and a state, nor where several tokens do not go on from a
    state: transformers' Mamba-1 forgets it.
    """
    return shape.in_parts and not any(layer.has_kv and layer.is_recurrent for layer in shape.layers)


class StateBlocks(PromptBlocks):
    """As PromptBlocks; how far the prompt is cached is found once, when it is opened.

    min_computed: the number of last tokens that every layer computes.
    no_reason: `no_state` if blocks of the prompt are there, but no states to go on from.
    """

    def __init__(
        self,
        store: PrefixStore,
        token_ids: Sequence[int],
        cache_salt: str,
        variant: str | None,
        min_computed: int,
    ) -> None:
        super().__init__(store, token_ids, cache_salt, variant)
        self._shape = store.shape
        most = max(0, len(token_ids) - min_computed) // self.block_tokens
        usable = {count: self._depth_at(self._blocks[count - 1]) for count in range(1, most + 1)}
        self._num_used = max((count for count, depth in usable.items() if depth), default=0)
        self._depth = usable.get(self._num_used, 0)
        counts = range(max(1, most + 1 - _NUM_ENDS), most + 1)
        self._ends = [count * self.block_tokens for count in counts]
        is_there = most > 0 and self._blocks[0].depth > 0
        self.no_reason = "no_state" if is_there and not self._num_used else None

    def _depth_at(self, block: Block) -> int:
        """The layers that need not compute what ends with the block: up to one with keys."""
        layers, depth = self._shape.layers, 0
        for idx, record in enumerate(block.layers):
            if layers[idx].is_recurrent and not record.tensor.nbytes:
                break
            if layers[idx].is_full:
                depth = idx + 1
        return depth

    def num_cached(self, layer_idx: int) -> int:
        return self._num_used * self.block_tokens if layer_idx < self._depth else 0

    @property
    def computes_alone(self) -> bool:
        return False

    @property
    def ends(self) -> Sequence[int]:
        return self._ends

    def state(self, layer_idx: int) -> tuple[Tensor, ...]:
        if not self.num_cached(layer_idx):
            return ()
        at = self._num_used - 1
        (record,) = self._fetch(at, at + 1, layer_idx)
        tensors, start = [], 0
        for part in self._shape.states[layer_idx]:
            own = record[start : start + part.nbytes].clone()
            tensors.append(own.view(part.dtype).view(1, *part.shape))
            start += part.nbytes
        return tuple(tensors)

    def keys_and_values(self, layer_idx: int, num_cached: int, num_tokens: int) -> Tensor:
        both: Tensor | None = None
        count = num_cached // self.block_tokens
        for idx, record in enumerate(self._fetch(0, count, layer_idx)):
            part = self._keys_and_values_of(record, layer_idx)
            if both is None:
                both = part.new_empty((*part.shape[:2], num_tokens, part.shape[3]))
            start = idx * self.block_tokens
            both[:, :, start : start + self.block_tokens] = part
        assert both is not None
        return both

    def hidden(self, layer_idx: int, start: int, end: int) -> Tensor:
        """Hidden states [end - start, hidden_size] of tokens after a layer with keys."""
        records = self._fetch(start // self.block_tokens, end // self.block_tokens, layer_idx)
        return torch.cat([self._hidden_of(record) for record in records])

    def grow(
        self,
        layer_idx: int,
        offset: int,
        entries: tuple[Tensor, Tensor] | None,
        hidden: Tensor,
        states: Mapping[int, tuple[Tensor, ...]],
    ) -> None:
        for idx, block in enumerate(self._blocks):
            start = idx * self.block_tokens
            end = start + self.block_tokens
            if block.dropped or block.depth < layer_idx or end > offset + len(hidden):
                break
            own = states.get(end)
            record = _as_bytes(own) if own else hidden.new_empty(0, dtype=torch.uint8)
            if block.depth > layer_idx:
                if own and not block.layers[layer_idx].tensor.nbytes:
                    self._store.memory.replace(block, layer_idx, record)
                continue
            if start < offset:
                break
            if entries is not None:
                tokens = slice(start - offset, end - offset)
                keys, values = (part[:, tokens] for part in entries)
                kept = self._store.as_kept(stacked(keys, values))
                record = _as_bytes((kept, hidden[tokens]))
            if not self._store.grow_kept(block, record, hidden.new_empty(0)):
                break

    def _fetch(self, first: int, last: int, layer_idx: int) -> list[Tensor]:
        try:
            return self._store.memory.fetch_layer(self._blocks[first:last], layer_idx)
        except DamagedBlock as damage:
            raise DamagedBlock(first + damage.idx) from damage

    def _keys_and_values_of(self, record: Tensor, layer_idx: int) -> Tensor:
        num_hidden = self._num_hidden_bytes
        kept = record[:-num_hidden].view(self._store.kept_dtype)
        size = (2, self._shape.sizes[layer_idx].num_kv_heads, self.block_tokens, -1)
        return self._store.as_used(kept.view(size))

    def _hidden_of(self, record: Tensor) -> Tensor:
        hidden = record[-self._num_hidden_bytes :].view(self._shape.dtype)
        return hidden.view(self.block_tokens, -1)

    @property
    def _num_hidden_bytes(self) -> int:
        shape = self._shape
        return self.block_tokens * shape.hidden_size * shape.dtype.itemsize


def _as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors' bytes, one after another, in whole words."""
    parts = [one.contiguous().view(-1).view(torch.uint8) for one in tensors]
    missing = -sum(map(len, parts)) % _WORD
    return torch.cat([*parts, parts[0].new_zeros(missing)])
