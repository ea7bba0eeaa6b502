"""Prefill of models with recurrent layers from the prefix store, beside prefill from scratch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models_in_code import save_tiny_model
from tests.winnow.drive import ASL, UNPRUNED, prompt
from tests.winnow.engine.from_store import BLOCK, Prefilled, assert_same, make_store, prefill
from tests.winnow.families import save_network, tiny_config
from winnow.decoder import DecoderModel
from winnow.engine.prefix.store import PrefixStore
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings

# Of each kind of recurrent layer; those of Jamba forget their state where several tokens follow.
FAMILIES = {
    "bamba": None,
    "granitemoehybrid": None,
    "jamba": "recurrent_layers",
    "lfm2_moe": None,
    "lfm3": None,
    "nemotron_h": None,
    "olmo_hybrid": None,
    "qwen3_5_text": None,
    "qwen3_5_moe_text": None,
    "qwen3_next": None,
}
FASTKV = replace(ASL, method="fastkv", fixed_layer=1)
ADAPTIVE = replace(ASL, min_layer=3)
ATOL = 1e-4  # layers go over parts of a prompt, so that sums are rounded otherwise


@pytest.fixture(scope="module", params=["qwen3_next", "lfm2"])
def hybrid(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> DecoderModel:
    return load_model(save_tiny_model(tmp_path_factory.mktemp("hybrid"), request.param))


def compare(
    model: DecoderModel,
    token_ids: list[int],
    pruning: PruningSettings,
    store: PrefixStore,
    atol: float = ATOL,
) -> Prefilled:
    """From the store, after a look that it is what comes from scratch."""
    found, expected = prefill(model, token_ids, pruning, store), prefill(model, token_ids, pruning)
    assert_same(found, expected, atol)
    for ours, theirs in zip(found[0], expected[0], strict=True):
        for one, other in zip(ours.states, theirs.states, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=atol)
    return found


@pytest.mark.parametrize("pruning", [UNPRUNED, FASTKV, ADAPTIVE], ids=lambda own: own.method)
def test_a_prompt_goes_on_from_the_state_at_the_end_of_another(
    hybrid: DecoderModel, pruning: PruningSettings
) -> None:
    store, token_ids = make_store(hybrid), prompt(160)
    for num_tokens, num_cached in ((100, 0), (100, 80), (150, 80), (160, 128), (40, 0)):
        _, result = compare(hybrid, token_ids[:num_tokens], pruning, store)
        report = result.report
        assert report.num_cached_tokens == num_cached
        assert report.num_recomputed_tokens == 0
        assert report.no_prefix_reason == (None if num_cached or num_tokens == 100 else "no_state")
    assert store.stats().num_blocks_in_use == 0


def test_a_beginning_without_a_state_is_computed_and_said(hybrid: DecoderModel) -> None:
    store, token_ids = make_store(hybrid), prompt(100)
    compare(hybrid, token_ids, UNPRUNED, store)
    other = token_ids[:40] + prompt(60, seed=1)
    _, result = compare(hybrid, other, UNPRUNED, store)
    assert (result.report.num_cached_tokens, result.report.no_prefix_reason) == (0, "no_state")
    _, result = compare(hybrid, other, UNPRUNED, store)
    assert (result.report.num_cached_tokens, result.report.no_prefix_reason) == (80, None)


def test_what_a_selection_left_shallow_is_joined_by_all_tokens_above_it(
    hybrid: DecoderModel,
) -> None:
    store, token_ids = make_store(hybrid), prompt(160)
    compare(hybrid, token_ids[:100], FASTKV, store)
    _, result = compare(hybrid, token_ids[:130], UNPRUNED, store)
    assert result.report.num_cached_tokens == 80
    assert result.report.saved_layer_tokens == 2 * 80, "two of four layers"
    _, result = compare(hybrid, token_ids, UNPRUNED, store)
    assert result.report.saved_layer_tokens == 4 * 112


@pytest.mark.parametrize("location", ["device", "host", "both"])
def test_records_are_kept_wherever_the_store_is(hybrid: DecoderModel, location: str) -> None:
    store, token_ids = make_store(hybrid, location=location), prompt(150)
    compare(hybrid, token_ids[:100], ADAPTIVE, store)
    assert compare(hybrid, token_ids, ADAPTIVE, store)[1].report.num_cached_tokens == 80


def test_int8_keys_come_back_with_exact_states(hybrid: DecoderModel) -> None:
    store = PrefixStore(hybrid, 1 << 24, block_tokens=BLOCK, kv_dtype="int8")
    token_ids = prompt(150)
    prefill(hybrid, token_ids[:100], UNPRUNED, store)
    found, expected = (prefill(hybrid, token_ids, UNPRUNED, own) for own in (store, None))
    assert found[1].report.num_cached_tokens == 80
    torch.testing.assert_close(found[0][0].states, expected[0][0].states, rtol=1e-3, atol=ATOL)


def test_a_damaged_record_is_computed_anew(hybrid: DecoderModel) -> None:
    store, token_ids = make_store(hybrid, location="host"), prompt(150)
    compare(hybrid, token_ids[:100], FASTKV, store)
    record = list(store._blocks.values())[4].layers[0]
    record.tensor[3] ^= 1
    compare(hybrid, token_ids, FASTKV, store)
    assert store.stats().damaged_blocks == 1


def test_without_room_for_states_prompts_are_computed_whole(hybrid: DecoderModel) -> None:
    store, token_ids = make_store(hybrid, max_bytes=1 << 15), prompt(150)
    for num_tokens in (100, 150, 120):
        compare(hybrid, token_ids[:num_tokens], ADAPTIVE, store)
    assert store.stats().used_bytes <= 1 << 15


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_recurrent_layer_goes_on_or_no_beginning_is_reused(
    tmp_path: Path, family: str
) -> None:
    model = load_model(save_network(tiny_config(family), tmp_path))
    store, token_ids = make_store(model), prompt(100)
    compare(model, token_ids[:60], UNPRUNED, store, 1e-3)
    _, result = compare(model, token_ids, UNPRUNED, store, 1e-3)
    reason = FAMILIES[family]
    assert result.report.no_prefix_reason == reason
    assert result.report.num_cached_tokens == (48 if reason is None else 0)
