"""LongRoPE: each sequence keeps the tables that it begins with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models_in_code import long_rope, save_tiny_model
from tests.winnow import reference
from tests.winnow.drive import UNPRUNED, admit, decode_all, ids, make_engine, prompt, spec
from tests.winnow.families import save_network, tiny_config
from winnow import SamplingParams
from winnow.checkpoint import empty_network
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.errors import UnusableModel
from winnow.model_files import describe_model, load_config
from winnow.models import load_model
from winnow.network import Network
from winnow.rotary import LONG

ORIGINAL = 200
NEW = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("long"), "phi3", **long_rope(ORIGINAL))


@pytest.fixture(scope="module")
def model(folder: Path) -> DecoderModel:
    return load_model(folder)


@pytest.mark.parametrize("family", ["phi3", "phi4_multimodal", "phimoe", "cohere"])
def test_tables_are_those_of_transformers_for_a_short_and_for_a_long_sequence(
    tmp_path: Path, family: str
) -> None:
    """Also where one row is short and another is long."""
    changes = {"max_position_embeddings": 512} | long_rope(ORIGINAL)
    changes["rope_parameters"] |= {"short_mscale": 1.2, "long_mscale": 1.5}
    folder = save_network(tiny_config(family, **changes), tmp_path)
    rotary = reference.load(folder).model.rotary_emb
    lasts, offsets = (ORIGINAL - 1, ORIGINAL, 500), torch.tensor([[0], [LONG], [LONG]])
    positions = torch.tensor([[0, 7, last] for last in lasts])
    (table,) = load_model(folder).rope(positions + offsets).by_kind.values()
    for row, own in enumerate(positions):
        for ours, theirs in zip(table, rotary(torch.empty(0), own[None]), strict=True):
            torch.testing.assert_close(ours[row], theirs[0])


def test_tables_of_another_form_are_refused(tmp_path: Path) -> None:
    """Llama 4's are complex numbers."""
    config = tiny_config("llama4_text", **long_rope(ORIGINAL))
    config.save_pretrained(tmp_path)
    with pytest.raises(UnusableModel, match="its longrope tables are no cosines and sines"):
        Network(empty_network(load_config(tmp_path)))


def test_rows_of_a_batch_have_tables_of_their_own(model: DecoderModel, folder: Path) -> None:
    network = reference.load(folder)
    prompts = {str(count): prompt(count, seed=count) for count in (5, 100, 205, 320)}
    engine = make_engine(model)
    for name, token_ids in prompts.items():
        admit(engine, spec(name, len(token_ids), NEW), token_ids)
    answers = decode_all(engine)
    for name, token_ids in prompts.items():
        assert ids(answers[name]) == reference.greedy(network, token_ids, NEW.max_tokens)


def test_a_sequence_that_may_grow_long_is_long_from_its_beginning(
    model: DecoderModel, folder: Path, tmp_path: Path
) -> None:
    """As with a model whose short tables are the long ones."""
    always = long_rope(ORIGINAL)
    always["rope_parameters"]["short_factor"] = always["rope_parameters"]["long_factor"]
    network = reference.load(save_tiny_model(tmp_path, "phi3", **always))
    token_ids = prompt(ORIGINAL - 10)
    engine = make_engine(model)
    admit(engine, spec("a", len(token_ids), NEW), token_ids)
    expected = reference.greedy(network, token_ids, NEW.max_tokens)
    assert ids(decode_all(engine)["a"]) == expected


def test_short_and_long_sequences_share_no_beginning(model: DecoderModel) -> None:
    store = PrefixStore(model, 8 << 20, block_tokens=16)
    token_ids = prompt(100)
    cached = []
    for is_long in (False, True, False, True):
        run = PrefillRun(model, token_ids, UNPRUNED, store=store, is_long=is_long)
        list(run.layers())
        cached.append(run.result().report.num_cached_tokens > 0)
    assert cached == [False, False, True, True]


@pytest.mark.parametrize("value", [None, 0, "many"])
def test_an_original_length_that_is_none_is_refused(
    folder: Path, tmp_path: Path, value: Any
) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "model"))
    content = json.loads((path / "config.json").read_text())
    for part in (content, content["rope_parameters"]):
        part["original_max_position_embeddings"] = value
    (path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UnusableModel, match=r"config\.json.* is not usable"):
        describe_model(path)


def test_longrope_in_layers_of_one_kind_is_refused_with_their_name(tmp_path: Path) -> None:
    own = long_rope(ORIGINAL)["rope_parameters"]
    plain = {"rope_type": "default", "rope_theta": 10_000.0}
    rope = {"full_attention": own, "sliding_attention": plain}
    tiny_config("gemma3_text", rope_parameters=rope).save_pretrained(tmp_path)
    with pytest.raises(UnusableModel, match="tables of its full_attention layers are longrope's"):
        describe_model(tmp_path)
