"""A document's KV as its first question left it, reused for the questions that follow.

This is how KV compression is mostly used, and what the prefix store is compared with. It is no
part of Winnow, since later questions are answered from what the first one needed.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from winnow.attention import AttentionOptions, causal_attention
from winnow.decoder import DecoderModel
from winnow.kv import LayerKV
from winnow.rotary import LONG


class KeptDocument:
    """layers: of the whole first prompt, of whose first `num_tokens` tokens they are kept.

    is_long: as for PrefillRun, of that prompt, since keys stay as they were rotated.
    """

    def __init__(
        self,
        model: DecoderModel,
        layers: Sequence[LayerKV],
        num_tokens: int,
        *,
        is_long: bool = False,
    ) -> None:
        self.num_tokens, self.is_long = num_tokens, is_long
        self._model = model
        self.layers = [_beginning(layer, num_tokens) for layer in layers]

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[int]) -> tuple[list[LayerKV], Tensor]:
        """Compute what follows the document in a prompt; it attends to what was kept, and itself.

        Returns the KV of every layer, and the last token's hidden state [hidden_size].
        """
        model, num_prompt_tokens = self._model, len(token_ids)
        positions = torch.arange(self.num_tokens, num_prompt_tokens, device=model.device)
        own = torch.tensor([token_ids[self.num_tokens :]], device=model.device)
        hidden, rope = model.embed(own), model.rope(positions[None] + LONG * self.is_long, own)
        layers = []
        for kept in self.layers:
            attention = _QuestionAttention(kept, positions)
            hidden = model.layer(kept.layer_idx, hidden, rope, attention)
            layers.append(attention.layer)
        return layers, hidden[0, -1]


def _beginning(layer: LayerKV, num_tokens: int) -> LayerKV:
    """The entries of a prompt's first tokens."""
    is_kept = layer.positions < num_tokens
    return LayerKV(
        layer_idx=layer.layer_idx,
        keys=layer.keys[is_kept],
        values=layer.values[is_kept],
        positions=layer.positions[is_kept],
        head_lengths=tuple(int(is_kept[rows].sum()) for rows in layer.head_slices()),
        window_queries=layer.window_queries[:, :0],
    )


class _QuestionAttention:
    """An AttentionCall for the tokens at `positions`, behind the kept ones; then has `layer`."""

    layer: LayerKV

    def __init__(self, kept: LayerKV, positions: Tensor) -> None:
        self._kept = kept
        self._positions = positions.to(torch.int32)

    def __call__(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        kept, rows = self._kept, self._kept.head_slices()
        keys = [torch.cat([kept.keys[own], new]) for own, new in zip(rows, key[0], strict=True)]
        values = [
            torch.cat([kept.values[own], new]) for own, new in zip(rows, value[0], strict=True)
        ]
        positions = [torch.cat([kept.positions[own], self._positions]) for own in rows]
        sinks = [None] * len(rows) if options.sinks is None else options.sinks.chunk(len(rows))
        self.layer = LayerKV(
            layer_idx=layer_idx,
            keys=torch.cat(keys),
            values=torch.cat(values),
            positions=torch.cat(positions),
            head_lengths=tuple(map(len, keys)),
            window_queries=query[0, :, :0],
        )
        heads = query.chunk(len(rows), dim=1)  # [1, H / H_kv, T, D] each
        return torch.cat(
            [
                causal_attention(
                    head, k[None, None], v[None, None], replace(options, sinks=own), at.long()
                )
                for head, k, v, own, at in zip(heads, keys, values, sinks, positions, strict=True)
            ],
            dim=1,
        )
