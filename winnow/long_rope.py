"""LongRoPE (arXiv 2402.13753): one set of frequencies for short sequences, another for long ones.

transformers chooses between them by the largest position of a call. So a sequence would be rotated
by one set in prefill and by the other in decode, and a batch by what its longest row needs. Here
each sequence has its own, chosen before it begins (ModelDescription.is_long).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from winnow.rotary import LONG

_TYPE = "longrope"


def has_long_rope(config: Any) -> bool:  # noqa: ANN401 - each family has its own class
    """Whether all layers share tables that are longrope's."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type") == _TYPE


class LongRope(nn.Module):
    """Takes the place of a network's rotary embedding.

    rotary: transformers' module, which makes tables of its `inv_freq`.
    """

    def __init__(self, rotary: Any, config: Any) -> None:  # noqa: ANN401
        super().__init__()
        original = config.rope_parameters["original_max_position_embeddings"]
        device = rotary.inv_freq.device
        self._short, self._long = rotary, copy.deepcopy(rotary)
        self._long.inv_freq, _ = ROPE_INIT_FUNCTIONS[_TYPE](config, device, seq_len=original + 1)
        for one in (self._short, self._long):
            one.rope_type = "default"  # so that it keeps its frequencies, whatever the positions

    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Tables for positions [B, T] int64, with LONG added where the long ones are due."""
        plain, is_long = positions % LONG, (positions >= LONG)[..., None]
        tables = zip(self._short(like, plain), self._long(like, plain), strict=True)
        return tuple(torch.where(is_long, long, short) for short, long in tables)
