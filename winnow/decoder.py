"""A Hugging Face decoder that is run layer by layer.

`DecoderModel` runs embedding → rotary tables → layers → norm → LM head itself, so that a caller can
pause and drop tokens between two layers. The caller passes an `AttentionCall` with each layer
(winnow/attention/), which computes its attention.
"""

from typing import Any

import torch
from torch import Tensor, nn

from winnow.attention import AttentionCall
from winnow.kv import ModelShape
from winnow.model_files import ModelDescription

# Cosines and sines of the rotary embedding, each [B, T, head_dim].
Rope = tuple[Tensor, Tensor]


class TokenBlocks(nn.Module):
    """Runs an MLP over blocks of tokens, to bound the memory of its inner activations."""

    def __init__(self, mlp: nn.Module, block_tokens: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.block_tokens = block_tokens

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [B, T, hidden_size].  Returns the same shape."""
        if hidden.shape[0] * hidden.shape[1] <= self.block_tokens:
            return self.mlp(hidden)  # type: ignore[no-any-return]
        output = torch.empty_like(hidden)
        tokens, out = hidden.flatten(0, 1), output.flatten(0, 1)  # [B * T, hidden_size]
        for start in range(0, len(tokens), self.block_tokens):
            block = slice(start, start + self.block_tokens)
            # With [None]'s strides, linear layers use the plain matrix product; a slice of the 3-D
            # tensor would use the batched one, which takes twice as long.
            out[block] = self.mlp(tokens[block][None])[0]
        return output


class DecoderModel:
    """A loaded model. Stateless between calls; its inputs and outputs are on `device`."""

    def __init__(self, model: Any, description: ModelDescription, device: torch.device) -> None:  # noqa: ANN401
        self._model = model
        self.description = description
        self.device = device

    @property
    def shape(self) -> ModelShape:
        return self.description.shape

    @property
    def memory_bytes(self) -> int:
        """GPU memory allocated to this process's tensors; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

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
        return self._model.model.embed_tokens(token_ids)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def rope(self, positions: Tensor) -> Rope:
        """Rotary tables for the positions [B, T] int64."""
        like = torch.empty(0, dtype=self.shape.dtype, device=self.device)
        return self._model.model.rotary_emb(like, positions)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def layer(self, layer_idx: int, hidden: Tensor, rope: Rope, attention: AttentionCall) -> Tensor:
        """Run one decoder layer with `attention`.  hidden and the result: [B, T, hidden_size]."""
        output = self._model.model.layers[layer_idx](
            hidden, attention_mask=None, position_embeddings=rope, attention_call=attention
        )
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head.  hidden: [B, hidden_size].  Returns [B, vocab_size] float32."""
        return self._model.lm_head(self._model.model.norm(hidden)).float()  # type: ignore[no-any-return]
