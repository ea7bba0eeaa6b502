"""Models for the benchmarks: the embedded one, and random ones saved to disk in real shapes."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

_ROOT = Path(__file__).parents[1]
EMBEDDED = _ROOT / "models" / "winnow-tiny"
REAL_MODEL = _ROOT / "real-models" / "smollm2"  # there after `make real-model`

# The sizes of Qwen2.5-0.5B, with a smaller vocabulary: the LM head is not what is measured.
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


def model_path(name: str, folder: Path, **changes: Any) -> Path:  # noqa: ANN401 - of HALF_BILLION
    """Path of a model: `tiny` is the embedded one; `0.5b` a random bfloat16 one saved in `folder`.

    The tokenizer of the random one knows bytes and numbers.
    """
    if name == "tiny":
        return EMBEDDED
    path = folder / name
    if not path.exists():
        torch.manual_seed(0)
        config = HALF_BILLION | changes
        model: Any = Qwen2ForCausalLM(Qwen2Config(**config))
        model.to(torch.bfloat16).save_pretrained(path)
        _save_tokenizer(path, config["vocab_size"])
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
