"""A sequence that waits outside the pool, or goes on elsewhere, keeps its adapter."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.winnow import reference
from tests.winnow.adapters.made import merged, save_adapter
from tests.winnow.drive import admit, assert_empty, decode_all, ids, make_engine, prompt, spec
from tests.winnow.eager_recorder import EagerRecorder
from winnow.adapters.ref import AdapterRoom
from winnow.adapters.slots import AdapterSlots
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.graph import Recorder
from winnow.engine.sequence import Reservation
from winnow.kv import LayerKV, SequenceState
from winnow.models import load_model
from winnow.sampling_params import SamplingParams

PROMPT_TOKENS = 40
LONG = SamplingParams(max_tokens=70, temperature=0, ignore_eos=True)
NAMES = (None, "a", "b", "a")


@pytest.fixture(scope="module")
def path(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def folders(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(root / name, path, seed=ord(name)) for name in "ab"}


def loaded(path: Path) -> tuple[DecoderModel, AdapterSlots]:
    model = load_model(path, adapter_room=AdapterRoom(2, 4))
    assert model.adapters is not None
    return model, model.adapters


def expected(path: Path, folder: Path | None, token_ids: list[int]) -> list[int]:
    network = reference.load(path) if folder is None else merged(path, folder)
    return reference.greedy(network, token_ids, LONG.max_tokens)


@pytest.mark.parametrize("new_recorder", [None, EagerRecorder], ids=["launched", "recorded"])
def test_sequences_that_had_to_wait_go_on_with_their_adapters(
    path: Path, folders: dict[str, Path], new_recorder: Callable[[], Recorder] | None
) -> None:
    model, slots = loaded(path)
    used = slots.preload(folders)
    request = spec("", PROMPT_TOKENS, LONG)
    pages = model.shape.num_layers * model.shape.num_kv_heads * -(-request.max_entries // 16)
    engine = make_engine(
        model,
        rows=4,
        memory=int((2 * pages + 1) * 16 * (model.shape.kv_bytes(1) + 4)),
        overcommit=2.1,
        swap_bytes=1 << 30,
        new_recorder=new_recorder,
    )
    for idx, name in enumerate(NAMES):
        own = replace(request, request_id=str(idx), adapter=used[name] if name else None)
        admit(engine, own, prompt(PROMPT_TOKENS, idx))
    answers = decode_all(engine)
    assert engine.preemption_stats.swapped_out >= 2
    assert engine.preemption_stats.given_up == 0
    for idx, name in enumerate(NAMES):
        wanted = expected(path, folders[name] if name else None, prompt(PROMPT_TOKENS, idx))
        assert ids(answers[str(idx)]) == wanted, (idx, name)
    assert_empty(engine)


def test_a_sequence_that_moves_finds_its_adapter_in_another_slot(
    path: Path, folders: dict[str, Path]
) -> None:
    (first, first_slots), (second, second_slots) = loaded(path), loaded(path)
    there = first_slots.preload(folders)["a"]
    here = second_slots.preload({name: folders[name] for name in "ba"})["a"]
    assert there.slot != here.slot
    moving = spec("moved", PROMPT_TOKENS, LONG, adapter=there)
    layers, (state,) = taken_after(make_engine(first), moving, 30)
    engine = make_engine(second)
    reservation = engine.reserve(replace(moving, moved=True, adapter=here))
    for layer in layers:
        reservation.write_layer(layer)
    engine.resume(reservation, {0: state}, torch.zeros(second.shape.hidden_size))
    rest = ids(decode_all(engine)["moved"])
    assert rest
    wanted = expected(path, folders["a"], prompt(PROMPT_TOKENS))
    assert [*state.token_ids, *rest] == wanted


def taken_after(
    engine: DecodeEngine, request: GenerationSpec, num_steps: int
) -> tuple[list[LayerKV], list[SequenceState]]:
    """What a request holds after so many steps, or some more."""
    reservation = admit(engine, request, prompt(request.num_prompt_tokens))
    for _ in range(num_steps):
        engine.step()
    with ThreadPoolExecutor(1) as thread:
        taking = thread.submit(_take, engine, reservation)
        while not taking.done():
            engine.step()
    return taking.result()


def _take(
    engine: DecodeEngine, reservation: Reservation
) -> tuple[list[LayerKV], list[SequenceState]]:
    with engine.taken_out(reservation, 20) as (seq,):
        layers = range(engine.model.shape.num_layers)
        return [seq.read_layer(engine.pool, layer_idx) for layer_idx in layers], [seq.state()]
