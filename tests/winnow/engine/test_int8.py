"""Decoding and prefilling from int8 keys and values."""

from pathlib import Path

import pytest
import torch

from tests.winnow.drive import (
    ASL,
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
from winnow.decoder import DecoderModel
from winnow.engine.generation_spec import promise_for
from winnow.engine.prefix.store import PrefixStore
from winnow.kv import KV_DTYPES
from winnow.models import load_model
from winnow.sampling_params import SamplingParams
from winnow.tokens import Token

NUM_TOKENS = 100
SAMPLING = SamplingParams(max_tokens=120, temperature=0.8, seed=3, num_logprobs=2, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> DecoderModel:
    return load_model(tiny_models["qwen2"])


@pytest.mark.parametrize(
    ("times", "more"), [(1.5, {}), (3, {"decode_budget": 40, "recompress_interval": 8})]
)
def test_what_shares_the_pool_and_waiting_in_host_memory_change_no_token(
    model: DecoderModel, times: float, more: dict[str, int]
) -> None:
    alone: dict[str, list[Token]] = {}
    requests = {str(seed): spec(str(seed), 30, SAMPLING, **more) for seed in range(4)}
    for seed, request in enumerate(requests.values()):
        engine = make_engine(model, kv_dtype="int8")
        admit(engine, request, prompt(30, seed))
        alone |= decode_all(engine)
    num_pages = int(times * promise_for(engine.pool, request).most) + 1
    tight = make_engine(
        model,
        memory=num_pages * 16 * (model.shape.kv_bytes(1, "int8") + 4),
        overcommit=4 / times + 0.01,
        swap_bytes=1 << 30,
        kv_dtype="int8",
    )
    for seed, request in enumerate(requests.values()):
        admit(tight, request, prompt(30, seed))
    together = decode_all(tight)
    assert tight.preemption_stats.swapped_out >= 1
    assert (tight.recompression_stats.recompressions > 0) == bool(more)
    assert {name: ids(tokens) for name, tokens in together.items()} == {
        name: ids(tokens) for name, tokens in alone.items()
    }
    assert_empty(tight)


def test_log_probabilities_are_close_to_those_of_exact_keys_and_values(
    model: DecoderModel,
) -> None:
    token_ids, forced = prompt(NUM_TOKENS), tuple(prompt(40, seed=9))
    ends = []
    for kv_dtype in KV_DTYPES:
        engine = make_engine(model, kv_dtype=kv_dtype)
        admit(engine, spec("r", NUM_TOKENS, SAMPLING, replayed=(forced,)), token_ids)
        ends.append(decode_all(engine)["r"][0])
    exact, quantized = (token.logprobs for token in ends)
    assert exact is not None and quantized is not None
    assert exact.top[0][0] == quantized.top[0][0]
    assert exact.top[0][1] == pytest.approx(quantized.top[0][1], abs=0.2)
    assert exact.top[0][1] != quantized.top[0][1]


def test_kv_memory_of_a_float32_model_holds_nearly_four_times_the_entries(
    model: DecoderModel,
) -> None:
    auto, int8 = (make_engine(model, kv_dtype=kv_dtype).pool for kv_dtype in KV_DTYPES)
    per_entry = [model.shape.kv_bytes(1, pool.kv_dtype) + 4 for pool in (auto, int8)]
    assert int8.num_pages / auto.num_pages == pytest.approx(per_entry[0] / per_entry[1], rel=0.01)


@pytest.mark.parametrize("location", ["device", "host"])
def test_a_prefix_in_int8_gives_nearly_the_same_keys_and_values(
    model: DecoderModel, location: str
) -> None:
    shape, token_ids = model.shape, prompt(NUM_TOKENS)
    store = PrefixStore(model, 1 << 24, location=location, block_tokens=16, kv_dtype="int8")
    exact, _ = prefill_all(model, token_ids, UNPRUNED)
    first, _ = prefill_all(model, token_ids, UNPRUNED, store)
    again, result = prefill_all(model, token_ids, UNPRUNED, store)
    assert result.report.num_cached_tokens == 92  # the window is computed
    layer_bytes = shape.kv_bytes(16 * shape.num_kv_heads, "int8")
    frontier_bytes = 16 * shape.hidden_size * shape.dtype.itemsize
    assert store.stats().used_bytes == 6 * (shape.num_layers * layer_bytes + frontier_bytes)
    for one, other, cached in zip(exact, first, again, strict=True):
        assert torch.equal(one.keys, other.keys)  # a run reads what it computed itself
        for name in ("keys", "values"):
            error = (getattr(one, name) - getattr(cached, name)).abs().max()
            assert 0 < error < getattr(one, name).abs().max() / 50


def test_a_pruned_prompt_from_an_int8_prefix_selects_as_from_scratch(model: DecoderModel) -> None:
    store = PrefixStore(model, 1 << 24, block_tokens=16, kv_dtype="int8")
    prefill_all(model, prompt(NUM_TOKENS), ASL, store)
    layers, result = prefill_all(model, prompt(NUM_TOKENS), ASL, store)
    scratch, expected = prefill_all(model, prompt(NUM_TOKENS), ASL)
    assert result.report.num_cached_tokens > 0
    assert result.report.selection_layer == expected.report.selection_layer
    assert result.report.layer_entries == expected.report.layer_entries
    assert len(layers) == len(scratch)
