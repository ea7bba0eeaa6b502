"""Decoding on a device that the host never waits for; only sampled tokens are read from it."""

from pathlib import Path

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
from tests.winnow.no_waiting import META, no_waiting
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.models import load_model
from winnow.sampling import Sampled, SampledBatch


@pytest.fixture(autouse=True)
def tokens_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(batch: SampledBatch) -> list[Sampled]:
        return [Sampled(7)] * len(batch.positions)

    monkeypatch.setattr(SampledBatch, "read", read)


def on_meta(model: DecoderModel, rows: int = 32) -> DecodeEngine:
    network = model._model.to(META)
    return make_engine(DecoderModel(network, model.description, META), rows=rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["snapkv", "rkv"])
def test_no_part_of_decoding_waits_for_the_device(
    tiny_models: dict[str, Path], family: str, method: str
) -> None:
    """Two groups of rows of like length, two answers per prompt, and recompression."""
    model = load_model(tiny_models[family])
    prefilled = {n: prefill_all(model, prompt(n), UNPRUNED) for n in (17, 40, 1100)}
    engine = on_meta(model)
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
