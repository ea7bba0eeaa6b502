"""`quantize: int8` answers as the model whose weights are what the int8 ones stand for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from tests.models_in_code import save_byte_tokenizer, save_tiny_model
from tests.winnow.adapters.made import save_adapter
from tests.winnow.checkpoints import EXPERTS
from tests.winnow.families import save_network, tiny_config
from tests.winnow.kernels.cpu.forgetting import forget
from tests.winnow.layers import assert_same_layers, is_fused, theirs
from winnow import Winnow
from winnow.distributed.loading import load_on_ranks
from winnow.errors import InvalidSetting
from winnow.kernels.cpu import library
from winnow.linear import PackedLinear
from winnow.model_files import describe_model
from winnow.models import load_model
from winnow.quantization.int8 import dequantized, quantized
from winnow.quantization.layers import Int8Embedding, Int8Linear

BITS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@torch.no_grad()
def with_rounded_weights(path: Path, folder: Path) -> Path:
    """The model in `folder`, its matrices replaced by what int8 makes of them."""
    network: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    for name, weight in network.named_parameters():
        if weight.ndim > 1 and "router" not in name and ".mlp.gate." not in name:
            weight.copy_(dequantized(*quantized(weight), torch.float32))
    network.float().save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def save_mixtral(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(**EXPERTS)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"head_dim": 32}),
        ("phi3", {"partial_rotary_factor": 0.5}),  # its layers are not fused
    ],
)
@pytest.mark.parametrize("dtype", BITS)
def test_layers_compute_what_the_rounded_weights_give(
    tmp_path: Path, family: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    path = save_tiny_model(tmp_path / "plain", family, dtype=dtype, **changes)
    model = load_model(path, quantize="int8")
    assert is_fused(model) == (family != "phi3")
    assert isinstance(model._model.lm_head, (PackedLinear, Int8Linear))
    rounded = with_rounded_weights(path, tmp_path / "rounded")
    network = theirs(rounded, torch.float32).to(dtype)
    for batch, num_tokens in ((1, 40), (3, 1)):
        assert_same_layers(model, network, batch, num_tokens)


def test_without_our_kernels_they_compute_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    forget()
    try:
        path = save_tiny_model(tmp_path / "plain", "qwen2", dtype=torch.bfloat16)
        model = load_model(path, quantize="int8")
    finally:
        forget()
    assert isinstance(model._model.lm_head, Int8Linear)
    network = theirs(with_rounded_weights(path, tmp_path / "rounded"), torch.bfloat16)
    for batch, num_tokens in ((1, 40), (3, 1)):
        assert_same_layers(model, network, batch, num_tokens)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_answer_is_that_of_the_rounded_weights(tmp_path: Path, family: str) -> None:
    plain, rounded = tmp_path / "plain", tmp_path / "rounded"
    path = save_mixtral(plain) if family == "mixtral" else save_tiny_model(plain, family)
    prompt = "the quick brown fox jumps over the lazy dog " * 4
    found = Winnow.load(path, quantize="int8").generate(prompt)
    expected = Winnow.load(with_rounded_weights(path, rounded)).generate(prompt)
    assert found.token_ids == expected.token_ids


def test_an_adapter_adds_to_int8_weights(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "plain", "llama")
    folders = {"one": save_adapter(tmp_path / "adapter", path)}
    rounded = with_rounded_weights(path, tmp_path / "rounded")
    prompt = "the quick brown fox jumps over the lazy dog " * 4
    found, expected = (
        Winnow.load(model, quantize=kind, adapters=folders).generate(prompt, adapter="one")
        for model, kind in ((path, "int8"), (rounded, None))
    )
    assert found.token_ids == expected.token_ids


def test_what_chooses_the_experts_stays_as_it_is(tmp_path: Path) -> None:
    config = tiny_config("hunyuan_v1_moe")
    config.num_experts = 16
    model = load_model(save_network(config, tmp_path), quantize="int8")
    routers = [m for name, m in model._model.named_modules() if name.endswith(".wg")]
    assert routers and all(type(router) is torch.nn.Linear for router in routers)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_weights_take_half_of_bfloat16(tmp_path: Path, family: str) -> None:
    if family == "mixtral":
        path = save_mixtral(tmp_path, torch.bfloat16)
    else:
        path = save_tiny_model(tmp_path, family, dtype=torch.bfloat16, tie_word_embeddings=True)
    plain, ours = load_model(path), load_model(path, quantize="int8")
    sizes = [sum(p.nbytes for p in model._model.parameters()) for model in (plain, ours)]
    assert sizes[1] / sizes[0] < 0.52


def test_scaled_embeddings_stay_scaled() -> None:
    plain = Gemma3TextScaledWordEmbedding(64, 32, 0, embed_scale=5.5)
    weight = torch.randn(64, 32)
    levels, scales = quantized(weight)
    found = Int8Embedding(plain, levels, scales)(torch.tensor([[3, 0, 63]]))
    expected = dequantized(levels, scales, torch.float32)[[3, 0, 63]] * 5.5
    torch.testing.assert_close(found, expected[None])


def test_so_do_those_of_a_model_that_is_made_int8_as_it_is_loaded(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "gemma4_sharing")
    token_ids = torch.arange(60)[None]
    plain, int8 = (load_model(path, quantize=kind) for kind in (None, "int8"))
    embedded = [model.embed(token_ids) for model in (plain, int8)]
    ropes = [model.rope(token_ids, token_ids).extras for model in (plain, int8)]
    inputs = [extras.inputs for extras in ropes if extras is not None and extras.inputs is not None]
    for found, exact in (embedded[::-1], inputs[::-1]):
        assert (found - exact).abs().max() < exact.abs().max() / 30


def test_float16_holds_a_sum_of_large_inputs() -> None:
    """Of levels alone it would be 127 times the largest float16."""
    levels, scales = quantized(torch.full((16, 512), 2.0**-12))
    layer = Int8Linear(levels, scales, torch.ones(16).half(), torch.float16)
    assert (layer(torch.full((1, 512), 128.0).half()) == 17).all()


def test_a_number_is_at_most_half_a_step_off_and_a_row_of_zeros_is_exact() -> None:
    weight = torch.randn(3, 70, 33)
    weight[1, 5] = 0
    levels, scales = quantized(weight)
    assert levels.abs().max() == 127
    error = (dequantized(levels, scales, torch.float32) - weight).abs()
    assert (error <= scales[..., None] * 0.5001).all()
    assert (error[1, 5] == 0).all()


def test_workers_of_other_weights_do_not_exchange_keys_and_values(
    tiny_models: dict[str, Path],
) -> None:
    path = tiny_models["llama"]
    prints = {describe_model(path, quantize=kind).fingerprint for kind in (None, "int8")}
    assert len(prints) == 2


def test_what_cannot_be_int8_is_refused(tiny_models: dict[str, Path]) -> None:
    path = tiny_models["llama"]
    with pytest.raises(InvalidSetting, match="quantize is 'int4'; it can be int8"):
        load_model(path, quantize="int4")
    with pytest.raises(InvalidSetting, match="quantize int8 is for CPUs; the device is cuda"):
        describe_model(path, quantize="int8", device="cuda")
    with pytest.raises(InvalidSetting, match="several processes; tensor_parallel is 2"):
        load_on_ranks(path, 2, lambda _: None, quantize="int8")
