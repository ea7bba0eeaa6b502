"""Random models in the shape of real ones, written to disk once per run as users load theirs."""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from winnow.local import DEFAULT_MODEL

# Qwen2.5-0.5B's sizes; the vocabulary is cut, since the LM head is not what is measured.
HALF_BILLION: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}


def model_path(name: str, folder: Path) -> Path:
    """`tiny`: the embedded model; `0.5b`: a random bfloat16 one, saved below `folder`."""
    if name == "tiny":
        return DEFAULT_MODEL
    path = folder / name
    if not path.exists():
        torch.manual_seed(0)
        model: Any = Qwen2ForCausalLM(Qwen2Config(**HALF_BILLION))
        model.to(torch.bfloat16).save_pretrained(path)
    return path
