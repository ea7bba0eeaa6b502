"""A decoder layer of few operations, for families of Llama's pattern.

RMSNorm → queries, keys and values in one product → rotation → attention → product → RMSNorm with
the residual → gate and up in one product → SiLU times up → product. transformers' layer is what it
is made of and compared with, and what runs where it does not fit.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from winnow.adapters.rows import AdapterRows, applied_rows
from winnow.adapters.stack import AdapterStack
from winnow.attention import AttentionCall, AttentionOptions, attending, causal_attention
from winnow.errors import one_line
from winnow.kernels.choice import REFERENCE, LayerKernels, layer_kernels
from winnow.kernels.cpu.packed_layer import LayerWeights, PackedLayer
from winnow.kernels.rope import HeadNorms
from winnow.kv import ModelShape
from winnow.linear import PackedLinear, SummedLinear, joined, product_with
from winnow.quantization.layers import Int8Linear
from winnow.rotary import Table

logger = logging.getLogger(__name__)

# The linear layers that each product is made of, as far as a family has them.
PRODUCTS = (
    ("self_attn.qkv_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_TRIAL_TOKENS = 5
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}


class FusedLayer(nn.Module):
    """Computes what `layer`, one of transformers', does; its weights are copies of that one's.

    mlp_block_tokens: tokens whose MLP is computed at once, to bound its memory.
    stacks: of PRODUCTS, if there may be adapters.
    Raises ValueError if the layer is not of the pattern.
    """

    def __init__(
        self,
        layer: Any,  # noqa: ANN401
        shape: ModelShape,
        kernels: LayerKernels,
        mlp_block_tokens: int,
    ) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        _require_pattern(layer)
        self.layer_idx: int = attention.layer_idx
        self._options = AttentionOptions(attention.scaling, shape.layers[attention.layer_idx])
        self._shape = shape
        self._kernels = kernels
        self._block_tokens = mlp_block_tokens
        self.input_norm = layer.input_layernorm.weight
        self.post_norm = layer.post_attention_layernorm.weight
        self._eps: float = layer.input_layernorm.variance_epsilon
        self.query_norm, self.key_norm = _head_norm_weights(attention)
        self._head_eps = attention.q_norm.variance_epsilon if self.query_norm is not None else 0.0
        self.qkv = joined(_parts(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")))
        self.output = joined([attention.o_proj])
        self.gate_up = joined(_parts(mlp, "gate_up_proj", ("gate_proj", "up_proj")))
        self.down = joined([mlp.down_proj])
        # Submodules and calls of them are looked up slowly: in 24 layers it takes a millisecond.
        self._products = tuple(
            module.forward for module in (self.qkv, self.output, self.gate_up, self.down)
        )
        self._packed = self._as_packed()
        self.stacks: tuple[AdapterStack, ...] = ()

    def forward(self, hidden: Tensor, table: Table | None, attention: AttentionCall) -> Tensor:
        """hidden: [B, T, hidden_size].  table: two of [B, T, head_dim].  Returns as `hidden`."""
        batch, num_tokens, size = hidden.shape
        residual = hidden.reshape(-1, size)  # [B * T, hidden_size]
        assert table is not None
        cos, sin = table
        rows = applied_rows()
        heads = self._before_attention(residual, cos, sin, rows)
        attended = self._attend(heads, batch, attention)
        return self._after_attention(attended, residual, rows).view(batch, num_tokens, size)

    def _product(self, idx: int, inputs: Tensor, rows: AdapterRows | None) -> Tensor:
        """One of PRODUCTS, with what the tokens' adapters add.  inputs: [T, in]."""
        if rows is None:
            return self._products[idx](inputs)  # type: ignore[no-any-return]
        linear = (self.qkv, self.output, self.gate_up, self.down)[idx]
        return product_with(linear, inputs, lambda out: self.stacks[idx].add(out, inputs, rows))

    def _before_attention(
        self, residual: Tensor, cos: Tensor, sin: Tensor, rows: AdapterRows | None
    ) -> Tensor:
        """Queries, keys and values [B * T, H + 2 * H_kv, D], rotated.  cos, sin: [B, T, D]."""
        if self._packed is not None and rows is None:
            return self._packed.before_attention(residual, cos, sin)
        shape = self._shape
        normed = self._kernels.rms_norm(residual, self.input_norm, self._eps)
        heads = self._product(0, normed, rows).view(len(normed), -1, shape.head_dim)
        cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
        norms = self._head_norms()
        self._kernels.rotate(heads, cos, sin, shape.num_heads, shape.num_kv_heads, norms)
        return heads

    def _attend(self, heads: Tensor, batch: int, attention: AttentionCall) -> Tensor:
        """heads: [B * T, H + 2 * H_kv, D].  Returns [B * T, H * D]."""
        shape = self._shape
        by_head = heads.view(batch, -1, *heads.shape[1:]).transpose(1, 2)  # [B, H + 2 H_kv, T, D]
        sizes = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        query, key, value = torch.split_with_sizes(by_head, sizes, dim=1)
        attended = attention(self.layer_idx, query, key, value, self._options)  # [B, H, T, D]
        return attended.transpose(1, 2).reshape(heads.shape[0], -1)

    def _after_attention(
        self, attended: Tensor, residual: Tensor, rows: AdapterRows | None
    ) -> Tensor:
        """attended: [B * T, H * D].  Returns [B * T, hidden_size]."""
        if self._packed is not None and rows is None:
            return self._packed.after_attention(attended, residual, self._block_tokens)
        normed, total = self._kernels.add_rms_norm(
            self._product(1, attended, rows), residual, self.post_norm, self._eps
        )
        for start in range(0, len(total), self._block_tokens):
            block = slice(start, start + self._block_tokens)
            own = None if rows is None else rows.block(block)
            inner = self._kernels.silu_mul(self._product(2, normed[block], own))
            total[block].add_(self._product(3, inner, own))
        return total

    def _head_norms(self) -> HeadNorms | None:
        if self.query_norm is None:
            return None
        return HeadNorms(self.query_norm, self.key_norm, self._head_eps)

    def _as_packed(self) -> PackedLayer | None:
        """The layer in two calls, if its kernels and its products are those for CPUs."""
        products = (self.qkv, self.output, self.gate_up, self.down)
        if self._kernels is REFERENCE:
            return None
        packed = tuple(one.product for one in products if isinstance(one, PackedLinear))
        if len(packed) < len(products):
            return None
        norms = (self.input_norm, self.post_norm, self._eps, self._head_norms())
        return PackedLayer(LayerWeights(packed, *norms), self._shape)


def _require_pattern(layer: Any) -> None:  # noqa: ANN401
    """Raise ValueError for what the pattern does not have."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules()):
        raise ValueError("something is hooked into it")
    others = {
        name
        for name, module in layer.named_modules()
        if name and not list(module.children()) and not _is_known(name, module)
    }
    if others:
        raise ValueError(f"it has {', '.join(sorted(others))}")


def _is_known(name: str, module: nn.Module) -> bool:
    kind = type(module)
    if "norm" in name:
        return kind.__name__.endswith("RMSNorm")
    return kind in (nn.Linear, Int8Linear, nn.Dropout) or "SiLU" in kind.__name__


def _parts(parent: Any, whole: str, parts: tuple[str, ...]) -> list[nn.Linear]:  # noqa: ANN401
    """The layers that make up a fused product: one already, or several."""
    names = (whole,) if hasattr(parent, whole) else parts
    return [getattr(parent, name) for name in names]


def _head_norm_weights(attention: Any) -> tuple[Any, Any]:  # noqa: ANN401
    if not hasattr(attention, "q_norm"):
        return None, None
    return attention.q_norm.weight, attention.k_norm.weight


@torch.inference_mode()
def fuse_layers(network: Any, shape: ModelShape, mlp_block_tokens: int) -> bool:  # noqa: ANN401
    """Put a FusedLayer in the place of each of the network's layers, if the first one's agrees.

    One layer at a time is in memory twice. If they do not fit, the network stays as it is, and one
    line of the log says why.
    """
    layers = network.model.layers
    try:
        down: Any = layers[0].mlp.down_proj
        down = down.product if isinstance(down, SummedLinear) else down
        mlp_size = down.weight.shape[1]  # a rank's own; its in_features are those of all ranks
        kernels = layer_kernels(down.weight.device, shape, mlp_size)
        fused = [FusedLayer(layers[0], shape, kernels, mlp_block_tokens)]
        _require_same(network, fused[0])
        for layer in layers:
            _require_pattern(layer)
    except Exception as error:  # Triton, its compiler and its driver each have errors of their own
        logger.warning(
            "layers run as transformers has them, since they cannot be fused: %s", one_line(error)
        )
        return False
    for idx in range(len(layers)):
        layers[idx] = (
            fused.pop() if fused else FusedLayer(layers[idx], shape, kernels, mlp_block_tokens)
        )
    return True


def _require_same(network: Any, fused: FusedLayer) -> None:  # noqa: ANN401
    """Raise ValueError unless the layer computes what transformers' first one does."""
    body = network.model
    device = body.embed_tokens.weight.device
    positions = torch.arange(_TRIAL_TOKENS, device=device)[None]
    hidden = body.embed_tokens(positions % body.embed_tokens.num_embeddings)
    rope = body.rotary_emb(hidden, positions)
    if rope[0].shape[-1] != fused._shape.head_dim:
        raise ValueError(
            f"{rope[0].shape[-1]} of {fused._shape.head_dim} numbers of a head are rotated"
        )

    def attend(
        _: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        return causal_attention(query, key, value, options)

    with attending(attend, fused._shape.layers[0]):
        theirs = body.layers[0](hidden, attention_mask=None, position_embeddings=rope)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    difference = (fused(hidden, rope, attend) - theirs).float().abs().max()
    error = float(difference / theirs.float().abs().max().clamp_min(1e-6))
    limit = _TOLERANCES[hidden.dtype]
    if not error <= limit:
        raise ValueError(f"the first one's results are {error:.2g} off; the limit is {limit}")
