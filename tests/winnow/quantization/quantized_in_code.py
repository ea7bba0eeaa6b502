"""Tiny quantized checkpoints, made by each format's formulas and packed number by number."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each 4 bits of a word belong to


@dataclass(frozen=True)
class Made:
    """parts: a weight's tensors by the ends of their names.  weight: what they stand for."""

    parts: Tensors
    weight: Tensor


def packed(numbers: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """numbers: int64, not negative.  Returns int32 with 32 / bits of them in each, along `dim`."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    moved = numbers.movedim(dim, -1)
    words = torch.zeros(*moved.shape[:-1], moved.shape[-1] // per_word, dtype=torch.int64)
    for place, idx in enumerate(order):
        words |= moved[..., idx::per_word] << (bits * place)
    return (words - (words >= 2**31) * 2**32).to(torch.int32).movedim(-1, dim).contiguous()


def _levels(shape: tuple[int, ...], bits: int) -> Tensor:
    return torch.randint(0, 2**bits, shape)


def gptq(weight: Tensor, *, bits: int = 4, offset: int = 1, act_order: bool = False) -> Made:
    num_outputs, num_inputs = weight.shape
    size = 16
    levels = _levels((num_inputs, num_outputs), bits)
    zeros = _levels((num_inputs // size, num_outputs), bits)
    scales = (torch.rand(zeros.shape) / 2**bits).half()
    groups = torch.arange(num_inputs) // size
    if act_order:
        groups = groups[torch.randperm(num_inputs)]
    parts = {
        ".qweight": packed(levels, bits, 0),
        ".qzeros": packed((zeros - offset) % 2**bits, bits, 1),
        ".scales": scales,
    }
    if act_order:
        parts[".g_idx"] = groups.to(torch.int32)
    return Made(parts, ((levels - zeros[groups]) * scales[groups].float()).T)


def awq(weight: Tensor) -> Made:
    num_outputs, num_inputs = weight.shape
    levels = _levels((num_inputs, num_outputs), 4)
    zeros = _levels((num_inputs // 32, num_outputs), 4)
    scales = (torch.rand(zeros.shape) / 16).half()
    groups = torch.arange(num_inputs) // 32
    parts = {
        ".qweight": packed(levels, 4, 1, AWQ_ORDER),
        ".qzeros": packed(zeros, 4, 1, AWQ_ORDER),
        ".scales": scales,
    }
    return Made(parts, ((levels - zeros[groups]) * scales[groups].float()).T)


def int8_channels(weight: Tensor) -> Made:
    scales = weight.abs().amax(1, keepdim=True) / 127
    levels = (weight / scales).round()
    parts = {".weight": levels.to(torch.int8), ".weight_scale": scales}
    parts[".input_scale"] = torch.ones(1)
    return Made(parts, levels * scales)


def fp8_tensor(weight: Tensor) -> Made:
    scale = weight.abs().amax() / 448
    levels = (weight / scale).to(torch.float8_e4m3fn)
    return Made({".weight": levels, ".weight_scale": scale[None]}, levels.float() * scale)


def fp8_alone(weight: Tensor) -> Made:
    """As AutoFP8 writes it: one scale, and those of activations and of the cache."""
    made = fp8_tensor(weight)
    made.parts[".weight_scale"] = made.parts[".weight_scale"][0]
    others = {end: torch.tensor(1.0) for end in (".input_scale", ".kv_scale", ".k_scale")}
    return Made(made.parts | others, made.weight)


def pack_quantized(weight: Tensor, *, zeros_as: torch.dtype | None = None) -> Made:
    num_outputs, num_inputs = weight.shape
    levels = _levels((num_outputs, num_inputs), 4) - 8
    scales = torch.rand(num_outputs, num_inputs // 32) / 8
    groups = torch.arange(num_inputs) // 32
    parts = {
        ".weight_packed": packed(levels + 8, 4, 1),
        ".weight_shape": torch.tensor([num_outputs, num_inputs]),
        ".weight_scale": scales,
    }
    if zeros_as is not None:
        zeros = _levels((num_outputs, num_inputs // 32), 4) - 8
        is_packed = zeros_as == torch.int32
        parts[".weight_zero_point"] = packed(zeros + 8, 4, 0) if is_packed else zeros.to(zeros_as)
        levels = levels - zeros[:, groups]
    return Made(parts, levels * scales[:, groups])


def fp8_blocks(weight: Tensor) -> Made:
    """Blocks of 48, which divide nothing here evenly."""
    num_outputs, num_inputs = weight.shape
    scales = torch.rand(-(-num_outputs // 48), -(-num_inputs // 48)) / 100
    of_each = scales[torch.arange(num_outputs) // 48][:, torch.arange(num_inputs) // 48]
    levels = (weight / of_each).clamp(-448, 448).to(torch.float8_e4m3fn)
    parts = {".weight": levels, ".weight_scale_inv": scales}
    return Made(parts, levels.float() * of_each)


def bnb_int8(weight: Tensor) -> Made:
    largest = weight.abs().amax(1)
    levels = (weight * 127 / largest[:, None]).round()
    parts = {".weight": levels.to(torch.int8), ".SCB": largest}
    parts[".weight_format"] = torch.tensor(0, dtype=torch.uint8)
    return Made(parts, levels * largest[:, None] / 127)


def bnb_nf4(weight: Tensor, *, is_nested: bool = False, storage: torch.dtype = torch.uint8) -> Made:
    numbers = torch.linspace(-1, 1, 16)
    indices = _levels((weight.numel(),), 4)
    num_blocks = weight.numel() // 64
    state: dict[str, Any] = {"blocksize": 64, "shape": [*weight.shape], "dtype": "bfloat16"}
    parts = {
        ".weight": (indices[0::2] << 4 | indices[1::2]).to(torch.uint8).view(storage)[:, None],
        ".weight.quant_map": numbers,
    }
    if is_nested:
        inner, largest_of_inner = torch.rand(256), torch.rand(-(-num_blocks // 4))
        stored = torch.randint(0, 256, (num_blocks,), dtype=torch.uint8)
        state |= {"nested_blocksize": 4, "nested_offset": 0.125}
        largest = inner[stored.long()] * largest_of_inner[torch.arange(num_blocks) // 4] + 0.125
        parts |= {".weight.absmax": stored, ".weight.nested_quant_map": inner}
        parts[".weight.nested_absmax"] = largest_of_inner
    else:
        largest = torch.rand(num_blocks)
        parts[".weight.absmax"] = largest
    text = torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)
    parts[".weight.quant_state.bitsandbytes__nf4"] = text
    values = numbers[indices] * largest[torch.arange(len(indices)) // 64]
    return Made(parts, values.view(weight.shape))


def mxfp4(experts: Tensor) -> Made:
    """experts: [experts, in, out]."""
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat([positive, -positive])
    num_experts, num_inputs, num_outputs = experts.shape
    indices = _levels((num_experts, num_outputs, num_inputs), 4)
    exponents = torch.randint(-6, 2, (num_experts, num_outputs, num_inputs // 32))
    stored = (indices[..., 0::2] | indices[..., 1::2] << 4).to(torch.uint8)
    parts = {
        "_blocks": stored.view(num_experts, num_outputs, -1, 16),
        "_scales": (exponents + 127).to(torch.uint8),
    }
    values = numbers[indices] * 2.0 ** exponents.repeat_interleave(32, -1)
    return Made(parts, values.transpose(1, 2))


def save_quantized(
    plain: Path, folder: Path, config: dict[str, Any], make: Callable[[Tensor], Made]
) -> Path:
    """Quantize the layers' matrices of the model in `plain`, or stacks of them, into `folder`.

    `plain` becomes the model of the same, dequantized weights.
    """
    torch.manual_seed(1)
    tensors = load_file(plain / "model.safetensors")
    quantized, dequantized = {}, {}
    for name, tensor in tensors.items():
        if ".layers." not in name or tensor.ndim < 2 or name.endswith("_bias"):
            quantized[name] = dequantized[name] = tensor
            continue
        made = make(tensor.float())
        prefix = name.removesuffix(".weight")
        quantized |= {prefix + end: part.contiguous() for end, part in made.parts.items()}
        dequantized[name] = made.weight.reshape(tensor.shape).to(tensor.dtype).contiguous()
    folder.mkdir()
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    text = json.dumps(settings | {"quantization_config": config})
    (folder / "config.json").write_text(text)
    save_file(quantized, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(dequantized, plain / "model.safetensors", metadata={"format": "pt"})
    return folder
