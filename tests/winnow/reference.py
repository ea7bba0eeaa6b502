"""What transformers itself computes, for comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def load(path: Path, attention: str = "sdpa") -> Any:
    """A PreTrainedModel; transformers' own types do not know what can be called of it."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention)


@torch.no_grad()
def greedy(model: Any, token_ids: Sequence[int], num_new: int) -> list[int]:
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


@torch.no_grad()
def last_query_scores(path: Path, token_ids: Sequence[int]) -> list[Tensor]:
    """Each layer's q·k of the last query, before scaling and softmax: [num_heads, num_tokens]."""
    scores = []

    def record(module: Any, query: Tensor, key: Tensor, *rest: Any, **more: Any) -> Any:
        keys = key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
        scores.append((query[0, :, -1:] @ keys.mT)[:, 0])
        return sdpa_attention_forward(module, query, key, *rest, **more)

    AttentionInterface.register("recording", record)
    load(path, "recording")(torch.tensor([token_ids]))
    return scores
