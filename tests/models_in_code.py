"""Tiny random decoders, built in code and saved to disk as users load theirs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    Gemma4TextConfig,
    Lfm2Config,
    LlamaConfig,
    MiMoV2FlashConfig,
    MistralConfig,
    NemotronHConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

VOCAB_SIZE = 320
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
# With layers that have a state in the place of keys and values, or (falcon_h1) beside them.
RECURRENT_FAMILIES = ("lfm2", "qwen3_next", "qwen3_5", "bamba", "falcon_h1", "nemotron_h")
_LINEAR: dict[str, Any] = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "pad_token_id": 0,
}
# Layers whose keys and values are of several sizes.
SIZED_FAMILIES = ("gemma4", "gemma4_experts", "gemma4_sharing", "mimo_v2_flash")
_WINDOWS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 20,
    "pad_token_id": 0,
}
_GEMMA4: dict[str, Any] = _WINDOWS | {
    "head_dim": 32,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "phi3": (Phi3Config, {"pad_token_id": 0}),
    "lfm2": (
        Lfm2Config,
        {
            "layer_types": ["conv", "full_attention"] * 2,
            "block_auto_adjust_ff_dim": False,
            "pad_token_id": 0,
        },
    ),
    "qwen3_next": (Qwen3NextConfig, _LINEAR | _EXPERTS),
    "qwen3_5": (Qwen3_5TextConfig, _LINEAR),
    "bamba": (BambaConfig, _MAMBA | {"attn_layer_indices": [1, 3]}),
    "falcon_h1": (FalconH1Config, _MAMBA | {"mamba_d_ssm": 128}),
    "gemma4": (Gemma4TextConfig, _GEMMA4),
    "gemma4_experts": (
        Gemma4TextConfig,
        _GEMMA4
        | {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "gemma4_sharing": (  # whose layers also take inputs of each token's own
        Gemma4TextConfig,
        _GEMMA4
        | {
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
    ),
    "mimo_v2_flash": (
        MiMoV2FlashConfig,
        _WINDOWS
        | {
            "head_dim": 24,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "nemotron_h": (  # a layer is attention, a state, or an MLP
        NemotronHConfig,
        {
            "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
            "head_dim": 16,
            "pad_token_id": 0,
        },
    ),
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    cls, own = _CONFIGS[family]
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return cls(**(sizes | own | changes))


def long_rope(original: int) -> dict[str, Any]:
    """Settings of a model with other tables for sequences of more than `original` tokens."""
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [4.0] * 8}
    kind = {"rope_type": "longrope", "rope_theta": 10_000.0}
    rope = {**kind, **factors, "original_max_position_embeddings": original}
    return {"rope_parameters": rope, "original_max_position_embeddings": original}


def save_tiny_model(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A random model of the family in `folder`, with a byte-level tokenizer; returns `folder`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # larger than usual, so that greedy choices are clear-cut
            torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    model.to(dtype).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def save_byte_tokenizer(
    folder: Path,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    chat_template: str = CHAT_TEMPLATE,
) -> None:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens, of which the first one ends an answer."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 4], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special_tokens[0])
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def save_sentencepiece_tokenizer(folder: Path) -> None:
    """One of the kind of Llama 2, Mistral and Phi3: ▁ for a space, <0x41> for a byte."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thequick", "th", "qu"]
    vocab = {token: idx for idx, token in enumerate(dict.fromkeys(tokens))}
    merges = [("t", "h"), ("q", "u")]
    backend = Tokenizer(BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
