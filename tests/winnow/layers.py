"""A loaded model's layers beside transformers'."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from winnow.attention import ATTENTION_NAME, AttentionOptions, attending, causal_attention
from winnow.decoder import DecoderModel
from winnow.fused_layer import FusedLayer

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.03}


def attend(_: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    return causal_attention(query, key, value, options)


def theirs(path: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=ATTENTION_NAME
    )


@torch.inference_mode()
def assert_same_layers(model: DecoderModel, network: Any, batch: int, num_tokens: int) -> None:
    """Each layer, on the input that transformers' layers before it make."""
    positions = torch.arange(num_tokens).repeat(batch, 1)
    hidden, rope = model.embed(positions * 7 % model.vocab_size), model.rope(positions)
    (table,) = rope.by_kind.values()
    for idx, layer in enumerate(network.model.layers):
        ours = model.layer(idx, hidden, rope, attend)
        with attending(attend, model.shape.layers[idx]):
            hidden = layer(hidden, attention_mask=None, position_embeddings=table)
        error = (ours - hidden).float().abs().max() / hidden.float().abs().max()
        assert error <= TOLERANCES[hidden.dtype]
    ours, logits = model.logits(hidden[:, -1]), network.lm_head(network.model.norm(hidden[:, -1]))
    error = (ours - logits.float()).abs().max() / logits.float().abs().max()
    assert error <= TOLERANCES[hidden.dtype]


def is_fused(model: DecoderModel) -> bool:
    return all(isinstance(layer, FusedLayer) for layer in model._model.model.layers)
