"""Models whose layers have a state in the place of keys and values, or beside them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models_in_code import RECURRENT_FAMILIES, save_tiny_model
from tests.winnow import reference
from tests.winnow.drive import (
    ASL,
    GREEDY,
    UNPRUNED,
    admit,
    assert_empty,
    decode_all,
    ids,
    make_engine,
    prefill_all,
    prompt,
    spec,
)
from tests.winnow.eager_recorder import EagerRecorder
from winnow.attention import PrefillAttention
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.kv_pool import KVPool, KVPoolConfig
from winnow.engine.prefill import PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.errors import InvalidSetting
from winnow.models import load_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: save_tiny_model(tmp_path_factory.mktemp(family), family)
        for family in RECURRENT_FAMILIES
    }


@pytest.fixture(scope="module")
def qwen(folders: dict[str, Path]) -> DecoderModel:
    return load_model(folders["qwen3_next"])


def answer(engine: DecodeEngine, token_ids: list[int], **more: Any) -> list[int]:
    admit(engine, spec("r", len(token_ids), GREEDY, **more), token_ids)
    return ids(decode_all(engine)["r"])


@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_answers_as_transformers_does(folders: dict[str, Path], family: str) -> None:
    model, theirs = load_model(folders[family]), reference.load(folders[family])
    engine = make_engine(model)
    for num_tokens in (1, 2, 5, 17, 70, 150):
        token_ids = prompt(num_tokens)
        assert answer(engine, token_ids) == reference.greedy(theirs, token_ids, GREEDY.max_tokens)
    assert_empty(engine)


def test_recorded_steps_change_the_states_as_launched_ones_do(
    folders: dict[str, Path],
) -> None:
    model, token_ids = load_model(folders["lfm2"]), prompt(40)
    engine = make_engine(model, rows=4, new_recorder=EagerRecorder)
    assert engine._runner.reads_late
    wanted = reference.greedy(reference.load(folders["lfm2"]), token_ids, GREEDY.max_tokens)
    for _ in range(2):
        assert answer(engine, token_ids) == wanted
    engine.close()


def test_sequences_of_a_batch_have_their_own_states(
    folders: dict[str, Path], qwen: DecoderModel
) -> None:
    theirs, engine = reference.load(folders["qwen3_next"]), make_engine(qwen)
    prompts = {f"p{seed}": prompt(20 + seed, seed) for seed in range(5)}
    for name, token_ids in prompts.items():
        admit(engine, spec(name, len(token_ids), GREEDY), token_ids)
    answers = decode_all(engine)
    for name, token_ids in prompts.items():
        wanted = reference.greedy(theirs, token_ids, GREEDY.max_tokens)
        assert ids(answers[name]) == wanted


def test_choices_of_one_prompt_begin_from_the_same_state(
    folders: dict[str, Path], qwen: DecoderModel
) -> None:
    engine, token_ids = make_engine(qwen), prompt(40)
    admit(engine, spec("r", 40, GREEDY, num_sequences=3), token_ids)
    tokens = decode_all(engine)["r"]
    wanted = reference.greedy(reference.load(folders["qwen3_next"]), token_ids, GREEDY.max_tokens)
    assert [ids(tokens, idx) for idx in range(3)] == [wanted] * 3


def test_states_are_swapped_out_and_in(qwen: DecoderModel) -> None:
    token_ids = [prompt(60, seed) for seed in range(4)]
    wanted = [answer(make_engine(qwen), own) for own in token_ids]
    page_bytes = 16 * (qwen.shape.kv_bytes(1) + 4)
    heads = len(qwen.shape.kv_layers) * qwen.shape.num_kv_heads
    memory = 5 * qwen.shape.state_bytes + (4 * 4 * heads + 3) * page_bytes
    engine = make_engine(qwen, rows=4, memory=memory, overcommit=2.0, swap_bytes=1 << 20)
    for idx, own in enumerate(token_ids):
        admit(engine, spec(str(idx), 60, GREEDY), own)
    answers = decode_all(engine)
    assert engine.preemption_stats.swapped_out > 0
    assert [ids(answers[str(idx)]) for idx in range(4)] == wanted
    assert_empty(engine)


@torch.inference_mode()
def test_above_the_selection_layers_go_over_the_surviving_tokens_in_order(
    qwen: DecoderModel,
) -> None:
    """Layer 1 selects; layer 2 is recurrent."""
    token_ids, cuts = prompt(100), list[Tensor]()
    settings = replace(ASL, method="fastkv", fixed_layer=1)
    run = PrefillRun(
        qwen,
        token_ids,
        settings,
        lambda _, cut: cuts.append(cut.kept) if cut else None,
        is_long=False,
    )
    layers, result = list(run.layers()), run.result()
    (kept,) = cuts
    positions = torch.arange(100)[None]
    hidden, rope = qwen.embed(torch.tensor([token_ids])), qwen.rope(positions)
    states = []
    for layer_idx in range(4):
        if layer_idx == 2:
            hidden, rope = hidden[:, kept], qwen.rope(positions[:, kept])
        states.append(qwen.new_state(layer_idx))
        hidden = qwen.layer(layer_idx, hidden, rope, PrefillAttention(None), states[-1])
    for layer, state in zip(layers, states, strict=True):
        for got, wanted in zip(layer.states, state.tensors if state else (), strict=True):
            torch.testing.assert_close(got, wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.final_hidden, hidden[0, -1], rtol=1e-4, atol=1e-4)
    report, heads = result.report, qwen.shape.num_kv_heads
    assert (report.selection_layer, report.num_selected_tokens) == (1, len(kept))
    assert report.layer_entries == (0, 20 * heads, 0, 20 * heads)
    assert report.state_bytes == qwen.shape.state_bytes
    assert report.kv_bytes_full == qwen.shape.kv_bytes(2 * heads * 100)


def test_layers_without_keys_are_not_recompressed(qwen: DecoderModel) -> None:
    engine = make_engine(qwen)
    token_ids = prompt(60)
    limits = {"decode_budget": 32, "recompress_interval": 8}
    tokens = answer(engine, token_ids, **limits)
    assert len(tokens) == GREEDY.max_tokens
    assert engine.recompression_stats.recompressions > 0
    assert_empty(engine)


def test_a_row_read_and_written_again_goes_on_alike(qwen: DecoderModel) -> None:
    layers, _ = prefill_all(qwen, prompt(30), UNPRUNED)
    pool = KVPool(qwen.shape, KVPoolConfig(1 << 22), 3, qwen.device)
    for layer in layers:
        pool.write_layer(1, layer)
    for idx, layer in enumerate(layers):
        back = pool.read_layer(1, idx)
        assert torch.equal(back.keys, layer.keys)
        assert all(map(torch.equal, back.states, layer.states))
        assert back.nbytes == layer.nbytes


def test_states_count_as_kv_memory(qwen: DecoderModel) -> None:
    shape = qwen.shape
    assert shape.state_bytes == 2 * 4 * (96 * 4 + 4 * 16 * 8)
    config = KVPoolConfig(1 << 22)
    page_bytes = 16 * (shape.kv_bytes(1) + 4)
    fewer = config.num_pages(shape) - config.num_pages(shape, num_rows=100)
    assert abs(fewer - 100 * shape.state_bytes / page_bytes) < 1
    with pytest.raises(InvalidSetting, match=r"at least .*, 716,800 of it for the states of 100"):
        KVPoolConfig(100_000).num_pages(shape, num_rows=100)


def test_layers_with_keys_and_a_state_do_not_use_the_store_of_prefixes(
    folders: dict[str, Path],
) -> None:
    model = load_model(folders["falcon_h1"])
    store = PrefixStore.within(model, 1 << 22, "device", "auto")
    _, result = prefill_all(model, prompt(100), UNPRUNED, store)
    assert result.report.no_prefix_reason == "recurrent_layers"
