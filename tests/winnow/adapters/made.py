"""Random LoRA adapters as PEFT saves them, and transformers' model with one merged into it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.winnow import reference

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_adapter(
    folder: Path,
    model: Path,
    *,
    rank: int = 4,
    seed: int = 1,
    targets: Sequence[str] = TARGETS,
    tensors: Mapping[str, Tensor | None] | None = None,
    **config: Any,
) -> Path:
    """A random adapter of the model in `folder`; returns `folder`.

    tensors: by their names in the file, to be there in place of the random ones; None: absent.
    """
    generator = torch.Generator().manual_seed(seed)
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "bias": "none",
    } | config
    saved: dict[str, Tensor] = {}
    for name, linear in linears(reference.load(model)).items():
        if not any(name.endswith(f".{target}") for target in targets):
            continue
        own = _pattern(content.get("rank_pattern"), name, rank)
        for side, size in (("A", (own, linear.in_features)), ("B", (linear.out_features, own))):
            key = f"base_model.model.{name}.lora_{side}.weight"
            saved[key] = torch.randn(size, generator=generator) * 0.3
    changed = {**saved, **(tensors or {})}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(content))
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, folder / "adapter_model.safetensors")
    return folder


def merged(model: Path, adapter: Path) -> Any:
    """The network of transformers with W + scale * B A in the place of each adapted W."""
    network = reference.load(model)
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    for name, linear in linears(network).items():
        down = weights.get(f"base_model.model.{name}.lora_A.weight")
        if down is None:
            continue
        alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        divisor = math.sqrt(len(down)) if config.get("use_rslora") else len(down)
        up = weights[f"base_model.model.{name}.lora_B.weight"]
        linear.weight.data += ((alpha / divisor) * (up @ down)).to(linear.weight.dtype)
    return network


def linears(network: Any) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and "layers." in name
    }


def _pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    return next((v for k, v in (patterns or {}).items() if re.search(rf"{k}$", name)), default)
