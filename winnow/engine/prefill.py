"""One prompt through the model, layer by layer: score, maybe select, compress, hand over.

`run_prefill` is a generator, so whoever drives it decides when the next layer is computed, and may
close it to cancel. At any time it holds the hidden states of one layer and one layer's KV.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow import compression, selection
from winnow.attention import PrefillAttention
from winnow.errors import InvalidRequest, PromptTooLong
from winnow.kv import LayerKV, pack_layer
from winnow.models import DecoderModel
from winnow.request import PrefillReport, PruningSettings
from winnow.scoring import observed_attention
from winnow.selection import Selection


@dataclass(frozen=True, slots=True, eq=False)
class PrefillResult:
    """final_hidden: [hidden_size], the last token's after the last layer, before the final norm."""

    final_hidden: Tensor
    report: PrefillReport


def run_prefill(
    model: DecoderModel, token_ids: Sequence[int], settings: PruningSettings
) -> Generator[LayerKV, None, PrefillResult]:
    """Yields each layer's kept KV as soon as it is final; returns the result after the last.

    Raises InvalidRequest for an empty prompt or a token outside the vocabulary, PromptTooLong, and
    InvalidSetting for a layer that the model does not have.
    """
    require_prompt(model, token_ids)
    settings.require_fits(model.shape.num_layers)
    run = _PrefillRun(model, token_ids, settings)
    for layer_idx in range(model.shape.num_layers):
        yield run.compute_layer(layer_idx)
    return run.result()


def require_prompt(model: DecoderModel, token_ids: Sequence[int]) -> None:
    """Raise unless the prompt is one the model can take and go on from."""
    if not token_ids:
        raise InvalidRequest("the prompt has 0 tokens; it must have at least 1", param="prompt")
    if len(token_ids) >= model.max_positions:
        raise PromptTooLong(
            f"the prompt has {len(token_ids):,} tokens; the limit is {model.max_positions - 1:,}",
            param="prompt",
        )
    if min(token_ids) < 0 or max(token_ids) >= model.vocab_size:
        worst = min(token_ids) if min(token_ids) < 0 else max(token_ids)
        raise InvalidRequest(
            f"token id {worst} is outside the vocabulary, 0 to {model.vocab_size - 1}",
            param="prompt",
        )


class _PrefillRun:
    """The state of one prompt between two layers."""

    def __init__(
        self, model: DecoderModel, token_ids: Sequence[int], settings: PruningSettings
    ) -> None:
        self._model = model
        self._settings = settings
        self._num_tokens = len(token_ids)
        self._positions = torch.arange(self._num_tokens, device=model.device)
        self._hidden = model.embed(torch.tensor([token_ids], device=model.device))
        self._rope = model.rope(self._positions[None])
        self._selector = selection.create(settings, self._num_tokens)
        self._selection_layer: int | None = None
        self._computed_layer_tokens = 0
        self._layer_entries: list[int] = []

    @torch.inference_mode()
    def compute_layer(self, layer_idx: int) -> LayerKV:
        attention = PrefillAttention(self._settings.window_size)
        self._hidden = self._model.layer(layer_idx, self._hidden, self._rope, attention)
        self._computed_layer_tokens += len(self._positions)
        mass = self._observe(layer_idx, attention)
        layer = self._compress(layer_idx, attention, mass)
        if mass is not None and self._selection_layer is None:
            self._select(layer_idx, self._selector.observe(layer_idx, mass))
        self._layer_entries.append(layer.num_entries)
        return layer

    def _observe(self, layer_idx: int, attention: PrefillAttention) -> Tensor | None:
        """Observed attention [num_heads, num_tokens] if selection or compression wants it."""
        selecting = self._selection_layer is None and self._selector.needs_scores(layer_idx)
        if not selecting and compression.keeps_all(self._settings, len(self._positions)):
            return None
        return observed_attention(attention.window_queries, attention.keys, attention.scaling)

    def _compress(
        self, layer_idx: int, attention: PrefillAttention, mass: Tensor | None
    ) -> LayerKV:
        num_kv_heads = self._model.shape.num_kv_heads
        if mass is None:
            kept = [torch.arange(len(self._positions), device=self._model.device)] * num_kv_heads
        else:
            kept = compression.kept_entries(mass, num_kv_heads, self._settings)
        return pack_layer(
            layer_idx,
            attention.keys,
            attention.values,
            self._positions,
            kept,
            attention.window_queries,
        )

    def _select(self, layer_idx: int, selected: Selection | None) -> None:
        if selected is None:
            return
        self._selection_layer = layer_idx
        self._hidden = self._hidden[:, selected.kept]
        self._positions = self._positions[selected.kept]
        cos, sin = self._rope
        self._rope = cos[:, selected.kept], sin[:, selected.kept]

    def result(self) -> PrefillResult:
        shape = self._model.shape
        full_entries = shape.num_layers * shape.num_kv_heads * self._num_tokens
        selected = self._selection_layer is not None
        report = PrefillReport(
            num_prompt_tokens=self._num_tokens,
            num_selected_tokens=len(self._positions),
            selection_layer=self._selection_layer,
            no_selection_reason=None if selected else self._selector.no_selection_reason,
            rho=self._selector.rho,
            computed_share=self._computed_layer_tokens / (shape.num_layers * self._num_tokens),
            kv_bytes_full=shape.kv_bytes(full_entries),
            kv_bytes_kept=shape.kv_bytes(sum(self._layer_entries)),
            layer_entries=tuple(self._layer_entries),
        )
        return PrefillResult(self._hidden[0, -1].clone(), report)
