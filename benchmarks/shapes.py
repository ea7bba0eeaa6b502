"""Random models in the shape of real ones, written to disk once per run as users load theirs."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

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
    """`tiny`: the embedded model; `0.5b`: a random bfloat16 one, saved below `folder`.

    The random one's tokenizer knows bytes and numbers.
    """
    if name == "tiny":
        return DEFAULT_MODEL
    path = folder / name
    if not path.exists():
        torch.manual_seed(0)
        model: Any = Qwen2ForCausalLM(Qwen2Config(**HALF_BILLION))
        model.to(torch.bfloat16).save_pretrained(path)
        _save_tokenizer(path, HALF_BILLION["vocab_size"])
    return path


def _save_tokenizer(path: Path, vocab_size: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġ{idx}" for idx in range(vocab_size - len(alphabet))]  # Ġ is a space
    vocabulary = {token: idx for idx, token in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer).save_pretrained(path)
