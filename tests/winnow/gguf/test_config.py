"""A network out of the values of a GGUF file, or what of them Winnow does not compute."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gguf_in_code import write_gguf
from tests.models_in_code import save_tiny_model
from winnow.errors import UnusableModel
from winnow.gguf.header import read_header
from winnow.gguf.weights import weights
from winnow.model_files import describe_model, load_config
from winnow.models import load_model

HEAD_DIM = 16


def configured(file: Path, folder: Path, **options: Any) -> Any:
    return load_config(write_gguf(file, folder, **options))


def refusal(file: Path, folder: Path, **options: Any) -> str:
    with pytest.raises(UnusableModel) as caught:
        load_model(write_gguf(file, folder, **options))
    reason = str(caught.value)
    assert "\n" not in reason and str(file) in reason
    return reason


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_sizes_are_the_files(file: Path, tiny_models: dict[str, Path]) -> None:
    ours = configured(file, tiny_models["qwen3"])
    theirs = load_config(tiny_models["qwen3"])
    names: tuple[str, ...] = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    names += ("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")
    names += ("rms_norm_eps", "tie_word_embeddings", "rope_parameters")
    for name in names:
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name)), name


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"general__architecture": "falcon"}, "architecture falcon; Winnow reads those of llama"),
        ({"{arch}__attention__scale": 0.5}, "with attention.scale, which Winnow does not compute"),
        ({"{arch}__final_logit_softcapping": 30.0}, "with final_logit_softcapping"),
        ({"{arch}__attention__value_length": 8}, "keys have 16 numbers, and values 8"),
        ({"{arch}__rope__dimension_count": 8}, "8 of the 16 numbers of a head rotate"),
        ({"{arch}__rope__scaling__type": "su"}, "rotary tables are scaled by su"),
        ({"{arch}__attention__head_count_kv": [2, 1, 2, 2]}, "differs between layers: 2, 1"),
        ({"{arch}__attention__head_count": 0}, "how many attention heads"),
        ({"{arch}__block_count": 3}, "have no place in the network"),
        ({"{arch}__block_count": 5}, "that are in no file"),
        ({"{arch}__block_count": 9_999}, "but"),
        ({"{arch}__block_count": 10**6}, "it has 1,000,000 layers; the limit is 10,000"),
        ({"{arch}__feed_forward_length": 96}, "tensors of another shape"),
        ({"leave_out": ("blk.2.ffn_up.weight",)}, "that are in no file: 1 (model.layers.2.mlp"),
        ({"leave_out": ("token_embd.weight",)}, "has no tensor token_embd.weight"),
        ({"leave_out": ("{arch}.context_length", "{arch}.block_count")}, ""),
        ({"tensors": {"blk.1.extra.weight": np.ones((2, 32), np.float32)}}, "blk.1.extra.weight"),
        ({"tensors": {"rope_freqs.weight": np.full(8, 3, np.float32)}}, "not those of Llama 3"),
        ({"tokenizer__ggml__model": "bert"}, "a tokenizer of kind bert"),
        ({"tokenizer__ggml__pre": "of-next-year"}, "in the way of of-next-year"),
        ({"leave_out": ("tokenizer.ggml.tokens",)}, "has no vocabulary"),
    ],
)  # fmt: skip
@pytest.mark.timeout(60)
def test_what_cannot_be_run_is_named(
    file: Path, tiny_models: dict[str, Path], values: dict[str, Any], reason: str
) -> None:
    from winnow import Winnow

    write_gguf(file, tiny_models["llama"], **values)
    with pytest.raises(UnusableModel) as caught:
        Winnow.load(file)
    assert reason in str(caught.value) and str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_that_say_nothing_do_no_harm(file: Path, tiny_models: dict[str, Path]) -> None:
    values: dict[str, Any] = {
        "{arch}__attention__sliding_window": 0,
        "{arch}__rope__scaling__type": "none",
    }
    load_model(write_gguf(file, tiny_models["llama"], **values, general__languages=["en"]))


def test_a_value_for_each_layer_is_one_where_they_agree(
    file: Path, tiny_models: dict[str, Path]
) -> None:
    config = configured(file, tiny_models["llama"], **{"{arch}__feed_forward_length": [128] * 4})
    assert config.intermediate_size == 128


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        ({"type": "linear", "factor": 2.0}, 16384),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 2048}, 8192),
    ],
)
def test_scaled_rotary_tables_reach_as_far_as_those_of_a_folder(
    file: Path, tiny_models: dict[str, Path], tmp_path: Path, scaling: dict[str, Any], length: int
) -> None:
    values = {f"{{arch}}__rope__scaling__{name}": value for name, value in scaling.items()}
    description = describe_model(write_gguf(file, tiny_models["qwen2"], **values))
    assert description.max_positions == length
    rope = {"rope_type": scaling["type"], "rope_theta": 10000.0, "factor": scaling["factor"]}
    if scaling["type"] == "yarn":
        rope["original_max_position_embeddings"] = 2048
    folder = save_tiny_model(tmp_path / "folder", "qwen2", rope_parameters=rope)
    assert load_config(file).rope_parameters == load_config(folder).rope_parameters


def llama3_factors(factor: float, base: float) -> np.ndarray:
    """As llama.cpp's converter writes them."""
    low, high = 8192 / 1, 8192 / 4
    factors = []
    for frequency in 1 / base ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM):
        wavelength = 2 * math.pi / frequency
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_is_known_by_the_factors_of_its_frequencies(
    file: Path, tiny_models: dict[str, Path], factor: float
) -> None:
    config = configured(
        file,
        tiny_models["llama"],
        tensors={"rope_freqs.weight": llama3_factors(factor, 500000.0)},
        **{"{arch}__rope__freq_base": 500000.0},
    )
    assert config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_longrope_has_the_files_factors(file: Path, tiny_models: dict[str, Path]) -> None:
    short, long = np.linspace(1, 2, 8, dtype=np.float32), np.linspace(1, 9, 8, dtype=np.float32)
    config = configured(
        file,
        tiny_models["phi3"],
        tensors={"rope_factors_short.weight": short, "rope_factors_long.weight": long},
        **{"{arch}__rope__scaling__original_context_length": 4096},
    )
    rope = config.rope_parameters
    assert rope["rope_type"] == "longrope" and rope["original_max_position_embeddings"] == 4096
    assert rope["long_factor"] == pytest.approx(long.tolist())
    assert [describe_model(file).is_long(count) for count in (4096, 4097)] == [False, True]
    load_model(file)


def test_tensors_are_read_when_they_are_asked_for(file: Path, tiny_models: dict[str, Path]) -> None:
    import torch

    header = read_header(write_gguf(file, tiny_models["llama"]))
    found = weights(header, torch.bfloat16)
    file.unlink()
    assert found["model.norm.weight"].shape == (64,)
    with pytest.raises(FileNotFoundError):
        found["model.norm.weight"][...]
