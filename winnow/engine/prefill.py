"""Prefill of one prompt, layer by layer: compute, score, select tokens, compress the KV.

The caller of a PrefillRun decides when the next layer is computed. It may interleave several runs,
and cancels one by dropping it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow import methods
from winnow.attention import PrefillAttention
from winnow.decoder import DecoderModel
from winnow.errors import InvalidRequest, PromptTooLong
from winnow.kv import LayerKV, pack_layer
from winnow.methods.base import Cut, LayerView
from winnow.pruning_settings import PruningSettings
from winnow.report import PrefillReport

Watch = Callable[[LayerView, Cut | None], None]


@dataclass(frozen=True, slots=True, eq=False)
class PrefillResult:
    """final_hidden: [hidden_size], of the last token after the last layer, before the final norm.

    hidden: [num_tokens, hidden_size], the same of all tokens of the last layer, if requested.
    """

    final_hidden: Tensor
    report: PrefillReport
    hidden: Tensor | None = None


def require_prompt(model: DecoderModel, token_ids: Sequence[int]) -> None:
    """Raise InvalidRequest or PromptTooLong unless the model can prefill the prompt and decode."""
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


class PrefillRun:
    """The prefill of one prompt. Between two layers it holds the hidden states, but no KV.

    watch: called with each layer that the method observes, and the method's cut.

    Raises InvalidRequest for an empty prompt or a token outside the vocabulary, PromptTooLong, and
    InvalidSetting for a layer that the model does not have.
    """

    def __init__(
        self,
        model: DecoderModel,
        token_ids: Sequence[int],
        settings: PruningSettings,
        watch: Watch | None = None,
    ) -> None:
        require_prompt(model, token_ids)
        settings.require_fits(model.shape.num_layers)
        self._model, self._watch = model, watch
        self._settings = settings
        self._num_prompt_tokens = len(token_ids)
        self._method = methods.create(settings, len(token_ids), model.shape)
        self._restarted = False
        self._computed_layer_tokens = 0
        self._layer_entries: list[int] = []
        self._start(torch.tensor(token_ids, device=model.device))

    def _start(self, token_ids: Tensor) -> None:
        """Start at layer 0 with `token_ids` [num_tokens] at positions 0 to num_tokens - 1."""
        self._token_ids = token_ids
        self._layer_idx = 0
        self._positions = torch.arange(len(token_ids), device=self._model.device)
        self._hidden = self._model.embed(token_ids[None])
        self._rope = self._model.rope(self._positions[None])

    @property
    def finished(self) -> bool:
        """Whether every layer has been computed."""
        return self._layer_idx == self._model.shape.num_layers

    @property
    def next_layer_tokens(self) -> int:
        """Tokens that the next layer computes."""
        return len(self._positions)

    @property
    def layer_tokens_left(self) -> int:
        """Tokens of all layers to come; before the cut an estimate, as Method.layer_tokens_left."""
        return self._method.layer_tokens_left(self._layer_idx, len(self._positions))

    @torch.inference_mode()
    def compute_layer(self) -> LayerKV | None:
        """Compute the next layer; returns its kept KV, or None in the first of two passes."""
        wanted_queries = None if self._method.needs_all_queries else self._settings.window_size
        attention = PrefillAttention(wanted_queries)
        self._hidden = self._model.layer(self._layer_idx, self._hidden, self._rope, attention)
        self._computed_layer_tokens += len(self._positions)
        layer, cut = self._prune(attention)
        self._layer_idx += 1
        if layer is not None:
            self._layer_entries.append(layer.num_entries)
        if cut is not None:
            self._apply(cut)
        return layer

    def _prune(self, attention: PrefillAttention) -> tuple[LayerKV | None, Cut | None]:
        """The layer's kept KV, and the cut to apply after it, if any."""
        view = LayerView(
            self._layer_idx,
            attention.keys,
            attention.queries,
            attention.scaling,
            self._settings.window_size,
        )
        if self._restarted:
            return self._pack(view, attention.values, None), None
        cut = self._method.observe(view)
        if self._watch is not None:
            self._watch(view, cut)
        if self._method.runs_twice and not self._method.short_prompt:
            return None, cut
        return self._pack(view, attention.values, self._method.kept_entries(view)), cut

    def _pack(self, view: LayerView, values: Tensor, kept: list[Tensor] | None) -> LayerKV:
        if kept is None:
            kept = [torch.arange(view.num_tokens, device=values.device)] * view.num_kv_heads
        return pack_layer(
            view.layer_idx, view.keys, values, self._positions, kept, view.window_queries
        )

    def _apply(self, cut: Cut) -> None:
        if cut.restart:
            self._restarted = True
            self._start(self._token_ids[cut.kept])
            return
        self._hidden = self._hidden[:, cut.kept]
        self._positions = self._positions[cut.kept]
        cos, sin = self._rope
        self._rope = cos[:, cut.kept], sin[:, cut.kept]

    def result(self, *, keep_hidden: bool = False) -> PrefillResult:
        """The result of a finished run.  keep_hidden: include the hidden states of all tokens."""
        shape = self._model.shape
        full_layer_tokens = shape.num_layers * self._num_prompt_tokens
        report = PrefillReport(
            num_prompt_tokens=self._num_prompt_tokens,
            num_selected_tokens=len(self._positions),
            next_position=int(self._positions[-1]) + 1,
            selection_layer=self._method.selection_layer,
            no_selection_reason=self._method.no_selection_reason,
            rho=self._method.rho,
            computed_share=self._computed_layer_tokens / full_layer_tokens,
            kv_bytes_full=shape.kv_bytes(full_layer_tokens * shape.num_kv_heads),
            kv_bytes_kept=shape.kv_bytes(sum(self._layer_entries)),
            layer_entries=tuple(self._layer_entries),
        )
        hidden = self._hidden[0]
        return PrefillResult(hidden[-1].clone(), report, hidden if keep_hidden else None)
