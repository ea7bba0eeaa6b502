"""Runs prompts through both engines in the test's own process."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch

from tests.models_in_code import VOCAB_SIZE
from winnow.adapters.slots import LoadedAdapter
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.graph import Recorder
from winnow.engine.kv_pool import KVPoolConfig
from winnow.engine.prefill import PrefillResult, PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.engine.sequence import Reservation
from winnow.kv import KvDtype, LayerKV
from winnow.pruning_settings import PruningSettings, Recompression
from winnow.sampling_params import SamplingParams
from winnow.tokens import Token

UNPRUNED = PruningSettings(method="full", window_size=8, kernel_size=3)
ASL = PruningSettings(
    select_tokens=24,
    window_size=8,
    kernel_size=3,
    observed_layers=2,
    min_layer=1,
    threshold=1.2,
    kv_budget=20,
)
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
LENGTHS = (1, 2, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 150, 300)


def all_layers(run: PrefillRun) -> list[LayerKV | None]:
    """What the run gives for each layer that it computes."""
    layers = []
    while not run.finished:
        layers.append(run.compute_layer())
    return layers


def prefill_all(
    model: DecoderModel,
    token_ids: Sequence[int],
    settings: PruningSettings,
    store: PrefixStore | None = None,
    *,
    is_long: bool = False,
    adapter: LoadedAdapter | None = None,
) -> tuple[list[LayerKV], PrefillResult]:
    run = PrefillRun(model, token_ids, settings, store=store, is_long=is_long, adapter=adapter)
    return list(run.layers()), run.result()


def make_engine(
    model: DecoderModel,
    *,
    rows: int = 32,
    memory: int = 64 << 20,
    overcommit: float = 1.0,
    swap_bytes: int = 0,
    kv_dtype: KvDtype = "auto",
    page_size: int = 16,
    new_recorder: Callable[[], Recorder] | None = None,
) -> DecodeEngine:
    return DecodeEngine(
        model,
        pool_config=KVPoolConfig(memory, page_size, overcommit, kv_dtype),
        max_batch_size=rows,
        swap_bytes=swap_bytes,
        new_recorder=new_recorder,
    )


def spec(request_id: str, num_tokens: int, sampling: SamplingParams, **more: Any) -> GenerationSpec:
    """more: fields of the spec, or of its recompression."""
    names = {field.name for field in fields(Recompression)}
    own = {name: more.pop(name) for name in names & set(more)}
    values: dict[str, Any] = {"max_prompt_entries": num_tokens} | more
    return GenerationSpec(
        request_id=request_id,
        num_prompt_tokens=num_tokens,
        sampling=sampling,
        recompression=Recompression(**{"window_size": 8, "kernel_size": 3} | own),
        **values,
    )


def admit(
    engine: DecodeEngine,
    request: GenerationSpec,
    token_ids: Sequence[int],
    settings: PruningSettings = UNPRUNED,
    store: PrefixStore | None = None,
    model: DecoderModel | None = None,
) -> Reservation:
    """Reserve, prefill, write, start.  model: for prefill, if the engine's cannot."""
    reservation = engine.reserve(request)
    prefill = model or engine.model
    is_long = prefill.description.is_long(request.num_positions)
    layers, result = prefill_all(
        prefill, token_ids, settings, store, is_long=is_long, adapter=request.adapter
    )
    for layer in layers:
        reservation.write_layer(layer)
    engine.start(reservation, result.final_hidden, result.report.next_position)
    return reservation


def decode_all(
    engine: DecodeEngine, after_step: Callable[[DecodeEngine], object] = lambda _: None
) -> dict[str, list[Token]]:
    """Steps until nothing runs; each request's tokens."""
    tokens: dict[str, list[Token]] = {}
    while engine.stats().running_sequences:
        for output in engine.step():
            assert output.error is None
            tokens.setdefault(output.request_id, []).extend(output.tokens)
        after_step(engine)
    return tokens


def ids(tokens: Sequence[Token], sequence_idx: int = 0) -> list[int]:
    return [token.token_id for token in tokens if token.sequence_idx == sequence_idx]


def assert_empty(engine: DecodeEngine) -> None:
    stats = engine.stats()
    assert (stats.pool.pages_used, stats.pool.pages_reserved) == (0, 0)
    assert (stats.running_sequences, stats.reserved_requests) == (0, 0)
    assert (stats.swapped_sequences, stats.swapped_bytes) == (0, 0)


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()
