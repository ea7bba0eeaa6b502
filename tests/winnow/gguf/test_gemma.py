"""Gemma's files: norms one higher, sliding layers, rotary tables by layer, scores for merges."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    PreTrainedConfig,
)

from tests.gguf_in_code import write_gguf
from tests.winnow.checkpoints import SIZES, save
from winnow.errors import UnusableModel
from winnow.gguf.header import read_header
from winnow.gguf.weights import weights
from winnow.model_files import load_config
from winnow.tokenizer import load_tokenizer

_SIZES: dict[str, Any] = SIZES | {"num_hidden_layers": 7, "head_dim": 16, "sliding_window": 24}
_SIZES |= {"pad_token_id": 0, "query_pre_attn_scalar": 16}
_WEIGHTS = "model.safetensors"
_OF_FOLDERS = {"_name_or_path", "architectures", "bos_token_id", "eos_token_id", "pad_token_id"}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "gemma2": Gemma2Config(**_SIZES),
    "gemma3": Gemma3TextConfig(**_SIZES, final_logit_softcapping=20.0),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("gemma3"), CONFIGS["gemma3"])


@pytest.mark.parametrize("family", CONFIGS)
def test_the_network_is_that_of_the_folder(tmp_path: Path, file: Path, family: str) -> None:
    folder = save(tmp_path / "folder", CONFIGS[family])
    stored = {name: torch.rand_like(t) for name, t in load_file(folder / _WEIGHTS).items()}
    save_file(stored, folder / _WEIGHTS, {"format": "pt"})
    write_gguf(file, folder)
    ours, theirs = load_config(file).to_dict(), load_config(folder).to_dict()
    assert ours.pop("rms_norm_eps") == pytest.approx(theirs.pop("rms_norm_eps"))
    for name, value in theirs.items():
        assert ours.get(name) == value or name in _OF_FOLDERS, name
    read = weights(read_header(file), torch.float32)
    assert read.keys() == stored.keys()
    for name, tensor in read.items():
        torch.testing.assert_close(tensor[...], stored[name], msg=name)


@pytest.mark.parametrize(
    ("pattern", "full"),
    [
        (None, [5]),
        (3, [2, 5]),
        (1, range(7)),
        ([True, False, True, False, True, True, False], [1, 3, 6]),
    ],
)
def test_layers_slide_as_the_file_says(file: Path, gemma3: Path, pattern: Any, full: Any) -> None:
    """All but each sixth where it is silent, as llama.cpp has it."""
    values = {} if pattern is None else {"{arch}__attention__sliding_window_pattern": pattern}
    config = load_config(write_gguf(file, gemma3, **values))
    found = [idx for idx, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert found == list(full)


def test_no_layer_slides_without_a_window(file: Path, gemma3: Path) -> None:
    write_gguf(file, gemma3, leave_out=("{arch}.attention.sliding_window",))
    assert set(load_config(file).layer_types) == {"full_attention"}


def test_sliding_layers_have_rotary_tables_of_their_own(file: Path, gemma3: Path) -> None:
    values: dict[str, Any] = {
        "{arch}__rope__freq_base": 1e6,
        "{arch}__rope__freq_base_swa": 5000.0,
        "{arch}__rope__scaling__type": "linear",
        "{arch}__rope__scaling__factor": 8.0,
    }
    assert load_config(write_gguf(file, gemma3, **values)).rope_parameters == {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    }


def test_the_largest_scales_its_queries_by_its_width(file: Path, tmp_path: Path) -> None:
    """Gemma 3 27B, which no file tells; it is known by its 62 layers."""
    sizes = _SIZES | {"num_hidden_layers": 62, "hidden_size": 32, "intermediate_size": 8}
    folder = save(tmp_path / "folder", Gemma3TextConfig(**sizes))
    assert load_config(write_gguf(file, folder)).query_pre_attn_scalar == 32 // 4


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"{arch}__attention__sliding_window_pattern": [True, False]}, "pattern has 2 of 7 layers"),
        ({"{arch}__attention__sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"{arch}__block_count": 2**32 - 1}, "4294967295 layers"),
        ({"leave_out": ("{arch}.block_count",)}, "has 0 layers"),
        ({"{arch}__attention__causal": False, "{arch}__pooling_type": 1}, "with pooling_type"),
        ({"leave_out": ("blk.3.post_ffw_norm.weight",)}, "in no file: 1 (model.layers.3.post_feed"),
    ],
)
def test_what_cannot_be_run_is_named(
    file: Path, gemma3: Path, values: dict[str, Any], reason: str
) -> None:
    from winnow.models import load_model

    write_gguf(file, gemma3, **values)
    with pytest.raises(UnusableModel) as caught:
        load_model(file, max_model_len=24)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_merges_follow_from_the_order_of_the_tokens(file: Path, gemma3: Path) -> None:
    """A file has no merges. A run of spaces is a token of spaces, which stand as ▁ in others."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "\n", "  ", "th", "▁th"]
    tokens += ["the", "▁the", *"▁theqick", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [3] * 5 + [4] * 2 + [1] * (len(tokens) - 7 - 256) + [6] * 256
    missing = 320 - len(tokens)
    write_gguf(
        file,
        gemma3,
        leave_out=("tokenizer.ggml.merges",),
        tokenizer__ggml__model="llama",
        tokenizer__ggml__pre="default",
        tokenizer__ggml__tokens=[*tokens, *(f"<unused{i}>" for i in range(missing))],
        tokenizer__ggml__scores=[-1.0 * i for i in range(320)],
        tokenizer__ggml__token_type=types + [3] * missing,
        tokenizer__ggml__add_space_prefix=False,
        tokenizer__ggml__add_bos_token=True,
        tokenizer__ggml__bos_token_id=2,
        tokenizer__ggml__eos_token_id=1,
        tokenizer__ggml__unknown_token_id=3,
    )
    tokenizer = load_tokenizer(file)
    pieces = ["<bos>", "<start_of_turn>", "the", "▁the", "\n", "  ", "the", "<0xC3>", "<0xA9>"]
    text = "<start_of_turn>the the\n  theé"
    assert tokenizer.encode(text) == [tokens.index(piece) for piece in pieces]
    assert tokenizer.decode(tokenizer.encode(text)[2:]) == "the the\n  theé"
