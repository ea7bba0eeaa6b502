"""Linear layers of a loaded model: several as one, packed on CPUs, of int8, shared by ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from winnow.kernels.cpu import linear as on_cpu
from winnow.kernels.cpu.library import LANES, fits, has_amx, is_usable
from winnow.quantization.layers import Int8Embedding, Int8Linear


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed for our kernel.

    weight: [out, in].  scales: float32 [out], if the weight is int8.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None) -> None:
        super().__init__()
        self.num_outputs = len(weight)
        self.weight = nn.Parameter(on_cpu.pack(weight), requires_grad=False)
        self.bias = bias
        self.scales = scales

    @property
    def product(self) -> on_cpu.Product:
        return on_cpu.Product(self.weight, self.bias, self.scales)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: [..., in].  Returns [..., out]."""
        rows = inputs.reshape(-1, inputs.shape[-1]).contiguous()
        outputs = on_cpu.linear(rows, self.product, self.num_outputs)
        return outputs.view(*inputs.shape[:-1], -1)


class PackedEmbedding(nn.Module):
    """The embeddings of a model whose head, `head`, has the same weight."""

    def __init__(self, head: PackedLinear) -> None:
        super().__init__()
        self.weight = head.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: int64.  Returns [*token_ids.shape, hidden_size]."""
        return on_cpu.rows_of(self.weight, token_ids)


class OneDnnLinear(nn.Module):
    """A linear layer whose weight is packed for oneDNN's products."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = _operation("_reorder_linear_weight")(weight, 1)
        self.bias = bias
        self._product = _operation("_linear_pointwise")

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: [T, in].  Returns [T, out]."""
        return self._product(inputs, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


class SummedLinear(nn.Module):
    """A linear layer of which each rank has some input columns; the output is the sum over ranks.

    product: this rank's columns, without the bias.
    """

    def __init__(self, product: nn.Module, bias: Tensor | None) -> None:
        super().__init__()
        self.product = product
        self.bias = bias

    def forward(self, inputs: Tensor, add: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """inputs: [..., own in].  Returns [..., out], the same on all ranks.

        add: what it adds to this rank's product is summed too.
        """
        output: Tensor = self.product(inputs)
        if add is not None:
            output = add(output)
        dist.all_reduce(output)
        return output if self.bias is None else output + self.bias


def product_with(linear: nn.Module, inputs: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
    """What `add` makes of the linear layer's output, of each rank's part before they are summed.

    inputs: [..., in].  add: takes and returns [..., out].
    """
    if isinstance(linear, SummedLinear):
        return linear(inputs, add)  # type: ignore[no-any-return]
    return add(linear(inputs))


def _operation(name: str) -> Any:  # noqa: ANN401 - torch has no types for them
    return getattr(torch.ops.mkldnn, name).default


def joined(linears: Sequence[Any]) -> nn.Module:
    """One layer whose output is that of all `linears`, side by side; owns its weight."""
    if isinstance(linears[0], SummedLinear):
        return SummedLinear(joined([linears[0].product]), linears[0].bias)
    weight = torch.cat([linear.weight for linear in linears])
    bias = None
    if any(linear.bias is not None for linear in linears):
        bias = torch.cat([_bias_of(linear) for linear in linears])
    if isinstance(linears[0], Int8Linear):
        scales = torch.cat([linear.scales for linear in linears])
        return _packed_int8(Int8Linear(weight, scales, bias, linears[0].dtype))
    packed = _packed(weight, bias)
    if packed is not None:
        return packed
    num_outputs, num_inputs = weight.shape
    linear = nn.Linear(num_inputs, num_outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))
    return linear


def _bias_of(linear: Any) -> Tensor:  # noqa: ANN401
    if linear.bias is not None:
        return linear.bias  # type: ignore[no-any-return]
    dtype = linear.dtype if isinstance(linear, Int8Linear) else linear.weight.dtype
    return torch.zeros(len(linear.weight), dtype=dtype, device=linear.weight.device)


def _packed(weight: Tensor, bias: Tensor | None) -> nn.Module | None:
    """The layer with a packed copy of its weight; None where packing gains nothing."""
    if _runs_packed(weight):
        return PackedLinear(weight, bias)
    return OneDnnLinear(weight, bias) if _onednn_packs(weight) else None


def _packed_int8(linear: Int8Linear) -> nn.Module:
    """The layer with a packed copy of its weight; itself where our kernel does not run."""
    num_outputs, num_inputs = linear.weight.shape
    fits_kernel = linear.dtype == torch.bfloat16 and num_inputs % LANES == 0
    if fits_kernel and num_outputs % LANES == 0 and is_usable() and not has_amx():
        return PackedLinear(linear.weight, linear.bias, linear.scales)
    return linear


def _runs_packed(weight: Tensor) -> bool:
    return fits(weight) and len(weight) % LANES == 0 and is_usable() and not has_amx()


def _onednn_packs(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_int8(network: Any) -> None:  # noqa: ANN401
    """Pack what is int8 in a network and not in a fused layer."""
    head, embeddings = network.lm_head, network.model.embed_tokens
    is_shared = isinstance(embeddings, Int8Embedding) and embeddings.weight is head.weight
    for parent in [*network.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, Int8Linear):
                setattr(parent, name, _packed_int8(child))
    if is_shared:
        embeddings.weight = network.lm_head.weight


def pack_head(network: Any) -> None:  # noqa: ANN401
    """Pack a network's LM head on a CPU, and its embeddings if they have the same weight.

    Embeddings of a class of their own, such as Gemma's, which are scaled, keep the plain weight.
    """
    head, embeddings = network.lm_head, network.model.embed_tokens
    packed = _packed(head.weight, head.bias) if type(head) is nn.Linear else None
    if packed is None:
        return
    network.lm_head = packed
    is_shared = type(embeddings) is nn.Embedding and embeddings.weight is head.weight
    if isinstance(packed, PackedLinear) and is_shared:
        network.model.embed_tokens = PackedEmbedding(packed)
