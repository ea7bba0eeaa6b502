"""Ten thousand damaged transfers at a live worker: none is taken, and the worker serves on."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import grpc
import pytest

from tests.services.decode.client import Client, right_answer, token_ids_of
from winnow.engine.prefill import PrefillResult
from winnow.kv import LayerKV
from winnow.v1 import decode_pb2 as pb

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]

NUM_TRANSFERS = 10_000
REFUSALS = {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,  # the next attempt came before this one's end
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
}


@dataclass
class Sound:
    """A whole transfer that would be taken, and what it was made from."""

    client: Client
    layers: list[LayerKV]
    result: PrefillResult
    attempt: int

    def frames(self, layers: list[LayerKV] | None = None) -> list[bytes]:
        return self.client.encode(layers or self.layers, self.result, attempt=self.attempt)


Damage = Callable[[random.Random, Sound], list[bytes]]


def flip_bits(rng: random.Random, sound: Sound) -> list[bytes]:
    frames = sound.frames()
    at = rng.randrange(len(frames))
    damaged = bytearray(frames[at])
    for bit in rng.sample(range(8 * len(damaged)), rng.randint(1, 4)):
        damaged[bit // 8] ^= 1 << bit % 8
    return [*frames[:at], bytes(damaged), *frames[at + 1 :]]


def cut_a_frame(rng: random.Random, sound: Sound) -> list[bytes]:
    frames = sound.frames()
    at = rng.randrange(len(frames))
    return [*frames[:at], frames[at][: rng.randrange(len(frames[at]))], *frames[at + 1 :]]


def end_early(rng: random.Random, sound: Sound) -> list[bytes]:
    frames = sound.frames()
    return frames[: rng.randrange(len(frames))]


def leave_a_gap(rng: random.Random, sound: Sound) -> list[bytes]:
    frames = sound.frames()
    at = rng.randrange(len(frames))
    return [*frames[:at], *frames[at + 1 :]]


def repeat_a_frame(rng: random.Random, sound: Sound) -> list[bytes]:
    frames = sound.frames()
    at = rng.randrange(len(frames))
    return [*frames[: at + 1], *frames[at:]]


def swap_two_frames(rng: random.Random, sound: Sound) -> list[bytes]:
    frames = sound.frames()
    one, other = rng.sample(range(len(frames)), 2)
    frames[one], frames[other] = frames[other], frames[one]
    return frames


def insert_junk(rng: random.Random, sound: Sound) -> list[bytes]:
    frames = sound.frames()
    at = rng.randrange(len(frames) + 1)
    return [*frames[:at], rng.randbytes(rng.randrange(1, 300)), *frames[at:]]


def lie_in_the_header(rng: random.Random, sound: Sound) -> list[bytes]:
    first, *rest = sound.frames()
    frame = pb.PushFrame.FromString(first)
    lies: list[tuple[str, object]] = [
        ("model_fingerprint", "another"),
        ("wire_version", rng.choice((0, 1, 5, 7))),
        ("attempt", rng.randrange(sound.attempt)),
        ("attempt", sound.attempt + 1),
        ("transfer_token", rng.randbytes(32)),
        ("num_layers", rng.choice((0, 1, 2**31))),
        ("num_kv_heads", rng.choice((0, 7, 2**31))),
        ("head_dim", 2**31),
        ("num_prompt_tokens", rng.choice((0, 39, 2**32 - 1))),
        ("dtype", pb.DTYPE_FLOAT16),
        ("request_id", "somebody-elses"),
    ]
    setattr(frame.header, *rng.choice(lies))
    return [frame.SerializeToString(), *rest]


def lie_about_a_layer(rng: random.Random, sound: Sound) -> list[bytes]:
    frames = sound.frames()
    manifests = [
        at for at, frame in enumerate(frames) if pb.PushFrame.FromString(frame).HasField("layer")
    ]
    at = rng.choice(manifests)
    frame = pb.PushFrame.FromString(frames[at])
    frame.layer.head_lengths[0] += rng.choice((1, -1, 2**31, 2**20))
    return [*frames[:at], frame.SerializeToString(), *frames[at + 1 :]]


def send_what_is_not_finite(rng: random.Random, sound: Sound) -> list[bytes]:
    at = rng.randrange(len(sound.layers))
    layer = sound.layers[at]
    values = layer.values.clone()
    values.view(-1)[rng.randrange(values.numel())] = rng.choice((float("nan"), float("inf")))
    return sound.frames(
        [*sound.layers[:at], replace(layer, values=values), *sound.layers[at + 1 :]]
    )


DAMAGES: tuple[Damage, ...] = (
    flip_bits,
    flip_bits,
    flip_bits,
    cut_a_frame,
    end_early,
    leave_a_gap,
    repeat_a_frame,
    swap_two_frames,
    insert_junk,
    lie_in_the_header,
    lie_about_a_layer,
    send_what_is_not_finite,
)


async def test_no_damaged_transfer_is_taken(client: Client) -> None:
    rng = random.Random(20261121)
    call = await client.admit(client.request(), timeout_s=390)
    layers, result = client.prefill()
    codes: Counter[grpc.StatusCode] = Counter()
    for attempt in range(1, NUM_TRANSFERS + 1):
        damage = rng.choice(DAMAGES)
        frames = damage(rng, Sound(client, layers, result, attempt))
        codes[(await client.refused_push(frames)).code()] += 1
    assert codes.keys() <= REFUSALS, codes
    assert codes.total() == NUM_TRANSFERS
    status = await client.status()
    assert (status.running_sequences, status.pages_used, status.open_transfers) == (0, 0, 0)
    await client.push(client.encode(layers, result, attempt=NUM_TRANSFERS + 1))
    while (event := await call.read()).HasField("waiting"):  # a sign of life, all the while
        pass
    assert event.prefilled.attempt == NUM_TRANSFERS + 1
    assert await token_ids_of(call) == right_answer(client)
