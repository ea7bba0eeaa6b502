"""Whatever a folder holds, there is a model that runs, or one line that says why not."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BloomConfig,
    FalconConfig,
    JetMoeConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
    T5Config,
)

from tests.winnow.checkpoints import SIZES, save
from winnow import SamplingParams, Winnow
from winnow.errors import UnusableModel
from winnow.model_files import describe_model

GREEDY = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A tiny Llama that may be spoilt."""
    return Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))


def refusal(folder: Path) -> str:
    with pytest.raises(UnusableModel) as caught:
        Winnow.load(folder)
    reason = str(caught.value)
    assert "\n" not in reason
    return reason


def change(folder: Path, file: str, **changes: object) -> Path:
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2), "no attention heads"),
        (BertConfig(**SIZES, is_decoder=True), "Winnow cannot run bert: it is an encoder"),
        (BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4), "distances (ALiBi)"),
        (FalconConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
         "Winnow cannot run falcon: it computes its attention itself"),
        (MptConfig(vocab_size=320, d_model=64, n_layers=2, n_heads=4), "distances (ALiBi)"),
        (JetMoeConfig(**SIZES, kv_channels=16), "cannot run jetmoe: its queries, keys and values"),
        (Qwen3NextConfig(**SIZES, num_experts=4), "has recurrent layers alone"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)  # fmt: skip
def test_families_without_the_needed_parts_are_named(
    tmp_path: Path, config: PreTrainedConfig, reason: str
) -> None:
    assert reason in refusal(save(tmp_path, config))


def test_an_encoder_with_a_decoder_is_refused(folder: Path) -> None:
    T5Config(vocab_size=320, d_model=64, num_layers=2, num_heads=4).save_pretrained(folder)
    assert "Winnow cannot run t5: an encoder reads its prompts" in refusal(folder)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "hqq"},
        {"quant_method": "quanto"},
        {"quant_method": "of-next-year", "bits": 3},
    ],
    ids=lambda value: value["quant_method"],
)
def test_quantizations_that_are_not_known_are_refused_by_name(
    folder: Path, quantization: dict[str, Any]
) -> None:
    change(folder, "config.json", quantization_config=quantization)
    method = quantization["quant_method"]
    assert f"is quantized by {method}, which Winnow does not run" in refusal(folder)


@pytest.mark.parametrize(
    ("method", "packages"),
    [
        ("awq", "accelerate gptqmodel"),
        ("gptq", "optimum gptqmodel"),
        ("bitsandbytes", "accelerate bitsandbytes"),
        ("mxfp4", "accelerate kernels triton"),
        ("fp8", "accelerate"),
        ("torchao", "torchao"),
    ],
)
def test_a_quantization_asks_for_the_packages_that_run_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, packages: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    change(folder, "config.json", quantization_config={"quant_method": method})
    with pytest.raises(UnusableModel) as raised:
        describe_model(folder, device="cuda")
    found = raised.value.message
    assert f"quantized by {method}, for which {' and '.join(packages.split())}" in found
    assert f"pip install {packages}" in found
    assert ("dequantize: true" in found) == (method != "torchao")


def test_a_quantization_without_a_name_is_refused(folder: Path) -> None:
    change(folder, "config.json", quantization_config={"bits": 4})
    assert "quantized by a method without a name" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", "64"),
        ("hidden_size", 10**15),
        ("intermediate_size", 2**62),
        ("num_attention_heads", 3),
        ("num_attention_heads", None),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", -2),
        ("head_dim", 0.5),
        ("head_dim", 7),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", [4]),
        ("vocab_size", 0),
        ("max_position_embeddings", "long"),
        ("max_position_embeddings", 1),
        ("rope_parameters", []),
        ("rope_parameters", {"rope_type": "su", "rope_theta": 1e4, "factor": 4}),
        ("rms_norm_eps", math.nan),
        ("dtype", "int8"),
        ("dtype", "float64"),
        ("hidden_act", "unheard_of"),
        ("model_type", None),
        ("model_type", ["llama"]),
        ("transformers_weights", "../elsewhere.safetensors"),
    ],
)
def test_wrong_values_in_the_configuration_are_one_line(
    folder: Path, name: str, value: object
) -> None:
    assert str(folder) in refusal(change(folder, "config.json", **{name: value}))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' * 9000])
def test_files_that_are_not_json_objects_are_one_line(
    folder: Path, file: str, content: bytes
) -> None:
    (folder / file).write_bytes(content)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"model": {"type": "BPE"}}', '{"version": 1}']
)
def test_a_broken_tokenizer_is_one_line(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    reason = refusal(folder)
    assert "has no usable tokenizer" in reason or "tokenizer.json is no" in reason


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    """Both would load, and fail at the first text with such a token."""
    small = save(tmp_path, LlamaConfig(**SIZES | {"vocab_size": 100}))
    assert "the model has 100, up to 99" in refusal(small)


def test_added_tokens_beyond_the_vocabulary_do_no_harm(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    token = tokenizer["added_tokens"][0] | {"id": 320, "content": "<|later|>"}
    tokenizer["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    Winnow.load(folder).generate("the quick", GREEDY)


def unlink(path: Path) -> None:
    path.unlink()


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize(
    "spoil", [unlink, replace_by_folder, replace_by_dangling_link, replace_by_pipe]
)
@pytest.mark.timeout(20)
def test_what_is_no_file_is_one_line(
    folder: Path, file: str, spoil: Callable[[Path], None]
) -> None:
    spoil(folder / file)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("name", ["/nowhere", "a\0b", "a" * 300, "/" + "a/" * 3000, "/dev/null"])
def test_a_path_that_leads_nowhere_is_one_line(name: str) -> None:
    with pytest.raises(UnusableModel):
        Winnow.load(name)


@pytest.mark.parametrize(
    "change_weight",
    [lambda weight: weight * math.nan, lambda weight: weight.fill_(math.inf)],
    ids=["nan", "infinite"],
)
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.2.self_attn.v_proj.weight"])
def test_weights_that_are_no_numbers_are_refused(
    folder: Path, name: str, change_weight: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][7] = change_weight(tensors[name][7])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "are not finite" in refusal(folder)


def test_weights_of_another_precision_are_converted(folder: Path) -> None:
    tensors = {k: v.half() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    Winnow.load(folder).generate("the quick", GREEDY)
