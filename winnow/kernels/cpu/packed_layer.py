"""A decoder layer of packed weights: what is before its attention in one call, the rest in another.

They compute what the kernels of norm.py, linear.py, rope.py and activation.py do one by one, to the
last bit. Two calls in place of eight matter to a step of few rows of a small model.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.kernels.cpu.library import library, require
from winnow.kernels.cpu.linear import Linear, Product
from winnow.kernels.rope import HeadNorms
from winnow.kv import ModelShape


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """products: of queries, keys and values; of attention's output; of gate and up; down.

    input_norm, post_norm: [hidden_size], of the two RMSNorms, whose epsilon is `eps`.
    """

    products: tuple[Product, ...]
    input_norm: Tensor
    post_norm: Tensor
    eps: float
    head_norms: HeadNorms | None


class _Layer(ctypes.Structure):
    """As in packed_layer.h."""

    _fields_ = (
        *((name, Linear) for name in ("qkv", "output", "gate_up", "down")),
        *(
            (name, ctypes.c_void_p)
            for name in ("input_norm", "post_norm", "query_norm", "key_norm")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("hidden_size", "mlp_size", "num_heads", "num_kv_heads", "head_dim")
        ),
        ("eps", ctypes.c_float),
        ("head_eps", ctypes.c_float),
    )


class PackedLayer:
    """Its weights must stay where they are in memory."""

    def __init__(self, weights: LayerWeights, shape: ModelShape) -> None:
        require(input_norm=weights.input_norm, post_norm=weights.post_norm)
        self._weights = weights  # keeps what `_layer` points at
        self._sizes = (shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
        self._mlp_size = mlp_size = 2 * weights.products[-1].packed.shape[1]
        norms = weights.head_norms
        self._layer = _Layer(
            *(product.addresses() for product in weights.products),
            input_norm=weights.input_norm.data_ptr(),
            post_norm=weights.post_norm.data_ptr(),
            query_norm=None if norms is None else norms.query.data_ptr(),
            key_norm=None if norms is None else norms.key.data_ptr(),
            hidden_size=shape.hidden_size,
            mlp_size=mlp_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            eps=weights.eps,
            head_eps=0.0 if norms is None else norms.eps,
        )
        self._at = ctypes.addressof(self._layer)

    def before_attention(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries, keys and values, rotated: [T, H + 2 * H_kv, D].

        hidden: [T, hidden_size].  cos, sin: [..., D], of T tokens.
        """
        require(hidden=hidden, cos=cos, sin=sin)
        normed = torch.empty_like(hidden)
        num_tokens = hidden.shape[0]  # torch's len takes a microsecond
        heads = hidden.new_empty((num_tokens, *self._sizes))
        library().winnow_before_attention(
            self._at,
            hidden.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            normed.data_ptr(),
            heads.data_ptr(),
            num_tokens,
            torch.get_num_threads(),
        )
        return heads

    def after_attention(self, attended: Tensor, residual: Tensor, block_tokens: int) -> Tensor:
        """The layer's outputs [T, hidden_size], computed for `block_tokens` at a time.

        attended: [T, H * D].  residual: [T, hidden_size].
        """
        require(attended=attended, residual=residual)
        num_tokens, size = residual.shape
        rows = min(num_tokens, block_tokens)
        inner = residual.new_empty((rows, size + 3 * self._mlp_size))
        result = torch.empty_like(residual)
        library().winnow_after_attention(
            self._at,
            attended.data_ptr(),
            residual.data_ptr(),
            inner.data_ptr(),
            result.data_ptr(),
            num_tokens,
            rows,
            torch.get_num_threads(),
        )
        return result
