"""PrefillReport: what prefill computed, selected and kept."""

from dataclasses import dataclass

from winnow.versions import set_fields


@dataclass(frozen=True, slots=True)
class PrefillReport:
    """What prefill did with one prompt.

    selection_layer: the (first) layer after which fewer tokens continued, or None with
    `no_selection_reason` (`off`, `short_prompt`, `threshold_not_met`).
    num_selected_tokens: tokens that the last layer computed.
    next_position: position of the first decoded token: num_prompt_tokens, or num_selected_tokens
    where the selected tokens were recomputed from position 0.
    rho: (layer, relative rank variance) for each layer that ASL evaluated.
    computed_share: layer-tokens computed / (num_layers * num_prompt_tokens), up to 1; for a method
    with two passes the sum of both, up to 2. Above that only where selected tokens were computed
    twice, see `num_recomputed_tokens`.
    kv_bytes_full, kv_bytes_kept: keys and values of every token that the next one sees, and of the
    kept entries, in the model's dtype.
    layer_entries: kept KV entries per layer, summed over KV heads.
    num_cached_tokens: tokens that layer 0 took from the prefix store.
    num_recomputed_tokens: selected ones of those that had to be computed alone up to the cut.
    saved_layer_tokens: layer-tokens that were not computed because of the prefix store; at least 0.
    no_prefix_reason: why the prefix store was not used: `off`, the method's `needs_all_queries` or
    `drops_from_layer_0`, `no_state` of recurrent layers that the prompt could go on from, or
    `recurrent_layers` with keys as well, or that do not go on in parts; None if it was.
    state_bytes: of the recurrent layers' states, whose size no prompt changes.
    """

    num_prompt_tokens: int
    num_selected_tokens: int
    next_position: int
    selection_layer: int | None
    no_selection_reason: str | None
    rho: tuple[tuple[int, float], ...]
    computed_share: float
    kv_bytes_full: int
    kv_bytes_kept: int
    layer_entries: tuple[int, ...]
    num_cached_tokens: int = 0
    num_recomputed_tokens: int = 0
    saved_layer_tokens: int = 0
    no_prefix_reason: str | None = "off"
    state_bytes: int = 0

    __setstate__ = set_fields

    @property
    def num_computed_tokens(self) -> int:
        """Tokens that layer 0 computed."""
        return self.num_prompt_tokens - self.num_cached_tokens
