"""What transformers itself computes, for comparison."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def load(path: Path, attention: str = "sdpa") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention)


@torch.no_grad()
def greedy(model: PreTrainedModel, token_ids: Sequence[int], num_new: int) -> list[int]:
    """The greedy continuation by `generate`; end tokens are ordinary ones."""
    prompt = torch.tensor([token_ids])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(token_ids) :].tolist()


@torch.no_grad()
def attention_masses(model: PreTrainedModel, token_ids: Sequence[int], window: int) -> list[Tensor]:
    """Each layer's attention summed over the last `window` rows: [num_heads, num_tokens].

    The model must have been loaded with eager attention.
    """
    outputs = model(torch.tensor([token_ids]), output_attentions=True)
    return [layer[0, :, -window:].sum(1) for layer in outputs.attentions]
