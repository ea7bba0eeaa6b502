"""Prefill of one prompt, layer by layer: compute, score, select tokens, compress the KV.

The caller of a PrefillRun decides when the next layer is computed. It may interleave several runs,
and cancels one by closing or dropping it.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow import methods
from winnow.attention import PrefillAttention
from winnow.decoder import DecoderModel
from winnow.engine.prefix.prompt_blocks import PromptBlocks
from winnow.engine.prefix.store import PrefixStore
from winnow.engine.token_states import TokenStates, Work
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
    store: from it the prompt's beginning is taken, if the method allows, and it gets what this run
    computes. Runs with other values of `cache_salt` share nothing. What the run holds of the store
    is let go of after the cut, by `close`, by `result`, and when the run fails or is dropped.

    Raises InvalidRequest for an empty prompt or a token outside the vocabulary, PromptTooLong, and
    InvalidSetting for a layer that the model does not have.
    """

    def __init__(
        self,
        model: DecoderModel,
        token_ids: Sequence[int],
        settings: PruningSettings,
        watch: Watch | None = None,
        *,
        store: PrefixStore | None = None,
        cache_salt: str = "",
    ) -> None:
        require_prompt(model, token_ids)
        settings.require_fits(model.shape.num_layers)
        self._model, self._watch = model, watch
        self._settings = settings
        self._num_prompt_tokens = len(token_ids)
        self._method = methods.create(settings, len(token_ids), model.shape)
        self._no_prefix_reason = "off" if store is None else self._method.no_prefix_reason()
        self._blocks: PromptBlocks | None = None
        if store is not None and self._no_prefix_reason is None:
            self._blocks = PromptBlocks(store, token_ids, cache_salt)
            weakref.finalize(self, store.abandon, self._blocks.close).atexit = False
        self._token_ids = torch.tensor(token_ids, device=model.device)
        self._work = Work()
        self._tokens = TokenStates(
            model, self._token_ids, self._work, self._blocks, settings.window_size
        )
        self._restarted = False
        self._layer_idx = 0
        self._layer_tokens = 0  # as from scratch
        self._num_cached_tokens = 0
        self._layer_entries: list[int] = []

    @property
    def finished(self) -> bool:
        """Whether every layer has been computed."""
        return self._layer_idx == self._model.shape.num_layers

    @property
    def next_layer_tokens(self) -> int:
        """Tokens that the next layer computes."""
        return self._tokens.num_to_compute

    @property
    def layer_tokens_left(self) -> int:
        """Tokens of all layers to come; before the cut an estimate, as Method.layer_tokens_left."""
        return self._method.layer_tokens_left(self._layer_idx, self.next_layer_tokens)

    def layers(self) -> Iterator[LayerKV]:
        """Compute all layers that are left, and give each one's kept KV."""
        while not self.finished:
            layer = self.compute_layer()
            if layer is not None:
                yield layer

    @torch.inference_mode()
    def compute_layer(self) -> LayerKV | None:
        """Compute the next layer; returns its kept KV, or None in the first of two passes."""
        try:
            return self._compute_layer()
        except BaseException:
            self.close()
            raise

    def _compute_layer(self) -> LayerKV | None:
        wanted_queries = None if self._method.needs_all_queries else self._settings.window_size
        attention = self._tokens.compute_layer(wanted_queries)
        self._layer_tokens += len(self._tokens)
        if self._layer_idx == 0 and not self._restarted:
            self._num_cached_tokens = len(self._tokens) - self._tokens.num_computed
        layer, cut = self._prune(attention)
        self._layer_idx += 1
        if layer is not None:
            self._layer_entries.append(layer.num_entries)
        if cut is not None:
            self._apply(cut)
        return layer

    def close(self) -> None:
        """Let go of the prefix store; a run that is not finished must not go on."""
        if self._blocks is not None:
            self._blocks.count(self._num_prompt_tokens, self._num_cached_tokens)
            self._blocks.close()
            self._blocks = None

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
            view.layer_idx, view.keys, values, self._tokens.positions, kept, view.window_queries
        )

    def _apply(self, cut: Cut) -> None:
        if cut.restart:
            self._restarted, self._layer_idx = True, 0
            self._tokens = TokenStates(self._model, self._token_ids[cut.kept], self._work)
        else:
            self._tokens.keep(cut.kept)
        self.close()

    def result(self, *, keep_hidden: bool = False) -> PrefillResult:
        """The result of a finished run.  keep_hidden: include the hidden states of all tokens."""
        shape = self._model.shape
        full_layer_tokens = shape.num_layers * self._num_prompt_tokens
        report = PrefillReport(
            num_prompt_tokens=self._num_prompt_tokens,
            num_selected_tokens=len(self._tokens),
            next_position=int(self._tokens.positions[-1]) + 1,
            selection_layer=self._method.selection_layer,
            no_selection_reason=self._method.no_selection_reason,
            rho=self._method.rho,
            computed_share=self._work.layer_tokens / full_layer_tokens,
            kv_bytes_full=shape.kv_bytes(full_layer_tokens * shape.num_kv_heads),
            kv_bytes_kept=shape.kv_bytes(sum(self._layer_entries)),
            layer_entries=tuple(self._layer_entries),
            num_cached_tokens=self._num_cached_tokens,
            num_recomputed_tokens=self._work.recomputed_tokens,
            # Less than nothing where another run has overtaken this one: what it selects then is
            # computed alone, after layers in which it was computed already.
            saved_layer_tokens=max(0, self._layer_tokens - self._work.layer_tokens),
            no_prefix_reason=self._no_prefix_reason,
        )
        hidden = self._tokens.hidden() if keep_hidden else None
        self.close()
        return PrefillResult(self._tokens.last_hidden.clone(), report, hidden)
