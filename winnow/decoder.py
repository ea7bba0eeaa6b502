"""A Hugging Face decoder that is run layer by layer.

`DecoderModel` runs embedding → rotary tables → layers → norm → LM head itself, so that a caller can
pause and drop tokens between two layers. The caller passes an `AttentionCall` with each layer
(winnow/attention/), which computes its attention.
"""

import torch
from torch import Tensor, nn

from winnow.adapters.rows import applied_rows
from winnow.adapters.slots import AdapterSlots
from winnow.attention import AttentionCall, PrefillAttention, attending
from winnow.fused_layer import FusedLayer
from winnow.kv import ModelShape
from winnow.layer_state import LayerState
from winnow.methods.base import LayerView
from winnow.model_files import ModelDescription
from winnow.network import Network
from winnow.rotary import RotaryTables

MLP_BLOCK_TOKENS = 2048


class TokenBlocks(nn.Module):
    """Runs an MLP over blocks of tokens, to bound the memory of its inner activations.

    Of an MLP that returns more than its output, such as what its router says, None stands for it.
    """

    def __init__(self, mlp: nn.Module, block_tokens: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.block_tokens = block_tokens

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, None]:
        """hidden: [B, T, hidden_size].  Returns the same shape, alone or with None."""
        rows = applied_rows()
        is_mixed = rows is not None and rows.slot is None  # tokens of one decode step: not many
        if is_mixed or hidden.shape[0] * hidden.shape[1] <= self.block_tokens:
            return self.mlp(hidden)  # type: ignore[no-any-return]
        output = torch.empty_like(hidden)
        has_more = False
        tokens, out = hidden.flatten(0, 1), output.flatten(0, 1)  # [B * T, hidden_size]
        for start in range(0, len(tokens), self.block_tokens):
            block = slice(start, start + self.block_tokens)
            # With [None]'s strides, linear layers use the plain matrix product; a slice of the 3-D
            # tensor would use the batched one, which takes twice as long.
            of_block = self.mlp(tokens[block][None])
            has_more = isinstance(of_block, tuple)
            out[block] = (of_block[0] if has_more else of_block)[0]
        return (output, None) if has_more else output


class DecoderModel:
    """A loaded model. Stateless between calls; its inputs and outputs are on `device`.

    shape: of what it computes: with fewer heads than the description's on a rank of several.
    adapters: those that `layer` computes with inside of `applied`; None: it was loaded without
    room for any.
    """

    adapters: AdapterSlots | None = None

    def __init__(
        self,
        model: Network,
        description: ModelDescription,
        device: torch.device,
        shape: ModelShape | None = None,
    ) -> None:
        self._model = model
        self.description = description
        self.device = device
        self.shape = shape or description.shape

    @property
    def network(self) -> Network:
        return self._model

    @property
    def memory_bytes(self) -> int:
        """GPU memory allocated to this process's tensors; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    @property
    def num_adapters(self) -> int:
        """Adapters that are in slots now."""
        return 0 if self.adapters is None else len(self.adapters.loaded)

    @property
    def fingerprint(self) -> str:
        return self.description.fingerprint

    @property
    def vocab_size(self) -> int:
        return self.description.vocab_size

    @property
    def max_positions(self) -> int:
        return self.description.max_positions

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self.description.eos_token_ids

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids: [B, T] int64.  Returns hidden states [B, T, hidden_size]."""
        return self._model.embed(token_ids)

    @torch.inference_mode()
    def rope(self, positions: Tensor, token_ids: Tensor | None = None) -> RotaryTables:
        """Rotary tables for the positions [B, T] int64, with LONG added for the long ones.

        token_ids: [B, T] of the tokens there, for families whose layers take inputs of their own.
        """
        return self._model.rope(positions, self.shape.dtype, token_ids)

    def share(self, layer_idx: int, rope: RotaryTables, attention: PrefillAttention) -> None:
        """Keep the keys and values of the layer that was computed last for those that share them.

        rope: of all tokens that `attention` has keys of.
        """
        kind = self._model.sharing_kinds.get(layer_idx)
        if kind is not None and rope.extras is not None:
            rope.extras.shared[kind] = (attention.keys[None], attention.values[None])

    def new_state(self, layer_idx: int) -> LayerState | None:
        """The layer's state before the first token; None if it has none."""
        return LayerState() if self.shape.layers[layer_idx].is_recurrent else None

    def layer(
        self,
        layer_idx: int,
        hidden: Tensor,
        rope: RotaryTables,
        attention: AttentionCall,
        state: LayerState | None = None,
    ) -> Tensor:
        """Run one decoder layer with `attention`.  hidden and the result: [B, T, hidden_size].

        rope: of the same tokens.
        state: of the B sequences, which T tokens more change; None for a layer without.
        """
        layer = self._model.model.layers[layer_idx]
        if isinstance(layer, FusedLayer):
            return layer.forward(hidden, self._model.table(layer_idx, rope), attention)
        attention = self._model.tempered(layer_idx, rope, attention)
        with attending(attention, self.shape.layers[layer_idx]):
            return self._model.run_layer(layer_idx, hidden, rope, past_key_values=state)

    def view(self, layer_idx: int, attention: PrefillAttention, window_size: int) -> LayerView:
        """What a method sees of the layer that was computed last, with this attention."""
        return LayerView(
            layer_idx,
            attention.keys,
            attention.queries,
            attention.options,
            window_size,
            attention.positions,
        )

    def newest_entries(self, attention: PrefillAttention, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the last tokens of the layer that was computed last.

        Each [num_kv_heads, num_tokens, numbers].
        """
        return attention.keys[:, -num_tokens:], attention.values[:, -num_tokens:]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head.  hidden: [B, hidden_size].  Returns [B, vocab_size] float32."""
        return self._model.scales.scaled(self._model.head_outputs(hidden)).float()
