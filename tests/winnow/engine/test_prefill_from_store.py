"""From the prefix store = from scratch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models_in_code import FAMILIES, VOCAB_SIZE, save_tiny_model
from tests.winnow.drive import UNPRUNED, all_layers, prompt
from tests.winnow.engine.from_store import BLOCK, assert_same, make_store, prefill
from tests.winnow.methods.small_runs import SMALL, answer
from winnow.catalog import METHODS
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.kv import LayerKV
from winnow.methods import method_class
from winnow.methods.base import Cut, LayerView
from winnow.models import load_model
from winnow.wire.messages import report_from_proto, report_to_proto

WITH_PREFIX = [name for name in METHODS if method_class(name).no_prefix_reason() is None]
WITHOUT_PREFIX = [name for name in METHODS if name not in WITH_PREFIX]
FASTKV = replace(SMALL, method="fastkv", fixed_layer=1)


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, Path]) -> dict[str, DecoderModel]:
    return {family: load_model(path) for family, path in tiny_models.items()}


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    """Its last two layers attend with the keys and values of the first two."""
    return load_model(save_tiny_model(tmp_path_factory.mktemp("sharing"), "gemma4_sharing"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", WITH_PREFIX)
def test_a_follow_up_gets_what_it_gets_from_scratch(
    models: dict[str, DecoderModel], family: str, method: str
) -> None:
    model, pruning = models[family], replace(SMALL, method=method)
    store, document = make_store(model), prompt(60)
    for seed, question in ((1, 10), (2, 20), (3, 3)):
        token_ids = document + prompt(question, seed)
        found = prefill(model, token_ids, pruning, store)
        assert_same(found, prefill(model, token_ids, pruning))
        report = found[1].report
        assert report.no_prefix_reason is None
        assert report.num_cached_tokens == (0 if seed == 1 else 48)
        assert report.num_computed_tokens == len(token_ids) - report.num_cached_tokens
    assert store.stats().num_blocks_in_use == 0


@pytest.mark.parametrize("method", WITHOUT_PREFIX)
def test_methods_that_cannot_use_the_store_say_why(
    models: dict[str, DecoderModel], method: str
) -> None:
    model, pruning = models["llama"], replace(SMALL, method=method)
    store = make_store(model)
    prefill(model, prompt(60), replace(SMALL, method="full"), store)
    report = prefill(model, prompt(60), pruning, store)[1].report
    assert (report.num_cached_tokens, report.saved_layer_tokens) == (0, 0)
    assert report.no_prefix_reason == {
        "h2o": "needs_all_queries",
        "pyramidinfer": "drops_from_layer_0",
    }.get(method)
    assert store.stats().looked_up_tokens == 60, "of the first prompt only"


@st.composite
def conversations(draw: st.DrawFn) -> list[list[int]]:
    """Prompts that begin alike, up to somewhere."""
    token = st.integers(0, 3) if draw(st.booleans()) else st.integers(0, VOCAB_SIZE - 1)
    prompts: list[list[int]] = []
    for _ in range(draw(st.integers(2, 4))):
        known = draw(st.sampled_from(prompts)) if prompts else []
        shared = draw(st.integers(0, len(known))) if draw(st.booleans()) else len(known)
        new = draw(st.lists(token, min_size=shared == 0, max_size=70))
        prompts.append(known[:shared] + new)
    return prompts


@pytest.mark.parametrize("location", ["device", "host", "both"])
@given(
    prompts=conversations(),
    methods=st.lists(st.sampled_from(WITH_PREFIX), min_size=1, max_size=3),
    layers=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    threshold=st.sampled_from([0.2, 0.9, 1.2]),
    num_blocks=st.integers(1, 12),
)
@settings(max_examples=40, derandomize=True)
def test_any_conversation_within_any_memory_gets_what_it_gets_from_scratch(
    models: dict[str, DecoderModel],
    location: str,
    prompts: list[list[int]],
    methods: list[str],
    layers: list[int],
    threshold: float,
    num_blocks: int,
) -> None:
    model = models["qwen3"]
    store = make_store(model, num_blocks * (4 << 12), location)
    for idx, token_ids in enumerate(prompts):
        pruning = replace(
            SMALL,
            method=methods[idx % len(methods)],
            fixed_layer=layers[idx % len(layers)],
            latest_layer=None,
            threshold=threshold,
        )
        found = prefill(model, token_ids, pruning, store)
        assert_same(found, prefill(model, token_ids, pruning))
    stats = store.stats()
    assert (stats.num_blocks_in_use, stats.damaged_blocks) == (0, 0)
    assert stats.used_bytes <= stats.max_bytes


@pytest.mark.parametrize(
    ("num_first", "num_second", "num_cached"),
    [
        (BLOCK - 1, 40, 0),  # shorter than a block
        (BLOCK + 5, 40, BLOCK),  # ends inside a block
        (64, 64, 56),  # the whole prompt: the window is computed
        (64, 67, 59),
        (64, 72, 64),
        (64, 30, 16),
        (64, 9, 0),
        (64, 5, 0),
    ],
)
def test_at_least_the_window_is_computed(
    models: dict[str, DecoderModel], num_first: int, num_second: int, num_cached: int
) -> None:
    model, document = models["llama"], prompt(80)
    for pruning in (replace(SMALL, method="full"), FASTKV):
        store = make_store(model)
        prefill(model, document[:num_first], pruning, store)
        found = prefill(model, document[:num_second], pruning, store)
        assert_same(found, prefill(model, document[:num_second], pruning))
        assert found[1].report.num_cached_tokens == num_cached
        stats = store.stats()
        assert stats.looked_up_tokens == num_first + num_second
        assert stats.hit_tokens == num_cached


@pytest.mark.parametrize("earlier", range(4))
@pytest.mark.parametrize("later", range(4))
def test_only_a_question_that_selects_earlier_computes_selected_tokens_again(
    models: dict[str, DecoderModel], earlier: int, later: int
) -> None:
    model, document = models["qwen2"], prompt(96)
    store = make_store(model)
    prefill(model, document + prompt(10, 1), replace(FASTKV, fixed_layer=earlier), store)
    token_ids, pruning = document + prompt(12, 2), replace(FASTKV, fixed_layer=later)
    found, expected = prefill(model, token_ids, pruning, store), prefill(model, token_ids, pruning)
    assert_same(found, expected)
    report = found[1].report
    again = report.num_recomputed_tokens
    assert (again > 0) == (later < earlier)
    computed = 12 * (later + 1) + 96 * max(0, later - earlier) + again * (later + 1)
    saved = 108 * (later + 1) - computed
    assert report.saved_layer_tokens == saved
    assert expected[1].report.computed_share - report.computed_share == pytest.approx(
        saved / (4 * 108)
    )


def test_a_prompt_scored_whole_gets_the_hidden_states_of_cached_tokens(
    models: dict[str, DecoderModel],
) -> None:
    model, full = models["phi3"], replace(SMALL, method="full")
    store, token_ids = make_store(model), prompt(70)
    prefill(model, token_ids, FASTKV, store)  # is deep enough for two layers only
    for _ in range(2):
        found = prefill(model, token_ids, full, store)
        assert found[1].hidden is not None
        assert found[1].hidden.shape == (70, 64)
        assert_same(found, prefill(model, token_ids, full))
    assert found[1].report.num_cached_tokens == 62


def test_greedy_answers_are_the_same(models: dict[str, DecoderModel]) -> None:
    model = models["mistral"]
    for method in METHODS:
        pruning, store = replace(SMALL, method=method), make_store(model)
        for seed in (1, 2):
            token_ids = prompt(60) + prompt(12, seed)
            expected = answer(model, token_ids, pruning)
            assert answer(model, token_ids, pruning, store) == expected


def test_salts_share_nothing(models: dict[str, DecoderModel]) -> None:
    model, token_ids = models["llama"], prompt(60)
    store = make_store(model)
    cached = [
        prefill(model, token_ids, FASTKV, store, salt)[1].report.num_cached_tokens
        for salt in ("", "a", "b", "a", "", "c")
    ]
    assert cached == [0, 0, 0, 48, 48, 0]


def test_models_share_nothing(models: dict[str, DecoderModel]) -> None:
    one, other = (models[family] for family in ("llama", "mistral"))
    assert make_store(one).hashes(prompt(60), "") != make_store(other).hashes(prompt(60), "")


def test_runs_at_the_same_time_use_what_the_others_have_computed(
    models: dict[str, DecoderModel],
) -> None:
    model, document = models["llama"], prompt(64)
    store, full = make_store(model), replace(SMALL, method="full")
    prompts = [document + prompt(10, seed) for seed in range(3)]
    runs = [PrefillRun(model, token_ids, full, store=store, is_long=False) for token_ids in prompts]
    layers: list[list[LayerKV]] = [[], [], []]
    while not runs[0].finished:
        for run, done in zip(runs, layers, strict=True):
            layer = run.compute_layer()
            assert layer is not None
            done.append(layer)
    for run, done, token_ids in zip(runs, layers, prompts, strict=True):
        assert_same((done, run.result(keep_hidden=True)), prefill(model, token_ids, full))
    assert [run.result().report.num_cached_tokens for run in runs] == [0, 64, 64]
    assert store.stats().hit_tokens == 128


def test_a_run_that_was_overtaken_may_save_nothing(models: dict[str, DecoderModel]) -> None:
    """Its selected tokens were computed in the layers before, and are computed again alone."""
    model, document = models["llama"], prompt(160)
    store, token_ids = make_store(model), document + prompt(10, 1)
    pruning = replace(FASTKV, fixed_layer=2, select_tokens=120)
    run = PrefillRun(model, token_ids, pruning, store=store, is_long=False)
    layers = [run.compute_layer(), run.compute_layer()]
    prefill(model, document + prompt(5, 2), UNPRUNED, store)
    layers += all_layers(run)
    found = [layer for layer in layers if layer is not None], run.result(keep_hidden=True)
    assert_same(found, prefill(model, token_ids, pruning))
    report = found[1].report
    assert report.num_recomputed_tokens > 0
    assert report.saved_layer_tokens == 0
    assert report_from_proto(report_to_proto(report)) == report


@pytest.mark.parametrize("location", ["device", "host", "both"])
@given(data=st.data(), num_blocks=st.integers(1, 12))
@settings(max_examples=40, derandomize=True)
def test_runs_in_any_order_within_any_memory_get_what_they_get_from_scratch(
    models: dict[str, DecoderModel], location: str, data: st.DataObject, num_blocks: int
) -> None:
    """In host memory, whatever is damaged meanwhile."""
    run_in_any_order(models["qwen2"], location, data, num_blocks)


@given(data=st.data(), num_blocks=st.integers(1, 12))
@settings(max_examples=20, derandomize=True)
def test_so_do_layers_that_share_keys_and_values(
    sharing: DecoderModel, data: st.DataObject, num_blocks: int
) -> None:
    run_in_any_order(sharing, "host", data, num_blocks, atol=1e-3)


def run_in_any_order(
    model: DecoderModel, location: str, data: st.DataObject, num_blocks: int, atol: float = 1e-5
) -> None:
    document, shape = prompt(64), model.shape
    block_bytes = shape.num_layers * shape.kv_bytes(BLOCK * shape.num_kv_heads)
    store = make_store(model, num_blocks * block_bytes, location)
    prompts = [document[: 20 + 20 * seed] + prompt(30, seed) for seed in range(3)]
    pruning = [replace(FASTKV, fixed_layer=shape.nearest_full(idx)) for idx in (2, 1, 3)]
    runs: dict[int, PrefillRun] = {}
    layers: dict[int, list[LayerKV]] = {}
    turns = data.draw(st.lists(st.integers(0, 3), min_size=12, max_size=24))
    for idx in [*turns, *[0] * 4, *[1] * 4, *[2] * 4]:
        if idx == 3:
            damage_any(store, data)
            continue
        if idx not in runs:
            runs[idx] = PrefillRun(model, prompts[idx], pruning[idx], store=store, is_long=False)
            layers[idx] = []
        if not runs[idx].finished:
            layer = runs[idx].compute_layer()
            assert layer is not None
            layers[idx].append(layer)
    for idx, run in runs.items():
        found = layers[idx], run.result(keep_hidden=True)
        assert_same(found, prefill(model, prompts[idx], pruning[idx]), atol)
    assert store.stats().num_blocks_in_use == 0
    assert store.stats().used_bytes <= store.stats().max_bytes


@torch.inference_mode()
def damage_any(store: PrefixStore, data: st.DataObject) -> None:
    """Change a stored tensor that has a checksum, if there is one."""
    parts = [one for block in store._blocks.values() for one in (*block.layers, block.frontier)]
    checked = [one for one in parts if one is not None and one.checksum is not None]
    if checked:
        data.draw(st.sampled_from(checked)).tensor.view(-1)[7] -= 1.0


@torch.inference_mode()
def damage(store: PrefixStore, block_idx: int, part: int) -> None:
    """Change a layer (-1: the frontier) of the only chain's block of this index."""
    block = list(store._blocks.values())[block_idx]
    stored = block.frontier if part < 0 else block.layers[part]
    assert stored is not None
    stored.tensor.view(-1)[5] += 1.0


@pytest.mark.parametrize("part", [-1, 0, 1, 2])
@pytest.mark.parametrize("block_idx", [0, 2, 3])
@pytest.mark.parametrize("last_layer", [1, 2, 3])
@pytest.mark.parametrize("before_layer", [0, 2])
def test_a_damaged_block_is_computed_anew(
    models: dict[str, DecoderModel], part: int, block_idx: int, last_layer: int, before_layer: int
) -> None:
    """Whether it was damaged before the run, or while it is under way."""
    model, document = models["llama"], prompt(70)
    store = make_store(model, location="host")
    prefill(model, document, replace(FASTKV, fixed_layer=2), store)
    pruning = replace(FASTKV, fixed_layer=last_layer)
    run = PrefillRun(model, document + prompt(9, 1), pruning, store=store, is_long=False)
    layers = [run.compute_layer() for _ in range(before_layer)]
    damage(store, block_idx, part)
    layers += all_layers(run)
    found = [layer for layer in layers if layer is not None], run.result(keep_hidden=True)
    assert_same(found, prefill(model, document + prompt(9, 1), pruning))
    for _ in range(2):  # the first may be the one that reads what is damaged
        after = prefill(model, document + prompt(9, 1), pruning, store)
        assert_same(after, found)
    assert after[1].report.num_cached_tokens == 64
    assert store.stats().damaged_blocks <= 1
    assert store.stats().num_blocks_in_use == 0


def test_damage_shows_in_the_statistics(models: dict[str, DecoderModel]) -> None:
    model, token_ids = models["llama"], prompt(80)
    store = make_store(model, location="host")
    prefill(model, token_ids, FASTKV, store)
    damage(store, 1, 0)
    report = prefill(model, token_ids, FASTKV, store)[1].report
    assert store.stats().damaged_blocks == 1
    assert report.num_cached_tokens == 16
    assert store.stats().num_blocks == 5


@pytest.mark.parametrize("num_layers", range(4))
@pytest.mark.parametrize("end", ["close", "drop", "fail"])
def test_a_run_that_does_not_finish_leaves_what_it_computed(
    models: dict[str, DecoderModel],
    num_layers: int,
    end: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, token_ids, full = models["llama"], prompt(70), UNPRUNED
    store = make_store(model)
    run = PrefillRun(model, token_ids, full, store=store, is_long=False)
    for _ in range(num_layers):
        run.compute_layer()
    if end == "close":
        run.close()
    elif end == "fail":
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
            patch.setattr(model, "layer", lambda *_: raise_(RuntimeError("out of memory")))
            run.compute_layer()
    else:
        del run
        store.release_abandoned()
    stats = store.stats()
    assert (stats.num_blocks_in_use, stats.num_blocks) == (0, 4 if num_layers else 0)
    assert set(store.held().values()) == ({num_layers} if num_layers else set())
    found = prefill(model, token_ids, full, store)
    assert_same(found, prefill(model, token_ids, full))
    saved = num_layers * 62  # the window is computed in any case
    assert found[1].report.saved_layer_tokens == saved


def raise_(error: Exception) -> None:
    raise error


def test_a_store_that_is_full_of_what_others_use_is_done_without(
    models: dict[str, DecoderModel],
) -> None:
    model = models["llama"]
    store = make_store(model, 3 * (4 << 12))
    held = PrefillRun(model, prompt(64, 1), UNPRUNED, store=store, is_long=False)
    held.compute_layer()
    found = prefill(model, prompt(64, 2), UNPRUNED, store)
    assert_same(found, prefill(model, prompt(64, 2), UNPRUNED))
    assert store.stats().evicted_blocks == 0
    held.close()
    prefill(model, prompt(64, 2), UNPRUNED, store)
    assert store.stats().evicted_blocks > 0


def test_the_end_of_a_prefix_may_be_evicted_while_a_run_uses_its_beginning(
    models: dict[str, DecoderModel],
) -> None:
    model, document = models["llama"], prompt(64)
    store = make_store(model, 12 * (4 << 12))
    prefill(model, document, UNPRUNED, store)
    run = PrefillRun(model, document[:32] + prompt(16, 1), UNPRUNED, store=store, is_long=False)
    layer = run.compute_layer()
    prefill(model, prompt(100, 2), UNPRUNED, store)
    assert store.stats().evicted_blocks > 0
    layers = [one for one in [layer, *all_layers(run)] if one is not None]
    expected = prefill(model, document[:32] + prompt(16, 1), UNPRUNED)
    found = layers, run.result(keep_hidden=True)
    assert_same(found, expected)
    assert found[1].report.saved_layer_tokens == 4 * 32


def test_whoever_watches_sees_the_whole_prompt(models: dict[str, DecoderModel]) -> None:
    model, token_ids = models["llama"], prompt(60)
    store = make_store(model)
    seen: list[list[int]] = [[], []]
    for sizes in seen:

        def watch(view: LayerView, cut: Cut | None, sizes: list[int] = sizes) -> None:
            sizes.append(view.num_tokens)

        run = PrefillRun(model, token_ids, FASTKV, watch, store=store, is_long=False)
        all_layers(run)
    assert seen[0] == seen[1] == [60, 60, 24, 24]


def test_bfloat16_selects_the_same_tokens(tmp_path: Path) -> None:
    model = load_model(save_tiny_model(tmp_path, "qwen2", dtype=torch.bfloat16))
    store, document = make_store(model), prompt(64)
    for seed in range(3):
        token_ids = document + prompt(10, seed)
        layers, result = prefill(model, token_ids, FASTKV, store)
        others, expected = prefill(model, token_ids, FASTKV)
        assert result.report.num_selected_tokens == expected.report.num_selected_tokens
        for layer, like in zip(layers, others, strict=True):
            assert torch.equal(layer.positions, like.positions)
        torch.testing.assert_close(result.final_hidden, expected.final_hidden, rtol=0.05, atol=0.05)
