"""Requests that join, leave and move between the steps of an engine."""

import threading
from collections.abc import Callable
from typing import Any

from tests.winnow.drive import admit, assert_empty, prompt, spec
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.sequence import Reservation
from winnow.kv import LayerKV, SequenceState
from winnow.sampling_params import SamplingParams
from winnow.tokens import Token

# What happens before a step of this number.
Events = dict[int, Callable[[DecodeEngine], object]]
Answers = dict[str, tuple[list[Token], int]]  # tokens, and entries dropped when they end


def nothing(_: DecodeEngine) -> None:
    pass


def run(engine: DecodeEngine, events: Events) -> Answers:
    tokens: dict[str, list[Token]] = {}
    answers: Answers = {}
    number = 0
    while engine.stats().running_sequences or number <= max(events):
        events.get(number, nothing)(engine)
        for output in engine.step():
            assert output.error is None
            assert output.request_id not in answers
            tokens.setdefault(output.request_id, []).extend(output.tokens)
            if output.finished:
                own = tokens[output.request_id]
                answers[output.request_id] = own, output.recompressed_entries
        number += 1
    assert_empty(engine)
    return answers


def joining(
    name: str,
    length: int,
    sampling: SamplingParams,
    model: DecoderModel | None = None,
    /,
    **more: Any,
) -> Callable[..., Reservation]:
    """model: see `admit`."""

    def join(engine: DecodeEngine) -> Reservation:
        asked = spec(name, length, sampling, **more)
        return admit(engine, asked, prompt(length, length), model=model)

    return join


def moved(
    engine: DecodeEngine,
    request: GenerationSpec,
    num_steps: int,
    model: DecoderModel | None = None,
) -> tuple[list[Token], SequenceState, list[LayerKV]]:
    """What a request had said when it was taken out, and what goes on elsewhere.

    model: see `admit`.
    """
    reservation = admit(engine, request, prompt(request.num_prompt_tokens), model=model)
    said = [t for _ in range(num_steps) for output in engine.step() for t in output.tokens]
    taken: list[tuple[SequenceState, list[LayerKV]]] = []

    def take() -> None:
        with engine.taken_out(reservation, 20) as (seq,):
            layers = range(engine.model.shape.num_layers)
            taken.append((seq.state(), [seq.read_layer(engine.pool, idx) for idx in layers]))

    taking = threading.Thread(target=take)
    taking.start()
    while taking.is_alive():
        said += [t for output in engine.step() for t in output.tokens]
    return said, *taken[0]
