"""What takes the place of a network's matrices when its weights are int8."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from winnow.kernels.cpu.linear import rows_of
from winnow.quantization.int8 import dequantized

_FEW_ROWS = 16  # up to which PyTorch's product of int8 weights is faster than widening them
_BLOCK_NUMBERS = 1 << 21  # widened at a time


class Int8Linear(nn.Module):
    """A linear layer of int8 weights, by PyTorch's operations.

    weight: int8 [out, in].  scales: float32 [out].  bias: [out].  dtype: of inputs and outputs.
    """

    def __init__(
        self, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = scales
        self.bias = bias
        self.dtype = dtype

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: [..., in].  Returns [..., out]."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        product = self._few if len(rows) <= _FEW_ROWS and self._is_multiplied else self._many
        output = product(rows)
        output = output if self.bias is None else output + self.bias
        return output.view(*inputs.shape[:-1], -1)

    @property
    def _is_multiplied(self) -> bool:
        """Whether PyTorch multiplies with int8 weights of this size; others crash it."""
        num_outputs, num_inputs = self.weight.shape
        known = self.dtype in (torch.bfloat16, torch.float32)
        return known and num_outputs % 16 == 0 and num_inputs % 32 == 0

    def _few(self, rows: Tensor) -> Tensor:
        ones = rows.new_ones(len(self.weight))
        output: Tensor = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, ones)
        return (output * self.scales).to(self.dtype)

    def _many(self, rows: Tensor) -> Tensor:
        output = rows.new_empty(len(rows), len(self.weight))
        step = max(1, _BLOCK_NUMBERS // self.weight.shape[1])
        for start in range(0, len(self.weight), step):
            block = slice(start, start + step)
            output[:, block] = F.linear(rows, self._widened(block))
        return output if self._is_half else output.mul_(self.scales)

    @property
    def _is_half(self) -> bool:
        """Whether numbers are float16, which has no room for a sum that is not scaled yet."""
        return self.dtype == torch.float16

    def _widened(self, block: slice) -> Tensor:
        """Some of the levels; the weights that they stand for in float16."""
        levels = self.weight[block]
        if self._is_half:
            return dequantized(levels, self.scales[block], self.dtype)
        return levels.to(self.dtype)


class Int8Embedding(nn.Module):
    """Embeddings whose table is int8.

    embedding: looks up what it is given, and may scale it; its own table is taken away.
    weight: int8 [tokens, hidden_size], or packed.  scales: float32 [tokens].
    """

    def __init__(self, embedding: nn.Embedding, weight: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.dtype = embedding.weight.dtype
        self.num_embeddings = embedding.num_embeddings
        del embedding.weight
        embedding.padding_idx = None  # matters to training only
        self.embedding = embedding
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = scales

    def restore_scale(self) -> None:
        """Set the factor that a family's embeddings have, which is in no file."""
        scale = getattr(self.embedding, "scalar_embed_scale", None)
        if scale is not None:
            self.embedding.embed_scale = torch.tensor(scale, device=self.weight.device)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: int64.  Returns [*token_ids.shape, hidden_size]."""
        flat = token_ids.flatten()
        is_packed = self.weight.ndim > 2
        levels = rows_of(self.weight, flat) if is_packed else self.weight[flat]
        rows = dequantized(levels, self.scales[flat], self.dtype)
        places = torch.arange(len(flat), device=flat.device).view(token_ids.shape)
        return functional_call(self.embedding, {"weight": rows}, (places,))  # type: ignore[no-any-return]
