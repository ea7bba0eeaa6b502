"""Rotary embedding of queries and keys, and their norms before it."""

import torch
from torch import Tensor

from winnow.kernels.cpu.library import LANES, library, require
from winnow.kernels.rope import HeadNorms


def rotate(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: HeadNorms | None = None,
) -> None:
    """As `winnow.kernels.rope.rotate`."""
    require(heads=heads, cos=cos, sin=sin)
    num_tokens, all_heads, head_dim = heads.shape
    assert head_dim % (2 * LANES) == 0, f"half a head has {head_dim / 2} numbers"
    library().winnow_rotate(
        heads.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        None if norms is None else norms.query.data_ptr(),
        None if norms is None else norms.key.data_ptr(),
        0.0 if norms is None else norms.eps,
        num_tokens,
        all_heads,
        num_heads,
        num_kv_heads,
        head_dim,
        torch.get_num_threads(),
    )
