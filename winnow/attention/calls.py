"""The hook through which transformers' layers call Winnow's attention.

transformers passes each layer's queries, keys and values (after RoPE, keys not repeated for grouped
queries) to the function registered as "winnow". It forwards them to the `AttentionCall` of the
`attending` that the layer is called in: some families' layers hand no argument on to it.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from winnow.attention.options import AttentionOptions
from winnow.layers import Layer

ATTENTION_NAME = "winnow"

# (layer_idx, query [B, H, T, D], key [B, H_kv, T, D], value [B, H_kv, T, D], options)
# -> [B, H, T, D]
AttentionCall = Callable[[int, Tensor, Tensor, Tensor, AttentionOptions], Tensor]

_attending: ContextVar[tuple[AttentionCall, Layer]] = ContextVar("attention of a layer")


@contextlib.contextmanager
def attending(attention: AttentionCall, layer: Layer) -> Iterator[None]:
    """Within it, one of transformers' layers that this thread calls attends by `attention`."""
    token = _attending.set((attention, layer))
    try:
        yield
    finally:
        _attending.reset(token)


def _dispatch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,  # noqa: ANN401 - transformers adds options that are irrelevant to inference
) -> tuple[Tensor, None]:
    assert attention_mask is None, "the AttentionCall masks"
    assert isinstance(module.layer_idx, int)
    attention, layer = _attending.get()
    options = AttentionOptions(scaling, layer, softcap, s_aux)
    output = attention(module.layer_idx, query, key, value, options)
    return output.transpose(1, 2).contiguous(), None  # [B, T, H, D]


AttentionInterface.register(ATTENTION_NAME, _dispatch)
