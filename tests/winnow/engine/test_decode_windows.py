"""Decode of models whose layers attend to windows and chunks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models_in_code import save_tiny_model
from tests.winnow import reference
from tests.winnow.drive import (
    GREEDY,
    UNPRUNED,
    admit,
    assert_empty,
    decode_all,
    ids,
    make_engine,
    prompt,
    spec,
)
from tests.winnow.eager_recorder import EagerRecorder
from tests.winnow.engine.moving import tokens_after_a_move
from tests.winnow.layers import theirs
from tests.winnow.windowed import PATTERNS, WindowedModel, run_layers
from winnow.models import load_model

LONG = replace(GREEDY, max_tokens=60)
UNCUT = replace(UNPRUNED, window_size=6)


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Windows of 20 tokens, shorter than two pages of 16."""
    mistral = save_tiny_model(tmp_path_factory.mktemp("mistral"), "mistral", sliding_window=20)
    hybrid = save_tiny_model(
        tmp_path_factory.mktemp("qwen2"),
        "qwen2",
        use_sliding_window=True,
        sliding_window=20,
        max_window_layers=2,
    )
    return {"mistral": mistral, "qwen2": hybrid}


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_prompts_of_several_windows_get_the_tokens_of_generate(
    sliding: dict[str, Path], family: str
) -> None:
    engine = make_engine(load_model(sliding[family]))
    prompts = {str(n): prompt(n, seed=n) for n in (1, 5, 19, 20, 21, 36, 100)}
    for name, token_ids in prompts.items():
        admit(engine, spec(name, len(token_ids), LONG), token_ids, UNCUT)
    answers = decode_all(engine)
    network = reference.load(sliding[family])
    expected = {name: reference.greedy(network, own, 60) for name, own in prompts.items()}
    assert {name: ids(tokens) for name, tokens in answers.items()} == expected
    assert_empty(engine)


def test_replayed_steps_give_what_launched_ones_give(sliding: dict[str, Path]) -> None:
    model = load_model(sliding["qwen2"])
    answers = []
    for new_recorder in (None, EagerRecorder):
        engine = make_engine(model, new_recorder=new_recorder, rows=4)
        for num_tokens in (5, 30, 70):
            request = spec(str(num_tokens), num_tokens, LONG)
            admit(engine, request, prompt(num_tokens, num_tokens), UNCUT)
        answers.append({name: ids(tokens) for name, tokens in decode_all(engine).items()})
    assert answers[0] == answers[1]


def test_sequences_of_one_prompt_have_windows_of_their_own(sliding: dict[str, Path]) -> None:
    engine = make_engine(load_model(sliding["qwen2"]))
    admit(engine, spec("both", 50, LONG, num_sequences=2), prompt(50), UNCUT)
    tokens = decode_all(engine)["both"]
    expected = reference.greedy(reference.load(sliding["qwen2"]), prompt(50), 60)
    assert ids(tokens, 0) == ids(tokens, 1) == expected
    assert_empty(engine)


def test_who_waits_in_host_memory_goes_on_with_its_windows(sliding: dict[str, Path]) -> None:
    model = load_model(sliding["qwen2"])
    shape, sampling = model.shape, replace(LONG, max_tokens=160)
    full = 2 * 2 * -(-200 // 16)  # pages of two full layers with two heads
    windowed = 2 * 2 * 3
    memory = int((1.5 * (full + windowed) + 1) * 16 * (shape.kv_bytes(1) + 4))
    engine = make_engine(model, memory=memory, overcommit=2.8, swap_bytes=1 << 30)
    for seed in range(4):
        admit(engine, spec(str(seed), 40, sampling), prompt(40, seed), UNCUT)
    answers = decode_all(engine)
    network = reference.load(sliding["qwen2"])
    for seed in range(4):
        assert ids(answers[str(seed)]) == reference.greedy(network, prompt(40, seed), 160)
    assert engine.preemption_stats.swapped_out >= 2
    assert engine.preemption_stats.given_up == 0
    assert_empty(engine)


def test_recompression_cuts_full_layers_and_leaves_windows_whole(
    sliding: dict[str, Path],
) -> None:
    engine = make_engine(load_model(sliding["qwen2"]))
    budget = {"decode_budget": 12, "recompress_interval": 4}
    request = spec("a", 70, LONG, max_prompt_entries=12, **budget)
    pruned = replace(UNCUT, method="snapkv", kv_budget=12)
    (row,) = admit(engine, request, prompt(70), pruned).rows
    for _ in range(40):
        engine.step()
    full, windowed = engine.pool.lengths([row])[0, :2], engine.pool.lengths([row])[0, 2:]
    assert full.max() <= 16
    assert windowed.min() >= 20
    assert windowed.max() < 20 + 16
    assert engine.recompression_stats.recompressions > 2
    decode_all(engine)
    assert_empty(engine)


def test_a_model_without_full_layers_has_nothing_to_recompress(sliding: dict[str, Path]) -> None:
    engine = make_engine(load_model(sliding["mistral"]))
    request = spec("a", 70, LONG, decode_budget=12, decode_floor=10, recompress_interval=1)
    admit(engine, request, prompt(70), UNCUT)
    tokens = ids(decode_all(engine)["a"])
    assert tokens == reference.greedy(reference.load(sliding["mistral"]), prompt(70), 60)
    assert engine.recompression_stats.recompressions == 0


def test_a_sequence_moves_on_with_what_its_windows_see(sliding: dict[str, Path]) -> None:
    """To pages of another size: there, less than is held here may be held."""
    model = load_model(sliding["qwen2"])
    engine, other = make_engine(model), make_engine(model, page_size=4)
    reservation = admit(engine, spec("a", 50, LONG), prompt(50), UNCUT)
    for _ in range(25):
        engine.step()
    tokens = tokens_after_a_move(engine, other, reservation, spec("a", 50, LONG))
    assert tokens == reference.greedy(reference.load(sliding["qwen2"]), prompt(50), 60)
    assert_empty(other)


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WindowedModel]:
    """Of layers of all kinds, with a softcap and sinks."""
    path = save_tiny_model(tmp_path_factory.mktemp("layered"), num_hidden_layers=6)
    network = theirs(path, torch.float32)
    return {
        name: WindowedModel(path, network, layers, extras=True) for name, layers in PATTERNS.items()
    }


@torch.inference_mode()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_tokens_are_those_of_the_formulas_with_masks_by_position(
    layered: dict[str, WindowedModel], pattern: str
) -> None:
    model, sampling = layered[pattern], replace(GREEDY, max_tokens=12)
    engine = make_engine(model, page_size=4)
    for num_tokens in (3, 40):
        admit(engine, spec(str(num_tokens), num_tokens, sampling), prompt(num_tokens), UNCUT)
    answers = decode_all(engine)
    for num_tokens in (3, 40):
        tokens = prompt(num_tokens)
        for token_id in ids(answers[str(num_tokens)]):
            every = list(range(len(tokens)))
            _, _, hidden = run_layers(model, tokens, UNCUT, every, None)
            assert token_id == int(model.logits(hidden[None]).argmax())
            tokens.append(token_id)
