"""The hook through which transformers' layers call Winnow's attention.

transformers passes each layer's queries, keys and values (after RoPE, keys not repeated for grouped
queries) to the function registered as "winnow". It forwards them to the `AttentionCall` that the
caller passed to the layer.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from winnow.attention.options import AttentionOptions
from winnow.layers import FULL, Layer

ATTENTION_NAME = "winnow"

# (layer_idx, query [B, H, T, D], key [B, H_kv, T, D], value [B, H_kv, T, D], options)
# -> [B, H, T, D]
AttentionCall = Callable[[int, Tensor, Tensor, Tensor, AttentionOptions], Tensor]


def _dispatch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attention_call: AttentionCall,
    attention_layer: Layer = FULL,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,  # noqa: ANN401 - transformers adds options that are irrelevant to inference
) -> tuple[Tensor, None]:
    assert attention_mask is None, "the AttentionCall masks"
    assert isinstance(module.layer_idx, int)
    options = AttentionOptions(scaling, attention_layer, softcap, s_aux)
    output = attention_call(module.layer_idx, query, key, value, options)
    return output.transpose(1, 2), None  # [B, T, H, D]


AttentionInterface.register(ATTENTION_NAME, _dispatch)
