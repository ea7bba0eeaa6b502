"""The tokens of one prompt between two layers: their hidden states and positions.

Tokens that the prefix store has are not computed. Where the hidden states of some are needed after
all, they are its frontier, or are computed for these tokens alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from winnow.attention import PrefillAttention, ScatteredAttention
from winnow.decoder import DecoderModel
from winnow.engine.prefix.prompt_blocks import PromptBlocks
from winnow.engine.prefix.storage import DamagedBlock
from winnow.layer_state import LayerState
from winnow.layers import Layer
from winnow.rotary import LONG, RotaryTables
from winnow.to_device import indices_to_device
from winnow.to_host import HostCopy

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Work:
    """What a run computed: tokens times layers, and tokens that were computed alone for a cut."""

    layer_tokens: int = 0
    recomputed_tokens: int = 0


class TokenStates:
    """The tokens at `positions` [N]. A layer computes the last of them, and has the others cached.

    token_ids: [N] int64, at positions 0 to N - 1.
    states: after `compute_layer`, the layer's state after the last token.
    blocks: the blocks of the prompt, which may be longer; None: every layer computes all tokens.
    min_computed: the number of last tokens that every layer computes, cached or not.
    work: to which this run's is added.
    is_long: they are rotated by the model's long tables.
    """

    def __init__(
        self,
        model: DecoderModel,
        token_ids: Tensor,
        work: Work,
        blocks: PromptBlocks | None = None,
        min_computed: int = 1,
        *,
        is_long: bool = False,
    ) -> None:
        self._model = model
        self._is_long = is_long
        self._token_ids = token_ids
        self._work = work
        self._blocks = blocks
        self._last_start = max(0, len(token_ids) - min_computed)
        self._layer_idx = 0  # the next one
        self.states: tuple[Tensor, ...] = ()
        self.positions = torch.arange(len(token_ids), device=model.device)
        self._with_gaps: HostCopy | None = None  # the positions, where they are not consecutive
        self._start = self._num_cached()
        self._rope = model.rope(self.positions[None] + LONG * is_long, token_ids[None])
        self._hidden = model.embed(token_ids[None, self._start :])  # of the tokens from _start on

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def next_position(self) -> int:
        """The position of the first token after them; the last of them always goes on."""
        return len(self._token_ids)

    def num_visible(self, layer: Layer) -> int:
        """How many of them, the last ones, the first token after them sees; at least the last."""
        if self._with_gaps is None:
            return layer.num_kept(len(self))
        first = torch.tensor(layer.first_visible(self.next_position))
        return max(1, len(self) - int(torch.searchsorted(self._with_gaps.wait(), first)))

    @property
    def num_computed(self) -> int:
        """The number of tokens that the last layer computed."""
        return int(self._hidden.shape[1])

    @property
    def num_to_compute(self) -> int:
        """The number of tokens that the next layer will compute."""
        return len(self) - self._num_cached()

    def compute_layer(self, num_queries: int | None) -> PrefillAttention:
        """Compute the next layer; the result has the keys and values of all N tokens.

        num_queries: as for PrefillAttention; at most `min_computed` if some tokens are cached.
        """
        return self._without_damage(lambda: self._compute_layer(num_queries))

    def _compute_layer(self, num_queries: int | None) -> PrefillAttention:
        self._move_start()
        positions = None if self._with_gaps is None else self.positions
        attention = PrefillAttention(num_queries, self._cached(), positions)
        rope = self._rope.take(slice(self._start, None)) if self._start else self._rope
        layer, state = self._model.shape.layers[self._layer_idx], self._state()
        passed: dict[int, tuple[Tensor, ...]] = {}
        if state is None or layer.has_kv or self._blocks is None:
            self._hidden = self._model.layer(self._layer_idx, self._hidden, rope, attention, state)
        else:
            self._hidden = self._in_parts(self._blocks.ends, rope, attention, state, passed)
        self._model.share(self._layer_idx, self._rope, attention)
        self.states = () if state is None else tuple(one[0] for one in state.tensors)
        self._work.layer_tokens += self.num_computed
        if self._blocks is not None:
            entries = None
            if layer.has_kv:
                entries = self._model.newest_entries(attention, self.num_computed)
            self._blocks.grow(self._layer_idx, self._start, entries, self._hidden[0], passed)
        self._layer_idx += 1
        return attention

    def _state(self) -> LayerState | None:
        """The next layer's state after the cached tokens; None if it has none."""
        layer_idx, blocks = self._layer_idx, self._blocks
        state = self._model.new_state(layer_idx)
        if state is None or blocks is None or not (tensors := blocks.state(layer_idx)):
            return state
        return LayerState(self._model.shape.states[layer_idx], tensors)

    def _in_parts(
        self,
        ends: Sequence[int],
        rope: RotaryTables,
        attention: PrefillAttention,
        state: LayerState,
        passed: dict[int, tuple[Tensor, ...]],
    ) -> Tensor:
        """Hidden states after a layer without keys; its states at `ends` come into `passed`."""
        outputs, at = [], 0
        last = self.num_computed
        for end in [*(own - self._start for own in ends if own > self._start), last]:
            part = slice(at, end)
            if at < end:
                hidden = self._hidden[:, part]
                outputs.append(
                    self._model.layer(self._layer_idx, hidden, rope.take(part), attention, state)
                )
            if end < last:
                passed[self._start + end] = tuple(one.clone() for one in state.tensors)
            at = end
        return torch.cat(outputs, dim=1)

    def _num_cached(self) -> int:
        """The tokens that the next layer need not compute."""
        blocks = self._blocks  # other threads ask how much is left, while `keep` may unset it
        cached = 0 if blocks is None else blocks.num_cached(self._layer_idx)
        return min(cached, self._last_start)

    def _move_start(self) -> None:
        """Have the hidden states of just the tokens that the next layer computes.

        Blocks that have the layers until now join. Those that have got the next one meanwhile, by
        another run, leave.
        """
        start = self._num_cached()
        if start > self._start:
            self._hidden = self._hidden[:, start - self._start :]
        elif start < self._start:
            assert self._blocks is not None
            joining = self._blocks.hidden(self._layer_idx - 1, start, self._start)
            self._hidden = torch.cat([joining[None], self._hidden], dim=1)
        self._start = start

    def _cached(self) -> Tensor | None:
        has_kv = self._model.shape.layers[self._layer_idx].has_kv
        if self._blocks is None or self._start == 0 or not has_kv:
            return None
        return self._blocks.keys_and_values(self._layer_idx, self._start, len(self))

    def keep(self, kept: Tensor) -> None:
        """Go on with the tokens of these indices only ([num_kept] int64, ascending)."""
        self._hidden = self._without_damage(lambda: self._states(kept))
        self._rope = self._rope.take(kept)
        self.positions = self.positions[kept]
        self._with_gaps = HostCopy(self.positions)
        self._blocks, self._start = None, 0

    def hidden(self) -> Tensor:
        """[N, hidden_size], of all tokens after the last computed layer."""
        if self._start == 0:
            return self._hidden[0]
        every = torch.arange(len(self), device=self._model.device)
        return self._without_damage(lambda: self._states(every))[0]

    @property
    def last_hidden(self) -> Tensor:
        """[hidden_size], of the last token after the last computed layer."""
        return self._hidden[0, -1]

    def _states(self, tokens: Tensor) -> Tensor:
        """Hidden states [1, num_tokens, hidden_size] of some tokens after the last layer."""
        if self._blocks is None or self._start == 0:
            return self._hidden[:, tokens]
        # Blocks at the beginning may have more layers, and their frontier is after the last.
        deep = min(self._blocks.num_cached(self._layer_idx), self._start)
        deep = deep if self._blocks.computes_alone else 0
        below = _counts_below(tokens, [deep, self._start])
        alone, at_frontier, own = torch.tensor_split(tokens, below)
        parts = [self._recompute(alone)]
        if len(at_frontier):
            stored = self._blocks.hidden(self._layer_idx - 1, deep, self._start)
            parts.append(stored[None, at_frontier - deep])
        return torch.cat([*parts, self._hidden[:, own - self._start]], dim=1)

    def _recompute(self, tokens: Tensor) -> Tensor:
        """As `_states`, of tokens whose keys and values are cached in all layers until now."""
        hidden = self._model.embed(self._token_ids[None, tokens])
        if not len(tokens):
            return hidden
        assert self._blocks is not None
        rope = self._rope.take(tokens)
        num_keys = self._start if tokens.device.type != "cpu" else int(tokens[-1]) + 1
        for layer_idx in range(self._layer_idx):
            cached = self._blocks.keys_and_values(layer_idx, num_keys, num_keys)
            attention = ScatteredAttention(cached, tokens)
            hidden = self._model.layer(layer_idx, hidden, rope, attention)
        self._work.recomputed_tokens += len(tokens)
        self._work.layer_tokens += len(tokens) * self._layer_idx
        return hidden

    def _without_damage(self, compute: Callable[[], T]) -> T:
        """The result of `compute`, with damaged blocks computed anew before it is tried again."""
        while True:
            try:
                return compute()
            except DamagedBlock as damage:
                self._repair(damage.idx)

    def _repair(self, block_idx: int) -> None:
        """Compute the tokens from a damaged block on to where the computed ones start."""
        assert self._blocks is not None
        self._blocks.replace(block_idx)
        if not self._blocks.computes_alone:
            self._blocks = None  # from the first token on, as from scratch
        missing = TokenStates(
            self._model,
            self._token_ids[: self._start],
            self._work,
            self._blocks,
            is_long=self._is_long,
        )
        for _ in range(self._layer_idx):
            missing.compute_layer(1)
        self._hidden = torch.cat([missing._hidden, self._hidden], dim=1)
        self._start = missing._start


def _counts_below(tokens: Tensor, bounds: list[int]) -> list[int]:
    """How many of the ascending `tokens` are below each bound: one wait for the device."""
    (limits,) = indices_to_device([bounds], tokens.device)
    return torch.searchsorted(tokens, limits).tolist()
