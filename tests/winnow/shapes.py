"""Shapes of models whose layers matter, and nothing else."""

from collections.abc import Sequence

import torch

from winnow.kv import ModelShape
from winnow.layers import FULL, Layer

SLIDING = Layer("sliding", 8)
CHUNKED = Layer("chunked", 8)


def shape_of(layers: Sequence[Layer] | int) -> ModelShape:
    """layers: of the model, or how many full ones it has."""
    own = (FULL,) * layers if isinstance(layers, int) else tuple(layers)
    return ModelShape(len(own), 4, 2, 16, 64, torch.float32, own)
