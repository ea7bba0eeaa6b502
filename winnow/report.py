"""What prefill did with one prompt."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrefillReport:
    """What prefill did with one prompt.

    selection_layer: layer after which fewer tokens went on (the first, where there are several),
    or None with `no_selection_reason` (`off`, `short_prompt`, `threshold_not_met`).
    num_selected_tokens: tokens that the last layer computed.
    next_position: at which decoding goes on: num_prompt_tokens, or num_selected_tokens where the
    selected tokens were computed again from position 0.
    rho: (layer, relative rank variance) for each layer at which ASL looked.
    computed_share: layer-tokens computed / (num_layers * num_prompt_tokens), up to 1; of a method
    that computes twice the sum of both passes, up to 2.
    kv_bytes_full, kv_bytes_kept: keys and values of every token, and of the kept entries.
    layer_entries: kept KV entries per layer, summed over KV heads.
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
