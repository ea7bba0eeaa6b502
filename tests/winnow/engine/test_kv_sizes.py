"""Models whose layers differ in their KV heads, and in the numbers of a key and a value."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models_in_code import SIZED_FAMILIES, save_tiny_model
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
from tests.winnow.engine.from_store import assert_same, make_store, prefill
from tests.winnow.engine.moving import tokens_after_a_move
from tests.winnow.naive_recompression import assert_cut
from tests.winnow.windowed import prefill_by_formulas
from winnow.attention import StepAttention, decode_backend
from winnow.attention.options import AttentionOptions
from winnow.decoder import DecoderModel
from winnow.engine.kv_pool import KVPool, KVPoolConfig
from winnow.engine.prefix.store import PrefixStore
from winnow.kv import KV_DTYPES, KvDtype, KVSize, LayerKV, ModelShape
from winnow.layers import FULL, Layer
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings

PRUNED = replace(ASL, window_size=6, kv_budget=12, latest_layer=1, min_layer=1, observed_layers=1)
SETTINGS = {
    "full": replace(UNPRUNED, window_size=6),
    "snapkv": replace(PRUNED, method="snapkv"),
    "asl": PRUNED,
    "asl late": replace(PRUNED, latest_layer=3, min_layer=3, observed_layers=2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: save_tiny_model(tmp_path_factory.mktemp(family), family)
        for family in SIZED_FAMILIES
    }


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, DecoderModel]:
    return {family: load_model(folder) for family, folder in folders.items()}


def test_each_layer_has_its_own_size(models: dict[str, DecoderModel]) -> None:
    gemma4, mimo = models["gemma4"].shape, models["mimo_v2_flash"].shape
    assert gemma4.sizes == (KVSize(2, 32, 32), KVSize(1, 64, 64)) * 2
    assert gemma4.largest == KVSize(2, 64, 64)
    assert mimo.sizes == (KVSize(4, 24, 16), KVSize(2, 24, 16)) * 2
    assert mimo.largest == KVSize(4, 24, 24)
    assert (gemma4.total_kv_heads, mimo.total_kv_heads) == (6, 12)


@pytest.mark.parametrize("family", SIZED_FAMILIES)
def test_prompts_of_several_windows_get_the_tokens_of_generate(
    folders: dict[str, Path], models: dict[str, DecoderModel], family: str
) -> None:
    engine = make_engine(models[family])
    prompts = {str(n): prompt(n, seed=n) for n in (1, 19, 21, 70)}
    for name, token_ids in prompts.items():
        admit(engine, spec(name, len(token_ids), GREEDY), token_ids)
    answers = {name: ids(tokens) for name, tokens in decode_all(engine).items()}
    network = reference.load(folders[family], "eager")
    assert answers == {name: reference.greedy(network, own, 16) for name, own in prompts.items()}
    assert_empty(engine)


def test_layers_stay_of_two_kinds_where_no_sequence_is_as_long_as_the_window(
    folders: dict[str, Path],
) -> None:
    model, token_ids = load_model(folders["gemma4"], max_model_len=18), prompt(10)
    engine = make_engine(model)
    admit(engine, spec("a", 10, replace(GREEDY, max_tokens=8)), token_ids)
    theirs = reference.load(folders["gemma4"], "eager")
    assert ids(decode_all(engine)["a"]) == reference.greedy(theirs, token_ids, 8)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", SIZED_FAMILIES)
def test_prefill_is_what_the_formulas_give(
    models: dict[str, DecoderModel], family: str, name: str
) -> None:
    model, token_ids, settings = models[family], prompt(61), SETTINGS[name]
    wanted = prefill_by_formulas(model, token_ids, settings)
    layers, result = prefill_all(model, token_ids, settings)
    assert result.report.selection_layer == wanted.selection_layer
    assert (wanted.selection_layer is not None) == name.startswith("asl")
    for layer, kept, size in zip(layers, wanted.kept, model.shape.sizes, strict=True):
        assert [layer.positions[rows].tolist() for rows in layer.head_slices()] == kept
        assert (layer.keys.shape[1], layer.values.shape[1]) == (size.key_dim, size.value_dim)
    # Rounding differs, and gemma4 multiplies logits by 1.
    torch.testing.assert_close(result.final_hidden, wanted.final_hidden, rtol=1e-3, atol=1e-3)
    assert result.report.kv_bytes_kept == sum(
        layer.keys.nbytes + layer.values.nbytes for layer in layers
    )


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", ["full", "asl", "asl late"])
@pytest.mark.parametrize("family", SIZED_FAMILIES)
def test_from_the_prefix_store_as_from_scratch(
    models: dict[str, DecoderModel], family: str, name: str, kv_dtype: KvDtype
) -> None:
    model, settings, beginning = models[family], SETTINGS[name], prompt(50)
    store = PrefixStore(model, 1 << 24, block_tokens=16, kv_dtype=kv_dtype)
    for seed in (1, 2):
        token_ids = beginning + prompt(20, seed)
        from_store = prefill(model, token_ids, settings, store)
        if kv_dtype == "auto":
            assert_same(from_store, prefill(model, token_ids, settings), atol=1e-3)
    assert from_store[1].report.num_cached_tokens == 48
    assert store.stats().hit_tokens == 48


def test_the_prefix_store_holds_each_layer_without_padding(
    models: dict[str, DecoderModel],
) -> None:
    model = models["gemma4"]
    store = make_store(model)
    prefill(model, prompt(16), SETTINGS["full"], store)
    shape = model.shape
    frontier_bytes = 16 * shape.hidden_size * 4
    assert store.stats().used_bytes == shape.sent_bytes([32, 16] * 2) + frontier_bytes


@pytest.mark.parametrize("family", SIZED_FAMILIES)
def test_replayed_steps_give_what_launched_ones_give(
    models: dict[str, DecoderModel], family: str
) -> None:
    answers = []
    for new_recorder in (None, EagerRecorder):
        engine = make_engine(models[family], new_recorder=new_recorder, rows=4)
        for num_tokens in (5, 50):
            admit(engine, spec(str(num_tokens), num_tokens, GREEDY), prompt(num_tokens))
        answers.append({name: ids(tokens) for name, tokens in decode_all(engine).items()})
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("family", ["gemma4", "mimo_v2_flash"])
def test_who_waits_in_host_memory_goes_on(
    models: dict[str, DecoderModel], family: str, kv_dtype: KvDtype
) -> None:
    model, sampling = models[family], replace(GREEDY, max_tokens=120)
    requests = {str(seed): spec(str(seed), 10, sampling) for seed in range(3)}
    roomy = make_engine(model, kv_dtype=kv_dtype)
    num_pages = int(1.5 * roomy.pool.pages_for(130, 130)) + 1
    tight = make_engine(
        model,
        memory=num_pages * 16 * (model.shape.kv_bytes(1, kv_dtype) + 4),
        overcommit=2.5,
        swap_bytes=1 << 30,
        kv_dtype=kv_dtype,
    )
    answers = []
    for engine in (roomy, tight):
        for seed, request in enumerate(requests.values()):
            admit(engine, request, prompt(10, seed))
        answers.append({name: ids(tokens) for name, tokens in decode_all(engine).items()})
        assert_empty(engine)
    assert answers[0] == answers[1]
    assert roomy.preemption_stats.swapped_out == 0 < tight.preemption_stats.swapped_out


@pytest.mark.parametrize("family", SIZED_FAMILIES)
def test_a_sequence_moves_on_to_pages_of_another_size(
    folders: dict[str, Path], models: dict[str, DecoderModel], family: str
) -> None:
    model, token_ids = models[family], prompt(50)
    sampling = replace(GREEDY, max_tokens=40)
    engine, other = make_engine(model), make_engine(model, page_size=4)
    reservation = admit(engine, spec("a", 50, sampling), token_ids)
    for _ in range(15):
        engine.step()
    tokens = tokens_after_a_move(engine, other, reservation, spec("a", 50, sampling))
    network = reference.load(folders[family], "eager")
    assert tokens == reference.greedy(network, token_ids, 40)
    assert_empty(other)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("method", ["snapkv", "rkv"])
@pytest.mark.parametrize("family", SIZED_FAMILIES)
def test_recompression_cuts_each_head_of_full_layers_as_the_rule_says(
    models: dict[str, DecoderModel], family: str, method: str, kv_dtype: KvDtype
) -> None:
    engine = make_engine(models[family], kv_dtype=kv_dtype)
    request = spec("a", 30, GREEDY, method=method, decode_budget=24, recompress_interval=100)
    reservation = admit(engine, request, prompt(30))
    for _ in range(10):
        engine.step()
    (seq,) = reservation.sequences
    before = [seq.read_layer(engine.pool, idx) for idx in range(4)]
    cutter = engine._recompressor
    cutter.cut([seq])
    assert cutter.options is not None
    for layer, kind in zip(before, engine.model.shape.layers, strict=True):
        after = seq.read_layer(engine.pool, layer.layer_idx)
        assert torch.equal(after.window_queries, layer.window_queries)
        if kind.is_full:
            # The formulas divide by the root of the numbers of a key.
            factor = cutter.options[layer.layer_idx].scaling * layer.keys.shape[1] ** 0.5
            like = replace(layer, window_queries=layer.window_queries * factor)
            assert_cut(like, after, seq.spec.recompression, 24)
        else:
            assert after.head_lengths == layer.head_lengths
    decode_all(engine)
    assert_empty(engine)


SIZES = (KVSize(4, 32, 32), KVSize(1, 64, 32), KVSize(2, 64, 64))


@torch.inference_mode()
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_attends_with_the_numbers_and_heads_of_each_layer(
    dtype: torch.dtype, sinks: bool
) -> None:
    """By the kernel that reads pages in place, where there is one for the dtype."""
    window = Layer("sliding", 40)
    shape = ModelShape(3, 8, 4, 64, 32, dtype, (window, FULL, window), own_sizes=SIZES)
    pool = KVPool(shape, KVPoolConfig(4 << 20), 4, torch.device("cpu"))
    lengths, rows = (33, 7), (2, 0)
    random = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random).to(dtype)

    held = [
        [
            (drawn(n, size.num_kv_heads, size.key_dim), drawn(n, size.num_kv_heads, size.value_dim))
            for n in lengths
        ]
        for size in SIZES
    ]
    for layer_idx, size in enumerate(SIZES):
        for row, length, (keys, values) in zip(rows, lengths, held[layer_idx], strict=True):
            pool.write_layer(
                row,
                LayerKV(
                    layer_idx,
                    keys.transpose(0, 1).flatten(0, 1),
                    values.transpose(0, 1).flatten(0, 1),
                    torch.arange(length, dtype=torch.int32).repeat(size.num_kv_heads),
                    (length,) * size.num_kv_heads,
                    drawn(8, 0, size.key_dim),
                ),
            )
    sent, longest = pool.begin_step([*rows], [*lengths], [[*rows], [*lengths]])
    plan = pool.plan_step(sent[0], sent[1], longest)
    attention = StepAttention(decode_backend(pool, *shape.groups), plan, shape)
    for layer_idx, size in enumerate(SIZES):
        query = drawn(2, 8, 1, size.key_dim)
        key, value = (
            drawn(2, size.num_kv_heads, 1, size.key_dim),
            drawn(2, size.num_kv_heads, 1, size.value_dim),
        )
        sink = drawn(8) if sinks else None
        options = AttentionOptions(0.2, shape.layers[layer_idx], sinks=sink)
        output = attention(layer_idx, query, key, value, options)
        group = 8 // size.num_kv_heads
        for idx, (keys, values) in enumerate(held[layer_idx]):
            every = torch.cat([keys.transpose(0, 1), key[idx]], dim=1).repeat_interleave(group, 0)
            logits = query[idx].double() @ every.double().mT * 0.2  # [8, 1, N]
            weights = logits.exp()
            rest = 0 if sink is None else sink.double().exp()[:, None, None]
            weights = weights / (weights.sum(-1, keepdim=True) + rest)
            of = torch.cat([values.transpose(0, 1), value[idx]], dim=1).repeat_interleave(group, 0)
            wanted = (weights @ of.double()).to(dtype)
            atol = 1e-5 if dtype == torch.float32 else 0.03
            torch.testing.assert_close(output[idx], wanted, rtol=1e-2, atol=atol)


def test_pages_are_taken_for_the_heads_that_layers_have(models: dict[str, DecoderModel]) -> None:
    pool = make_engine(models["gemma4"]).pool
    layers, _ = prefill_all(models["gemma4"], prompt(16), SETTINGS["full"])
    for layer in layers:
        pool.write_layer(0, layer)
    assert pool.num_used == pool.pages_for(16, 16) == models["gemma4"].shape.total_kv_heads
    for layer in layers:
        back = pool.read_layer(0, layer.layer_idx, layer.window_queries)
        assert torch.equal(back.keys, layer.keys)
        assert torch.equal(back.values, layer.values)
        assert back.head_lengths == layer.head_lengths


def test_methods_run_on_such_layers(models: dict[str, DecoderModel]) -> None:
    settings = PruningSettings(window_size=6, kernel_size=3, select_tokens=16, kv_budget=12)
    for method in ("streaming", "h2o", "fastkv", "gemfilter", "asl-2pass"):
        own = replace(
            settings, method=method, fixed_layer=1, latest_layer=1, min_layer=1, observed_layers=1
        )
        layers, result = prefill_all(models["gemma4"], prompt(60), own)
        assert len(layers) == 4
        assert result.final_hidden.isfinite().all()
