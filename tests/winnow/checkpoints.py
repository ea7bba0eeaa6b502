"""Checkpoints of any configuration, saved to disk and checked."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.models_in_code import save_byte_tokenizer
from winnow.checkpoint import open_checkpoint, require_sound
from winnow.model_files import describe_model

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS: dict[str, Any] = SIZES | {
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "pad_token_id": 0,
}


def save(folder: Path, config: object) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def check(path: Path) -> None:
    require_sound(open_checkpoint(describe_model(path)))
