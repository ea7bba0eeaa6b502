"""The states of a prompt in the gateway.

                           ┌─── LOST ◀──┬─── MOVING
                           ▼     ▲      │     ▲ │
                           │     │      │     │ ▼
RECEIVED ─▶ ADMITTED ─▶ PREFILLING ─▶ DECODING ─▶ FINISHED
└────────────┴────────────┴────────────┴────────▶ FAILED, CANCELLED

A prompt that is only scored needs no decode worker: RECEIVED ─▶ PREFILLING ─▶ FINISHED.
"""

from enum import StrEnum

from winnow.errors import (
    DeliveryFailed,
    EngineFailed,
    NoDecodeWorker,
    Preempted,
    UnknownReservation,
)

ADMISSION, PREFILL = "admission", "prefill"  # what a prompt without its first token waits for
# Errors of a prompt whose worker is lost; another worker can continue it.
WORKER_LOST = (NoDecodeWorker, EngineFailed, DeliveryFailed, UnknownReservation, Preempted)


class State(StrEnum):
    RECEIVED = "received"
    ADMITTED = "admitted"  # KV memory is reserved at a decode worker
    PREFILLING = "prefilling"  # a prefill worker has the job
    DECODING = "decoding"  # the KV is in place; tokens arrive
    MOVING = "moving"  # its decode worker sends it to another one
    LOST = "lost"  # its decode worker is lost; looking for another one
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


WAITS_FOR = {
    State.RECEIVED: ADMISSION,
    State.ADMITTED: PREFILL,
    State.PREFILLING: PREFILL,
    State.LOST: ADMISSION,
}
RUNS = (State.DECODING, State.MOVING)  # the decode worker has all it needs
_ENDS = frozenset({State.FAILED, State.CANCELLED})
NEXT = {
    State.RECEIVED: _ENDS | {State.ADMITTED, State.PREFILLING},
    State.ADMITTED: _ENDS | {State.PREFILLING},
    State.PREFILLING: _ENDS | {State.DECODING, State.LOST, State.FINISHED},
    State.DECODING: _ENDS | {State.FINISHED, State.MOVING, State.LOST},
    State.MOVING: _ENDS | {State.DECODING, State.LOST},
    State.LOST: _ENDS | {State.PREFILLING},
}
