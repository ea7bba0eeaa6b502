"""Decoding on a device that the host never waits for; only sampled tokens are read from it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.models_in_code import FAMILIES
from tests.winnow.drive import (
    GREEDY,
    UNPRUNED,
    assert_empty,
    make_engine,
    prefill_all,
    prompt,
    spec,
)
from tests.winnow.eager_recorder import EagerRecorder
from tests.winnow.no_waiting import META, no_waiting
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.graph import StepGraphs
from winnow.grammar import Grammar
from winnow.grammar.compiler import GrammarCompiler
from winnow.kv import KvDtype
from winnow.models import load_model
from winnow.sampling import Sampled, SampledBatch
from winnow.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def tokens_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(batch: SampledBatch) -> list[Sampled]:
        return [Sampled(7)] * len(batch.positions)

    monkeypatch.setattr(SampledBatch, "read", read)


def on_meta(model: DecoderModel, rows: int = 32, **more: Any) -> DecodeEngine:
    network = model._model.to(META)
    return make_engine(DecoderModel(network, model.description, META), rows=rows, **more)


@pytest.mark.parametrize(
    ("family", "kv_dtype"), [*((family, "auto") for family in FAMILIES), ("llama", "int8")]
)
@pytest.mark.parametrize("method", ["snapkv", "rkv"])
def test_no_part_of_decoding_waits_for_the_device(
    tiny_models: dict[str, Path], family: str, kv_dtype: KvDtype, method: str
) -> None:
    """Two groups of rows of like length, two answers per prompt, and recompression."""
    model = load_model(tiny_models[family])
    prefilled = {n: prefill_all(model, prompt(n), UNPRUNED) for n in (17, 40, 1100)}
    engine = on_meta(model, kv_dtype=kv_dtype)
    with no_waiting():
        for length, (layers, result) in prefilled.items():
            own = {"decode_budget": 30, "recompress_interval": 4, "method": method}
            request = spec(str(length), length, GREEDY, num_sequences=2, **own)
            reservation = engine.reserve(request)
            for layer in layers:
                reservation.write_layer(layer)
            engine.start(reservation, result.final_hidden, result.report.next_position)
        outputs = [output for _ in range(GREEDY.max_tokens) for output in engine.step()]
    assert [output.error for output in outputs if output.error] == []
    assert sum(output.finished for output in outputs) == len(prefilled)
    assert engine.recompression_stats.recompressions > 4  # again as they grow
    assert_empty(engine)


@pytest.mark.parametrize("decode_budget", [None, 30])
def test_no_step_that_is_replayed_waits_for_the_device(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, decode_budget: int | None
) -> None:
    """Nor one whose steps are recorded again, as a head outgrows the table on the device."""
    model = load_model(tiny_models["llama"])
    prefilled = {n: prefill_all(model, prompt(n), UNPRUNED) for n in (17, 40, 300)}
    monkeypatch.setattr(StepGraphs, "_try_out", StepGraphs._recording)  # which reads logits
    monkeypatch.setattr("winnow.engine.table_mirror._FIRST_WIDTH", 16)
    engine = on_meta(model, rows=8, new_recorder=EagerRecorder)
    assert engine._runner.reads_late
    sampling = replace(GREEDY, temperature=1.0, top_p=0.9)
    with no_waiting():
        for length, (layers, result) in prefilled.items():
            own = {"decode_budget": decode_budget, "recompress_interval": 4}
            request = spec(str(length), length, sampling, num_sequences=2, **own)
            reservation = engine.reserve(request)
            for layer in layers:
                reservation.write_layer(layer)
            engine.start(reservation, result.final_hidden, result.report.next_position)
            engine.step()
            engine.step()
        outputs = [output for _ in range(GREEDY.max_tokens + 1) for output in engine.step()]
    assert [output.error for output in outputs if output.error] == []
    assert engine._runner.reads_late
    assert_empty(engine)


def test_no_request_that_ends_early_waits_for_the_device(tiny_models: dict[str, Path]) -> None:
    """While its KV arrives, before another attempt, and while it runs."""
    model = load_model(tiny_models["llama"])
    layers, result = prefill_all(model, prompt(100), UNPRUNED)
    engine = on_meta(model, rows=1)
    with no_waiting():
        leaving = engine.reserve(spec("leaves", 100, GREEDY, decode_budget=50))
        leaving.write_layer(layers[0])
        engine.release(leaving)
        again = engine.reserve(spec("again", 100, GREEDY, decode_budget=50))
        again.write_layer(layers[0])
        again.reset()
        for layer in layers:
            again.write_layer(layer)
        engine.start(again, result.final_hidden, result.report.next_position)
        engine.step()
        engine.step()
        engine.release(again)
        engine.step()
    assert_empty(engine)


def test_no_masked_step_waits_for_the_device(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides the tokens that the grammar must know."""
    model = load_model(tiny_models["llama"])
    compiler = GrammarCompiler(
        load_tokenizer(tiny_models["llama"]), model.vocab_size, model.eos_token_ids
    )
    grammar = compiler.compile(Grammar("regex", "(?s:.*)"))
    compiler.close()
    prefilled = {n: prefill_all(model, prompt(n), UNPRUNED) for n in (17, 40)}
    monkeypatch.setattr(StepGraphs, "_try_out", StepGraphs._recording)  # which reads logits
    engine = on_meta(model, rows=8, new_recorder=EagerRecorder)
    sampling = replace(GREEDY, temperature=1.0, ignore_eos=False)
    with no_waiting():
        for length, (layers, result) in prefilled.items():
            for name, own in (("masked", grammar), ("free", None)):
                request = spec(f"{name} {length}", length, sampling, num_sequences=2, grammar=own)
                reservation = engine.reserve(request)
                for layer in layers:
                    reservation.write_layer(layer)
                engine.start(reservation, result.final_hidden, result.report.next_position)
            engine.step()
        outputs = [output for _ in range(GREEDY.max_tokens + 1) for output in engine.step()]
    assert [output.error for output in outputs if output.error] == []
    assert engine._runner.reads_late
    assert_empty(engine)
    engine.close()
