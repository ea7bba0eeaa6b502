"""Layers whose attention grows sharper with a token's position, wherever the token is computed."""

from pathlib import Path

import pytest
import torch

from tests.winnow import reference
from tests.winnow.checkpoints import check
from tests.winnow.drive import prompt
from tests.winnow.families import save_network, tiny_config
from winnow.attention import PrefillAttention
from winnow.decoder import DecoderModel
from winnow.errors import UnusableModel
from winnow.models import load_model


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    """With layers without rotary tables, whose temperature changes every 8 positions."""
    folder = tmp_path_factory.mktemp("llama4")
    return load_model(save_network(tiny_config("llama4_text"), folder))


@torch.inference_mode()
def test_some_tokens_have_the_queries_that_they_have_among_all(llama4: DecoderModel) -> None:
    hidden = llama4.embed(torch.tensor([prompt(60)]))
    rope = llama4.rope(torch.arange(60)[None])
    kept = torch.tensor([2, 9, 31, 59])
    for layer_idx in llama4.shape.full_layers:
        among_all, alone = PrefillAttention(None), PrefillAttention(None)
        llama4.layer(layer_idx, hidden, rope, among_all)
        llama4.layer(layer_idx, hidden[:, kept], rope.take(kept), alone)
        torch.testing.assert_close(alone.queries, among_all.queries[:, kept])


@torch.inference_mode()
def test_factors_that_a_network_hands_its_layers_are_those_of_true_positions(
    tmp_path: Path,
) -> None:
    folder = save_network(tiny_config("beam"), tmp_path)
    model, network = load_model(folder), reference.load(folder, "eager")
    token_ids, positions = torch.tensor([prompt(40)]), torch.arange(40)[None]
    far = positions + 100_000
    hidden, rope = model.embed(token_ids), model.rope(far)
    for layer_idx in range(model.shape.num_layers):
        hidden = model.layer(layer_idx, hidden, rope, PrefillAttention(None))
    found = model.logits(hidden[:, -1])
    expected, near = (
        network(token_ids, position_ids=own).logits[:, -1] for own in (far, positions)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(near, expected, atol=0.1)


def test_what_a_network_hands_its_layers_besides_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("winnow.network.take_temperature", lambda *_, **__: None)
    folder = save_network(tiny_config("beam"), tmp_path)
    with pytest.raises(UnusableModel, match="beam: it hands layer 3 attention_scaling besides"):
        check(folder)
