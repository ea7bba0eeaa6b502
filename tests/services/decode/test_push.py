import asyncio
from collections.abc import Callable

import grpc
import pytest
import torch

from services.common.rpc import ERROR_KEY, error_from_rpc
from services.decode.kv_server import MAX_OPEN_TRANSFERS
from tests.deadlines import SOON_S
from tests.services.decode.client import (
    BROKEN_OFF,
    GREEDY,
    PROMPT,
    Client,
    damage_data,
    error_of,
    events_of,
    right_answer,
    token_ids_of,
)
from tests.services.decode.conftest import StartWorker
from winnow.engine.kv_pool import KVPool
from winnow.engine.sequence import Reservation
from winnow.errors import (
    EngineFailed,
    LeaseExpired,
    StaleAttempt,
    TransferForged,
    UnknownReservation,
)
from winnow.v1 import decode_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")


def drop_data(frames: list[bytes]) -> list[bytes]:
    return [*frames[:2], *frames[3:]]


def repeat_data(frames: list[bytes]) -> list[bytes]:
    return [*frames[:3], *frames[2:]]


def drop_trailer(frames: list[bytes]) -> list[bytes]:
    return frames[:-1]


def drop_all(frames: list[bytes]) -> list[bytes]:
    return []


def announce_more(frames: list[bytes]) -> list[bytes]:
    manifest = pb.PushFrame.FromString(frames[1])
    manifest.layer.head_lengths[0] = len(PROMPT) + 1
    return [frames[0], manifest.SerializeToString(), *frames[2:]]


def other_wire_version(frames: list[bytes]) -> list[bytes]:
    header = pb.PushFrame.FromString(frames[0])
    header.header.wire_version = 1
    return [header.SerializeToString(), *frames[1:]]


def older_wire_version(frames: list[bytes]) -> list[bytes]:
    header = pb.PushFrame.FromString(frames[0])
    header.header.wire_version = 5
    header.header.transfer_token = b""
    return [header.SerializeToString(), *frames[1:]]


def without_token(frames: list[bytes]) -> list[bytes]:
    header = pb.PushFrame.FromString(frames[0])
    header.header.transfer_token = b""
    return [header.SerializeToString(), *frames[1:]]


def another_attempts_token(frames: list[bytes]) -> list[bytes]:
    header = pb.PushFrame.FromString(frames[0])
    header.header.attempt = 5
    return [header.SerializeToString(), *frames[1:]]


def other_model(frames: list[bytes]) -> list[bytes]:
    header = pb.PushFrame.FromString(frames[0])
    header.header.model_fingerprint = "other"
    return [header.SerializeToString(), *frames[1:]]


def junk(frames: list[bytes]) -> list[bytes]:
    return [b"junk", *frames]


def frame_after_trailer(frames: list[bytes]) -> list[bytes]:
    return [*frames, frames[-1]]


@pytest.mark.parametrize(
    ("spoil", "code", "kind"),
    [
        (damage_data, "DATA_LOSS", "transfer_damaged"),
        (drop_data, "DATA_LOSS", "transfer_damaged"),
        (repeat_data, "DATA_LOSS", "transfer_damaged"),
        (drop_trailer, "DATA_LOSS", "transfer_damaged"),
        (frame_after_trailer, "DATA_LOSS", "transfer_damaged"),
        (drop_all, "DATA_LOSS", "transfer_damaged"),
        (announce_more, "INVALID_ARGUMENT", "transfer_malformed"),
        (junk, "INVALID_ARGUMENT", "transfer_malformed"),
        (other_wire_version, "FAILED_PRECONDITION", "transfer_mismatch"),
        (older_wire_version, "FAILED_PRECONDITION", "transfer_mismatch"),
        (without_token, "PERMISSION_DENIED", "transfer_forged"),
        (another_attempts_token, "PERMISSION_DENIED", "transfer_forged"),
        (other_model, "FAILED_PRECONDITION", "transfer_mismatch"),
    ],
)
async def test_a_refused_transfer_yields_no_token_and_the_next_attempt_does(
    client: Client, spoil: Callable[[list[bytes]], list[bytes]], code: str, kind: str
) -> None:
    call = await client.admit(client.request())
    push = await client.refused_push(spoil(client.frames()))
    assert push.code() is grpc.StatusCode[code]
    assert dict(push.trailing_metadata())[ERROR_KEY] == kind
    status = await client.status()
    assert (status.running_sequences, status.pages_used, status.open_transfers) == (0, 0, 0)
    await client.push(client.frames(attempt=2))
    first = await call.read()
    assert first.prefilled.attempt == 2
    assert await token_ids_of(call) == right_answer(client)


async def test_kv_without_reservation_is_refused(client: Client) -> None:
    push = await client.refused_push(client.frames("nobody"))
    assert push.code() is grpc.StatusCode.NOT_FOUND
    assert isinstance(error_from_rpc(push), UnknownReservation)


async def test_kv_after_the_request_ended_is_refused(client: Client) -> None:
    call = await client.admit(client.request())
    await client.push(client.frames())
    assert len(await token_ids_of(call)) == GREEDY.max_tokens
    with pytest.raises(UnknownReservation):
        await client.push(client.frames(attempt=2))


@pytest.mark.parametrize("attempt", [1, 2])
async def test_a_stale_attempt_is_refused(client: Client, attempt: int) -> None:
    call = await client.admit(client.request())
    newest = client.open_push()
    newest.write(client.frames(attempt=2)[0])
    await client.until_open_transfers(1)
    push = await client.refused_push(client.frames(attempt=attempt))
    assert push.code() is grpc.StatusCode.ABORTED
    assert isinstance(error_from_rpc(push), StaleAttempt)
    newest.write(*client.frames(attempt=2)[1:])
    assert (await newest.finish()).num_layers == 4
    assert await token_ids_of(call) == right_answer(client)


async def test_a_new_attempt_replaces_one_that_is_under_way(client: Client) -> None:
    call = await client.admit(client.request())
    old = client.open_push()
    old.write(*client.frames(token_ids=PROMPT[::-1])[:30])
    await client.until_pages_used()
    await client.push(client.frames(attempt=2))
    assert await old.code() in BROKEN_OFF
    events = [event async for event in events_of(call)]
    assert events[0].prefilled.attempt == 2
    tokens = [token.token_id for event in events for token in event.tokens.tokens]
    assert tokens == right_answer(client)


async def test_a_second_attempt_is_refused_once_the_kv_is_in_place(client: Client) -> None:
    sampling = client.request().sampling
    sampling.max_tokens = 4000
    call = await client.admit(client.request(sampling=sampling))
    await client.push(client.frames())
    with pytest.raises(StaleAttempt, match="already in place"):
        await client.push(client.frames(attempt=2))
    call.cancel()


async def test_a_recorded_transfer_cannot_be_played_again(client: Client) -> None:
    sampling = client.request().sampling
    sampling.max_tokens = 4000
    call = await client.admit(client.request(sampling=sampling))
    recorded = client.frames()
    await client.push(recorded)
    with pytest.raises(StaleAttempt):
        await client.push(recorded)
    call.cancel()
    await client.until_idle()
    with pytest.raises(UnknownReservation):
        await client.push(recorded)
    call = await client.admit(client.request())  # the same id, with another secret
    push = await client.refused_push(recorded)
    assert push.code() is grpc.StatusCode.PERMISSION_DENIED
    assert isinstance(error_from_rpc(push), TransferForged)
    call.cancel()


async def test_a_sender_that_goes_away_leaves_no_page(client: Client) -> None:
    call = await client.admit(client.request())
    broken = client.open_push()
    broken.write(*client.frames()[:30])
    await client.until_pages_used()
    broken.cancel()
    await client.until_open_transfers(0)
    assert (await client.status()).pages_used == 0
    await client.push(client.frames(attempt=2))
    assert await token_ids_of(call) == right_answer(client)


async def test_closing_the_stream_breaks_off_the_transfer(client: Client) -> None:
    call = await client.admit(client.request())
    push = client.open_push()
    push.write(*client.frames()[:30])
    await client.until_pages_used()
    call.cancel()
    assert await push.code() in BROKEN_OFF
    await client.until_idle()


async def test_a_lease_without_kv_ends_and_frees(start_worker: StartWorker) -> None:
    async with Client(await start_worker(kv_lease_s=0.3)) as client:
        call = await client.admit(client.request())
        error = await error_of(call)
        assert isinstance(error, LeaseExpired)
        assert "0.3 seconds" in error.message
        assert await call.code() is grpc.StatusCode.ABORTED
        await client.until_idle()
        with pytest.raises(UnknownReservation):
            await client.push(client.frames())


async def test_a_stalled_transfer_ends_with_its_lease(start_worker: StartWorker) -> None:
    async with Client(await start_worker(kv_lease_s=0.3)) as client:
        call = await client.admit(client.request())
        stalled = client.open_push()
        stalled.write(*client.frames()[:30])
        assert isinstance(await error_of(call), LeaseExpired)
        assert await stalled.code() in BROKEN_OFF
        await client.until_open_transfers(0)
        await client.until_idle()


async def test_transfers_over_the_cap_wait_their_turn(client: Client) -> None:
    count = MAX_OPEN_TRANSFERS + 8
    calls = [await client.admit(client.request(f"r{idx}")) for idx in range(count)]
    frames = [client.frames(f"r{idx}") for idx in range(count)]
    pushes = [client.open_push() for _ in range(count)]
    for push, (header, *_) in zip(pushes, frames, strict=True):
        push.write(header)
    await client.until_open_transfers(MAX_OPEN_TRANSFERS)
    for push, (_, *rest) in zip(pushes, frames, strict=True):
        push.write(*rest)
    receipts = await asyncio.gather(*(push.finish() for push in pushes))
    assert {receipt.num_layers for receipt in receipts} == {4}
    answer = right_answer(client)
    assert [await token_ids_of(call) for call in calls] == [answer] * count


async def test_a_gateway_without_common_version_is_refused(client: Client) -> None:
    call = client.generate(client.request(wire_versions=(7, 8)))
    assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "versions 7, 8; this worker speaks 5, 6" in await call.details()


@pytest.mark.parametrize(("where", "what"), [(KVPool, "write_layer"), (Reservation, "begin")])
async def test_a_request_whose_kv_cannot_be_put_in_place_ends_at_once(
    client: Client, monkeypatch: pytest.MonkeyPatch, where: type, what: str
) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    call = await client.admit(client.request())
    monkeypatch.setattr(where, what, out_of_memory)
    with pytest.raises(EngineFailed, match="could not be put in place: CUDA out of memory"):
        await client.push(client.frames())
    async with asyncio.timeout(SOON_S):  # not after the lease
        assert isinstance(await error_of(call), EngineFailed)
    monkeypatch.undo()
    assert client.worker.engine.num_failures == 1
    call = await client.admit(client.request())
    await client.push(client.frames())
    assert await token_ids_of(call) == right_answer(client)
    assert client.worker.engine.num_failures == 0
