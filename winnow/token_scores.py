"""Scores of a prompt's tokens, and how far each of them went."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from winnow.versions import set_fields


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """What the tokens of a prompt of N scored at one layer, and the last layer of each.

    layer_idx: the layer that was the first to drop tokens, else the last full one; None without
    one, or if all tokens are in the window, which is not scored.
    scores: [n] float32, the share of the window's attention that each token before it receives,
    averaged over its neighbours as for the selection; empty without a layer.
    last_layers: [N] int16, the last layer that computed each token (in pass one if there are two).
    """

    layer_idx: int | None
    scores: NDArray[np.float32]
    last_layers: NDArray[np.int16]

    __setstate__ = set_fields
