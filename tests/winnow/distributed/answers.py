"""What two ranks answer, and one process."""

from collections.abc import Sequence
from typing import Any

from tests.winnow.distributed.conftest import TwoRanks
from tests.winnow.drive import GREEDY, assert_empty, decode_all, ids, prefill_all, prompt, spec
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.kv import KvDtype
from winnow.pruning_settings import PruningSettings
from winnow.sampling_params import SamplingParams

LENGTHS = (1, 40, 100)


def answer(
    model: DecoderModel,
    engine: DecodeEngine,
    settings: PruningSettings,
    sampling: SamplingParams = GREEDY,
    lengths: Sequence[int] = LENGTHS,
    **request: Any,
) -> dict[str, list[int]]:
    """Prompts of some lengths, decoded together: the tokens of each sequence."""
    for num_tokens in lengths:
        asked = spec(str(num_tokens), num_tokens, sampling, **request)
        reservation = engine.reserve(asked)
        layers, result = prefill_all(model, prompt(num_tokens), settings)
        for layer in layers:
            arrived = layer.quantized() if engine.pool.kv_dtype == "int8" else layer
            reservation.write_layer(arrived)
        engine.start(reservation, result.final_hidden, result.report.next_position)
    tokens = decode_all(engine)
    assert_empty(engine)
    return {
        f"{name}/{idx}": ids(own, idx)
        for name, own in tokens.items()
        for idx in range(request.get("num_sequences", 1))
    }


def both(
    two: TwoRanks, settings: PruningSettings, kv_dtype: KvDtype = "auto", **more: Any
) -> list[dict[str, list[int]]]:
    models = (two.single, two.split)
    engines = [two.engine(is_split=is_split, kv_dtype=kv_dtype) for is_split in (False, True)]
    return [
        answer(model, engine, settings, **more)
        for model, engine in zip(models, engines, strict=True)
    ]
