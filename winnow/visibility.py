"""Which keys a token sees, by the positions of both."""

import torch
from torch import Tensor

from winnow.layers import Layer


def first_visible(layer: Layer, positions: Tensor) -> Tensor:
    """`Layer.first_visible` of each of the positions, int64, whose shape the result has."""
    match layer.attention:
        case "sliding":
            assert layer.window is not None
            return (positions + 1 - layer.window).clamp_min(0)
        case "chunked":
            assert layer.window is not None
            return positions - positions % layer.window
    return torch.zeros_like(positions)


def first_keys(layer: Layer, own: Tensor, positions: Tensor | None) -> Tensor | None:
    """Of N keys, the first that each token sees: [T] int64; None: all see the first one.

    own: [T] int64, the tokens' own keys.  positions: [N] of the keys, ascending; None: 0 to N - 1.
    """
    if layer.is_full:
        return None
    if positions is None:
        return first_visible(layer, own)
    return torch.searchsorted(positions, first_visible(layer, positions[own]))
