"""A sequence that leaves one engine for another, as when its worker drains."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from tests.winnow.drive import decode_all, ids
from winnow.engine.decode import DecodeEngine
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.sequence import Reservation
from winnow.kv import LayerKV, SequenceState


def tokens_after_a_move(
    engine: DecodeEngine, other: DecodeEngine, reservation: Reservation, own: GenerationSpec
) -> list[int]:
    """All tokens of the sequence, which goes on at `other` with what its windows see.

    own: what was asked for.
    """
    with ThreadPoolExecutor() as threads:
        leaving = threads.submit(_take_out, engine, reservation)
        while not leaving.done():
            engine.step()
    state, layers = leaving.result()
    moved = other.reserve(replace(own, moved=True))
    for layer, kind in zip(layers, engine.model.shape.layers, strict=True):
        moved.write_layer(layer if kind.window is None else layer.newest(kind.window))
    other.resume(moved, {0: state}, torch.zeros(engine.model.shape.hidden_size))
    return [*state.token_ids, *ids(decode_all(other)[own.request_id])]


def _take_out(
    engine: DecodeEngine, reservation: Reservation
) -> tuple[SequenceState, list[LayerKV]]:
    num_layers = engine.model.shape.num_layers
    with engine.taken_out(reservation, 20) as (seq,):
        return seq.state(), [seq.read_layer(engine.pool, idx) for idx in range(num_layers)]
