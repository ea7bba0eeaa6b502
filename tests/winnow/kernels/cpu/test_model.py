"""A whole model whose layers, head, embeddings and attention are the kernels'."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GemmaConfig

from tests.models_in_code import save_tiny_model
from tests.winnow.checkpoints import SIZES, save
from tests.winnow.drive import ASL, GREEDY, admit, decode_all, ids, make_engine, prompt, spec
from tests.winnow.layers import assert_same_layers, theirs
from winnow.attention.paged import PagedBackend
from winnow.decoder import DecoderModel
from winnow.kv import KV_DTYPES, KvDtype
from winnow.linear import OneDnnLinear, PackedEmbedding, PackedLinear
from winnow.models import load_model

LENGTHS = (1, 16, 40, 300)


@pytest.fixture(autouse=True)
def _without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with AMX, much of this would be oneDNN's."""
    has_amx(monkeypatch, found=False)


def has_amx(monkeypatch: pytest.MonkeyPatch, *, found: bool) -> None:
    for module in ("winnow.linear", "winnow.attention.masked"):
        monkeypatch.setattr(f"{module}.has_amx", lambda: found)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = {"head_dim": 32, "tie_word_embeddings": request.param}
    folder = tmp_path_factory.mktemp("model")
    return save_tiny_model(folder, "qwen3", dtype=torch.bfloat16, **own)


def answers(
    model: DecoderModel, lengths: tuple[int, ...], kv_dtype: KvDtype = "auto"
) -> dict[str, list[int]]:
    engine = make_engine(model, kv_dtype=kv_dtype)
    assert isinstance(engine._runner._steps._backend, PagedBackend)
    for num_tokens in lengths:
        request = spec(str(num_tokens), num_tokens, GREEDY, decode_budget=24, recompress_interval=4)
        admit(engine, request, prompt(num_tokens, seed=num_tokens), ASL)
    return {name: ids(tokens) for name, tokens in decode_all(engine).items()}


def test_every_layer_computes_what_transformers_does(folder: Path) -> None:
    model = load_model(folder)
    packed = [module for module in model._model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 4 * 4 + 1
    assert not any(isinstance(module, nn.Linear) for module in model._model.modules())
    assert_same_layers(model, theirs(folder, torch.bfloat16), batch=1, num_tokens=40)
    assert_same_layers(model, theirs(folder, torch.bfloat16), batch=3, num_tokens=1)


def test_embeddings_and_head_of_one_weight_hold_it_once(folder: Path) -> None:
    model = load_model(folder)
    network = theirs(folder, torch.bfloat16)
    is_tied = network.config.tie_word_embeddings
    assert isinstance(model._model.model.embed_tokens, PackedEmbedding) == is_tied
    sizes = [sum(one.nbytes for one in own.parameters()) for own in (model._model, network)]
    assert sizes[0] == sizes[1]
    token_ids = torch.tensor([[0, 5, 319]])
    assert torch.equal(model.embed(token_ids), network.model.embed_tokens(token_ids))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_prompt_gets_the_same_tokens_whatever_shares_its_batch(
    folder: Path, kv_dtype: KvDtype
) -> None:
    model = load_model(folder)
    together = answers(model, LENGTHS, kv_dtype)
    for num_tokens in LENGTHS:
        assert answers(model, (num_tokens,), kv_dtype)[str(num_tokens)] == together[str(num_tokens)]


def test_windows_are_read_in_place_whatever_shares_the_batch(tmp_path: Path) -> None:
    window: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 2,
    }
    own: dict[str, Any] = {"head_dim": 32, "dtype": torch.bfloat16} | window
    model = load_model(save_tiny_model(tmp_path, "qwen3", **own))
    together = answers(model, LENGTHS)
    for num_tokens in LENGTHS:
        assert answers(model, (num_tokens,))[str(num_tokens)] == together[str(num_tokens)]


def test_a_cpu_with_amx_multiplies_by_onednn_and_gives_the_layers_of_transformers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_amx(monkeypatch, found=True)
    model = load_model(folder)
    kinds = {type(module) for module in model._model.modules()}
    assert OneDnnLinear in kinds and not {PackedLinear, PackedEmbedding} & kinds
    assert_same_layers(model, theirs(folder, torch.bfloat16), batch=1, num_tokens=40)


def test_scaled_embeddings_of_a_tied_weight_stay_scaled(tmp_path: Path) -> None:
    config = GemmaConfig(**SIZES, head_dim=32, pad_token_id=0, dtype=torch.bfloat16)
    model = load_model(save(tmp_path, config))
    assert isinstance(model._model.lm_head, PackedLinear)
    network = theirs(tmp_path, torch.bfloat16)
    token_ids = torch.tensor([[0, 5, 319]])
    assert torch.equal(model.embed(token_ids), network.model.embed_tokens(token_ids))
