"""Quantized checkpoints answer as the model of the weights that theirs stand for."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig

from tests.models_in_code import save_tiny_model
from tests.winnow.checkpoints import EXPERTS, save
from tests.winnow.layers import theirs
from tests.winnow.quantization import quantized_in_code as formats
from tests.winnow.quantization.quantized_in_code import Made, save_quantized
from winnow import Winnow
from winnow.checkpoint import Checkpoint, require_same_as_dequantized
from winnow.distributed.loading import require_splittable
from winnow.errors import UnusableModel
from winnow.model_files import describe_model
from winnow.models import load_model
from winnow.quantization import dequantize
from winnow.quantization.formats.base import Parts
from winnow.quantization.formats.mxfp4 import mxfp4
from winnow.weight_files import stored_tensors

Maker = Callable[[Tensor], Made]
PROMPT = "the quick brown fox jumps over the lazy dog " * 3


def compressed(form: str) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {}}


FORMATS: dict[str, tuple[dict[str, Any], Maker]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16}, formats.gptq),
    "gptq in any order": (
        {"quant_method": "gptq", "bits": 4, "desc_act": True},
        partial(formats.gptq, act_order=True),
    ),
    "gptq of 8 bits, version 2": (
        {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"},
        partial(formats.gptq, bits=8, offset=0),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, formats.awq),
    "int8 channels": (compressed("int-quantized"), formats.int8_channels),
    "fp8 of a whole tensor": (compressed("float-quantized"), formats.fp8_tensor),
    "packed": (compressed("pack-quantized"), formats.pack_quantized),
    "packed with zeros": (
        compressed("pack-quantized"),
        partial(formats.pack_quantized, zeros_as=torch.int32),
    ),
    "packed with plain zeros": (
        compressed("pack-quantized"),
        partial(formats.pack_quantized, zeros_as=torch.int8),
    ),
    "fp8 with one scale": ({"quant_method": "fp8", "ignored_layers": []}, formats.fp8_alone),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [48, 48]}, formats.fp8_blocks),
    "bitsandbytes int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        formats.bnb_int8,
    ),
    "bitsandbytes nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        formats.bnb_nf4,
    ),
    "bitsandbytes nf4 seen as bfloat16": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        partial(formats.bnb_nf4, storage=torch.bfloat16),
    ),
    "bitsandbytes nested": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        partial(formats.bnb_nf4, is_nested=True),
    ),
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "plain", "llama")


@pytest.mark.parametrize("name", FORMATS)
def test_a_dequantized_checkpoint_answers_as_the_model_of_its_weights(
    plain: Path, tmp_path: Path, name: str
) -> None:
    quantized = save_quantized(plain, tmp_path / "quantized", *FORMATS[name])
    found = load_model(quantized, dequantize=True)
    expected = load_model(plain)
    ours, theirs = (dict(model._model.named_parameters()) for model in (found, expected))
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-6, atol=1e-9)


def test_its_answer_is_the_same_and_it_can_be_int8_at_once(plain: Path, tmp_path: Path) -> None:
    quantized = save_quantized(plain, tmp_path / "quantized", *FORMATS["gptq"])
    found = Winnow.load(quantized, dequantize=True, quantize="int8").generate(PROMPT)
    assert found.token_ids == Winnow.load(plain, quantize="int8").generate(PROMPT).token_ids


def test_experts_of_mxfp4_are_what_their_blocks_stand_for(tmp_path: Path) -> None:
    made = formats.mxfp4(torch.empty(2, 64, 48))
    save_file(
        {f"experts.down_proj{end}": part for end, part in made.parts.items()},
        tmp_path / "model.safetensors",
    )
    table = stored_tensors(tmp_path)
    form = mxfp4({})
    parts = Parts(table, "experts.down_proj", {})
    assert form.shape(parts) == (2, 64, 48)
    assert torch.equal(form.dequantize(parts), made.weight)


def test_a_mixture_of_mxfp4_experts_answers_as_the_model_of_its_weights(tmp_path: Path) -> None:
    def make(weight: Tensor) -> Made:
        return formats.mxfp4(weight) if weight.ndim == 3 else Made({".weight": weight}, weight)

    plain = save(tmp_path / "plain", GptOssConfig(**EXPERTS, head_dim=16))
    quantized = save_quantized(plain, tmp_path / "quantized", {"quant_method": "mxfp4"}, make)
    for kind in (None, "int8"):
        found = Winnow.load(quantized, quantize=kind).generate(PROMPT)
        assert found == Winnow.load(plain, quantize=kind).generate(PROMPT)


def test_the_memory_is_told_before(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=dequantize.__name__)
    load_model(save_quantized(plain, tmp_path / "q", *FORMATS["awq"]), dequantize=True)
    assert "is dequantized from awq: 0.00 GiB in files become 0.00 GiB of float32" in caplog.text


def test_what_does_not_fit_is_refused_with_both_numbers(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = save_quantized(plain, tmp_path / "q", *FORMATS["awq"])
    monkeypatch.setattr(dequantize, "_GIB", 1 << 10)
    monkeypatch.setattr(dequantize, "free_bytes", lambda _: 100 << 10)
    with pytest.raises(UnusableModel, match=r"become 738\.25 GiB of float32; 100.00 GiB are"):
        load_model(quantized, dequantize=True)


def test_workers_that_dequantize_and_others_do_not_exchange_keys_and_values(
    plain: Path, tmp_path: Path
) -> None:
    quantized = save_quantized(plain, tmp_path / "q", *FORMATS["fp8 blocks"])

    def prints(path: Path, device: str) -> set[str]:
        both = (describe_model(path, device=device, dequantize=wish) for wish in (True, False))
        return {description.fingerprint for description in both}

    assert len(prints(quantized, "cuda")) == 2
    assert len(prints(quantized, "cpu")) == 1  # it is dequantized in any case
    assert len(prints(plain, "cuda")) == 1  # there is nothing to dequantize


@pytest.mark.parametrize("name", ["fp8 blocks", "packed"])
def test_what_no_device_here_computes_with_is_dequantized_unasked(
    plain: Path, tmp_path: Path, name: str
) -> None:
    quantized = save_quantized(plain, tmp_path / "q", *FORMATS[name])
    assert Winnow.load(quantized).generate(PROMPT) == Winnow.load(plain).generate(PROMPT)


def test_a_library_that_computes_something_else_is_found_out(plain: Path, tmp_path: Path) -> None:
    quantized = save_quantized(plain, tmp_path / "q", *FORMATS["gptq"])
    description = describe_model(quantized, dequantize=True)
    checkpoint = Checkpoint(description, None, stored_tensors(quantized))
    network = theirs(plain, torch.float32)
    require_same_as_dequantized(checkpoint, network)
    for layer in network.model.layers:
        layer.mlp.down_proj.weight.data.mul_(1.2)
    with pytest.raises(UnusableModel, match=r"0\.2 off what the files say; the limit is 0\.05"):
        require_same_as_dequantized(checkpoint, network)


def test_ranks_do_not_share_a_quantized_checkpoint(plain: Path, tmp_path: Path) -> None:
    quantized = save_quantized(plain, tmp_path / "q", *FORMATS["awq"])
    with pytest.raises(UnusableModel, match="quantized by awq, which ranks cannot share"):
        require_splittable(describe_model(quantized, dequantize=True), 2)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "gptq", "bits": 3}, "GPTQ of 3 bits in the form 'gptq'"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "in the form 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ of 4 bits in the form 'gemv'"),
        (compressed("nvfp4-pack-quantized"), "in the form 'nvfp4-pack-quantized'"),
        (
            compressed("pack-quantized")
            | {"config_groups": {"group_0": {"weights": {"num_bits": 3}}}},
            "compressed-tensors of 3 bits in the form 'pack-quantized'",
        ),
        ({"quant_method": "torchao"}, "it runs where there is torchao"),
        ({"quant_method": "quanto"}, "quantized by quanto, which Winnow does not run"),
    ],
    ids=str,
)
def test_what_cannot_be_dequantized_is_refused(
    plain: Path, config: dict[str, Any], reason: str
) -> None:
    settings = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    with pytest.raises(UnusableModel, match=reason):
        describe_model(plain, dequantize=True)


@pytest.mark.parametrize("value", [0, 1])
def test_biases_that_the_network_lacks_may_be_zero(plain: Path, tmp_path: Path, value: int) -> None:
    quantized = save_quantized(plain, tmp_path / "q", *FORMATS["gptq"])
    tensors = load_file(quantized / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".qweight")]:
        bias = torch.full((tensors[name].shape[1],), float(value))
        tensors[name.replace(".qweight", ".bias")] = bias
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    if value:
        with pytest.raises(UnusableModel, match=r"no place in the network: 28 .*proj\.bias"):
            load_model(quantized, dequantize=True)
    else:
        found = Winnow.load(quantized, dequantize=True).generate(PROMPT)
        assert found == Winnow.load(plain).generate(PROMPT)


@pytest.mark.parametrize("end", [".qweight", ".qzeros"])
def test_a_weight_without_one_of_its_parts_is_refused(
    plain: Path, tmp_path: Path, end: str
) -> None:
    quantized = save_quantized(plain, tmp_path / "q", *FORMATS["gptq"])
    tensors = load_file(quantized / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj" + end]
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnusableModel, match=r"layers\.1\.mlp\.down_proj.*quantized weight"):
        load_model(quantized, dequantize=True)


def test_int8_of_a_quantized_checkpoint_asks_for_dequantize(plain: Path, tmp_path: Path) -> None:
    quantized = save_quantized(plain, tmp_path / "q", *FORMATS["gptq"])
    with pytest.raises(UnusableModel, match="quantized by gptq already; dequantize: true"):
        load_model(quantized, quantize="int8")
