"""A model out of a GGUF file is the model that its folder of safetensors holds."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from tests.gguf_in_code import write_gguf
from tests.models_in_code import FAMILIES
from tests.winnow.checkpoints import SIZES, save
from winnow import SamplingParams, Winnow
from winnow.model_files import describe_model

TEXT = "the quick brown fox jumps over the lazy dog 12345 " * 8
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
CHAT = [{"role": "user", "content": "the quick <|end|> fox"}]


def answers(model: Path) -> tuple[object, ...]:
    """What a prompt is in tokens, and the answers to it, pruned and unpruned."""
    pruned = Winnow.load(model, window_size=4, select_tokens=64, kv_budget=64, min_layer=1)
    whole = Winnow.load(model, method="full")
    token_ids = pruned.tokenizer.encode(TEXT)
    return (
        token_ids,
        pruned.tokenizer.render_chat(CHAT),
        pruned.model.eos_token_ids,
        pruned.generate(token_ids, GREEDY).token_ids,
        whole.generate(token_ids, GREEDY).token_ids,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_folder(
    tiny_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_models[family])
    assert answers(file) == answers(tiny_models[family])


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=32),
        LlamaConfig(**SIZES, tie_word_embeddings=True),
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        Qwen3MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, head_dim=16,  # type: ignore[call-arg]
            norm_topk_prob=True,
        ),
        Olmo2Config(**SIZES, eos_token_id=0, pad_token_id=0),
        SmolLM3Config(**SIZES, pad_token_id=0, eos_token_id=0, bos_token_id=0),
    ],
    ids=["llama-biases", "llama-tied", "mixtral", "qwen3_moe", "olmo2", "smollm3"],
)  # fmt: skip
def test_answers_of_further_families_are_those_of_the_folder(
    tmp_path: Path, config: PreTrainedConfig
) -> None:
    config.eos_token_id = 0
    folder = save(tmp_path / "folder", config)
    assert answers(write_gguf(tmp_path / "model.gguf", folder)) == answers(folder)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_1, Kind.Q4_0])
def test_quantized_weights_are_what_the_package_gguf_makes_of_them(
    tiny_models: dict[str, Path], tmp_path: Path, kind: Kind
) -> None:
    folder = Path(shutil.copytree(tiny_models["qwen2"], tmp_path / "folder"))
    rounded = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        own = kind if tensor.ndim > 1 else Kind.F32
        numbers = gguf.dequantize(gguf.quantize(tensor.numpy(), own), own)
        rounded[name] = torch.tensor(numbers).to(torch.bfloat16)
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    file = write_gguf(tmp_path / "model.gguf", tiny_models["qwen2"], kind=kind)
    assert describe_model(file).shape.dtype == torch.bfloat16
    assert answers(file) == answers(folder)


def test_a_model_in_several_files_is_one(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    folder, later = tiny_models["qwen2"], tuple(f"blk.{i}" for i in (2, 3))
    names = write_gguf(tmp_path / "whole.gguf", folder)
    tensors = [tensor.name for tensor in gguf.GGUFReader(names).tensors]
    in_second = tuple(name for name in tensors if name.startswith(later))
    in_first = tuple(name for name in tensors if name not in in_second)
    write_gguf(first, folder, leave_out=in_second, split__tensors__count=len(tensors))
    write_gguf(second, folder, leave_out=in_first)
    names.unlink()
    assert answers(first) == answers(tmp_path) == answers(folder)
