"""GGUF files as llama.cpp's own converter writes them, made from tiny models on disk."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models_in_code import CHAT_TEMPLATE

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
_PAIRED = {"llama", "mistral", "mixtral", "smollm3"}
_GEMMAS = {"gemma", "gemma2", "gemma3_text"}
_CONTROL, _NORMAL = 3, 1


def write_gguf(
    file: Path,
    folder: Path,
    *,
    kind: Kind = Kind.F32,
    leave_out: tuple[str, ...] = (),
    tensors: dict[str, np.ndarray] | None = None,
    **values: Any,
) -> Path:
    """The model of `folder`, with matrices of `kind`.

    leave_out: names of values or tensors.  tensors: further ones.  values: further ones, or others,
    with __ for a dot; {arch} stands for the architecture.
    """
    config = AutoConfig.from_pretrained(folder)
    architecture = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(file, architecture)
    own = _network_values(config) | _token_values(folder, config)
    changes = {name.replace("__", "."): value for name, value in values.items()}
    for name, value in {**own, **changes}.items():
        if name not in leave_out:
            _add(writer, name.replace("{arch}", architecture), value)
    for name, tensor in {**_tensors(config, folder), **(tensors or {})}.items():
        if name not in leave_out:
            quantized = kind if tensor.ndim > 1 else Kind.F32
            data = gguf.quantize(tensor, quantized)
            writer.add_tensor(name, data, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _network_values(config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "{arch}.context_length": config.max_position_embeddings,
        "{arch}.block_count": config.num_hidden_layers,
        "{arch}.embedding_length": config.hidden_size,
        "{arch}.feed_forward_length": config.intermediate_size,
        "{arch}.attention.head_count": config.num_attention_heads,
        "{arch}.attention.head_count_kv": config.num_key_value_heads,
        "{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "{arch}.attention.key_length": head_dim,
        "{arch}.attention.value_length": head_dim,
        "{arch}.rope.dimension_count": head_dim,
        "{arch}.rope.freq_base": float(_rope(config)["rope_theta"]),
        "{arch}.vocab_size": config.vocab_size,
        "general.file_type": 0,
    }
    for name in ("num_experts", "num_local_experts"):
        if hasattr(config, name):
            values["{arch}.expert_count"] = getattr(config, name)
            values["{arch}.expert_used_count"] = config.num_experts_per_tok
    if hasattr(config, "moe_intermediate_size"):
        values["{arch}.expert_feed_forward_length"] = config.moe_intermediate_size
    if config.model_type in _GEMMAS - {"gemma"}:
        values["{arch}.attention.sliding_window"] = config.sliding_window
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            values[f"{{arch}}.{name}"] = float(getattr(config, name) or 0)
    return values


def _rope(config: Any) -> dict[str, Any]:
    """Of full layers, where layers differ."""
    rope: dict[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)


def _token_values(folder: Path, config: Any) -> dict[str, Any]:
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    ids = {i: text for text, i in content["model"]["vocab"].items()} | added
    tokens = [ids.get(i, f"[PAD{i}]") for i in range(config.vocab_size)]
    byte_level = not content["model"]["byte_fallback"]
    values = {
        "tokenizer.ggml.model": "gpt2" if byte_level else "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            _CONTROL if i in added else _NORMAL for i in range(len(tokens))
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    return values | ({"tokenizer.ggml.pre": "gpt-2"} if byte_level else {})


def _tensors(config: Any, folder: Path) -> dict[str, np.ndarray]:
    """By gguf's own table of names; what llama.cpp's converter moves about is moved as it does."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = gguf.get_tensor_name_map(_architecture(config), config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    tied = config.tie_word_embeddings
    for name, tensor in network.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        data = tensor.numpy()
        layer = name.partition(".mlp.experts.")[0].replace("model.layers.", "blk.")
        if name.endswith("experts.gate_up_proj"):
            half = data.shape[1] // 2
            found[f"{layer}.ffn_gate_exps.weight"] = data[:, :half].copy()
            found[f"{layer}.ffn_up_exps.weight"] = data[:, half:].copy()
            continue
        if name.endswith("experts.down_proj"):
            found[f"{layer}.ffn_down_exps.weight"] = data
            continue
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own is not None, name
        if config.model_type in _PAIRED and (".attn_q." in own or ".attn_k." in own):
            heads = config.num_attention_heads if ".attn_q." in own else config.num_key_value_heads
            shape = data.shape
            data = data.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape).copy()
        if config.model_type in _GEMMAS and own.endswith("norm.weight"):
            data = data + 1
        found[own] = data
    return found


def _architecture(config: Any) -> gguf.MODEL_ARCH:
    wanted = ARCHITECTURES[config.model_type]
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
