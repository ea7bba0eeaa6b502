"""Prefill of one prompt, layer by layer: compute, score, select tokens, compress the KV.

The caller of a PrefillRun decides when the next layer is computed. It may interleave several runs,
and cancels one by closing or dropping it.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from winnow import methods
from winnow.adapters.ref import kv_variant
from winnow.adapters.rows import applied
from winnow.adapters.slots import LoadedAdapter
from winnow.attention import PrefillAttention, most_prompt_tokens
from winnow.decoder import DecoderModel
from winnow.engine.prefix.prompt_blocks import PromptBlocks
from winnow.engine.prefix.state_blocks import StateBlocks, can_reuse
from winnow.engine.prefix.store import PrefixStore
from winnow.engine.token_states import TokenStates, Work
from winnow.errors import InvalidRequest, PromptTooLong
from winnow.kv import LayerKV, without_entries
from winnow.methods.base import Cut, LayerView
from winnow.pruning_settings import PruningSettings
from winnow.report import PrefillReport
from winnow.to_device import array_to_device

Watch = Callable[[LayerView, Cut | None], None]
# From a layer's view, values, tokens' positions and kept entries, as for LayerView.pack.
Pack = Callable[[LayerView, Tensor, Tensor, list[Tensor] | None], LayerKV]


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
    most = most_prompt_tokens(model.shape, model.device)
    if most is not None and len(token_ids) > most:
        raise PromptTooLong(
            f"the prompt has {len(token_ids):,} tokens; the limit in float32 on this device is "
            f"{most:,}, where bfloat16 and float16 have none",
            param="prompt",
        )
    if min(token_ids) < 0 or max(token_ids) >= model.vocab_size:
        worst = min(token_ids) if min(token_ids) < 0 else max(token_ids)
        raise InvalidRequest(
            f"token id {worst} is outside the vocabulary, 0 to {model.vocab_size - 1}",
            param="prompt",
        )


def pack_every_head(
    view: LayerView, values: Tensor, positions: Tensor, kept: list[Tensor] | None
) -> LayerKV:
    return view.pack(values, positions, kept)


class PrefillRun:
    """The prefill of one prompt. Between two layers it holds the hidden states, but no KV.

    watch: called with each layer that the method observes, and the method's cut.
    is_long: whether the sequence, prompt and completion together, is rotated by the model's long
    tables (ModelDescription.is_long).
    store: from it the prompt's beginning is taken, if the method allows, and it gets what this run
    computes. Runs with other values of `cache_salt` share nothing. What the run holds of the store
    is let go of after the cut, by `close`, by `result`, and when the run fails or is dropped.
    adapter: that computes the prompt; prefixes are shared among its own runs only.
    pack: makes of each layer what `compute_layer` returns: all heads, or those of this process.

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
        is_long: bool,
        store: PrefixStore | None = None,
        cache_salt: str = "",
        adapter: LoadedAdapter | None = None,
        pack: Pack = pack_every_head,
    ) -> None:
        require_prompt(model, token_ids)
        settings.require_fits(model.shape)
        self._model, self._watch, self._pack = model, watch, pack
        self._rows = None if adapter is None else adapter.rows
        self._settings = settings
        self._num_prompt_tokens = len(token_ids)
        self._is_long = is_long
        self._method = methods.create(settings, len(token_ids), model.shape)
        self._no_prefix_reason = "off" if store is None else self._method.no_prefix_reason()
        if self._no_prefix_reason is None and not can_reuse(model.shape):
            self._no_prefix_reason = "recurrent_layers"
        self._blocks: PromptBlocks | None = None
        if store is not None and self._no_prefix_reason is None:
            ref = None if adapter is None else adapter.ref
            variant = kv_variant(ref, is_long=self._is_long)
            if model.shape.has_states:
                own = StateBlocks(store, token_ids, cache_salt, variant, settings.window_size)
                self._blocks, self._no_prefix_reason = own, own.no_reason
            else:
                self._blocks = PromptBlocks(store, token_ids, cache_salt, variant)
            weakref.finalize(self, store.abandon, self._blocks.close).atexit = False
        self._token_ids = array_to_device(np.array(token_ids, dtype=np.int64), model.device)
        self._work = Work()
        self._tokens = TokenStates(
            model,
            self._token_ids,
            self._work,
            self._blocks,
            settings.window_size,
            is_long=self._is_long,
        )
        self._restarted = False
        self._layer_idx = 0
        self._layer_tokens = 0  # as from scratch
        self._num_cached_tokens = 0
        self._layer_entries: list[int] = []
        self._state_bytes = 0

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
            with applied(self._rows):
                return self._compute_layer()
        except BaseException:
            self.close()
            raise

    def _compute_layer(self) -> LayerKV | None:
        is_full = self._model.shape.layers[self._layer_idx].is_full
        wants_all = self._method.needs_all_queries and is_full
        wanted_queries = None if wants_all else self._settings.window_size
        attention = self._tokens.compute_layer(wanted_queries)
        self._layer_tokens += len(self._tokens)
        if self._layer_idx == 0 and not self._restarted:
            self._num_cached_tokens = len(self._tokens) - self._tokens.num_computed
        layer, cut = self._prune(attention)
        self._layer_idx += 1
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
        """What the layer keeps, and the cut to apply after it, if any."""
        if not self._model.shape.layers[self._layer_idx].has_kv:
            return self._keep_state(), None
        view = self._model.view(self._layer_idx, attention, self._settings.window_size)
        layer = self._model.shape.layers[self._layer_idx]
        cut = None
        if layer.is_full and not self._restarted:
            cut = self._method.observe(view)
            if self._watch is not None:
                self._watch(view, cut)
        if self._is_first_of_two:
            return None, cut
        if not layer.is_full:
            kept = self._method.visible_entries(view, self._tokens.num_visible(layer))
        else:
            kept = None if self._restarted else self._method.kept_entries(view)
        return self._keep(view, attention.values, kept), cut

    def _keep(self, view: LayerView, values: Tensor, kept: list[Tensor] | None) -> LayerKV:
        num_entries = view.num_kv_heads * view.num_tokens if kept is None else sum(map(len, kept))
        self._layer_entries.append(num_entries)
        layer = self._pack(view, values, self._tokens.positions, kept)
        return self._with_state(layer)

    def _keep_state(self) -> LayerKV | None:
        if self._is_first_of_two:
            return None
        self._layer_entries.append(0)
        shape, device = self._model.shape, self._model.device
        return self._with_state(without_entries(shape, self._layer_idx, device))

    def _with_state(self, layer: LayerKV) -> LayerKV:
        states = self._tokens.states
        self._state_bytes += sum(state.nbytes for state in states)
        return replace(layer, states=states) if states else layer

    @property
    def _is_first_of_two(self) -> bool:
        """Whether the layers are computed again, so that nothing of them is kept."""
        return not self._restarted and self._method.runs_twice and not self._method.short_prompt

    def _apply(self, cut: Cut) -> None:
        if cut.restart:
            self._restarted, self._layer_idx = True, 0
            self._tokens = TokenStates(
                self._model,
                self._token_ids[cut.kept],
                self._work,
                is_long=self._is_long,
            )
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
            next_position=self._tokens.next_position,
            selection_layer=self._method.selection_layer,
            no_selection_reason=self._method.no_selection_reason,
            rho=self._method.rho,
            computed_share=self._work.layer_tokens / full_layer_tokens,
            kv_bytes_full=shape.sent_bytes(shape.unpruned_layer_entries(self._num_prompt_tokens)),
            kv_bytes_kept=shape.sent_bytes(self._layer_entries),
            layer_entries=tuple(self._layer_entries),
            num_cached_tokens=self._num_cached_tokens,
            num_recomputed_tokens=self._work.recomputed_tokens,
            # Less than nothing where another run has overtaken this one: what it selects then is
            # computed alone, after layers in which it was computed already.
            saved_layer_tokens=max(0, self._layer_tokens - self._work.layer_tokens),
            no_prefix_reason=self._no_prefix_reason,
            state_bytes=self._state_bytes,
        )
        with applied(self._rows):
            hidden = self._tokens.hidden() if keep_hidden else None
        self.close()
        return PrefillResult(self._tokens.last_hidden.clone(), report, hidden)
