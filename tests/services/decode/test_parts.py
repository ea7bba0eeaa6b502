"""A decode worker of two ranks, to which prefill's ranks send the KV of their heads."""

import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from services.common.messages import recompression_to_proto
from services.common.rpc import channel_options, error_from_rpc
from services.common.settings import Settings
from services.decode.worker import DecodeWorker
from tests.models_in_code import save_tiny_model
from tests.services.decode.client import (
    BROKEN_OFF,
    GREEDY,
    PROMPT,
    Call,
    Client,
    OpenPush,
    damage_data,
    error_of,
    token_ids_of,
)
from tests.services.decode.conftest import StartWorker
from tests.winnow.drive import UNPRUNED, admit, decode_all, ids, make_engine, prefill_all, spec
from winnow.decoder import DecoderModel
from winnow.distributed.heads import take_heads
from winnow.errors import InvalidSetting, StaleAttempt, TransferDamaged, TransferForged
from winnow.kv import KvDtype
from winnow.models import load_model
from winnow.wire import Grant, Header, TransferEncoder

pytestmark = pytest.mark.asyncio(loop_scope="module")

RANKS = (range(2), range(2, 4))  # the KV heads of each
SHRINKING = {"decode_budget": 24, "recompress_interval": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen2", num_key_value_heads=4)


@pytest.fixture(scope="module")
def whole(model: Path) -> DecoderModel:
    return load_model(model)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(model: Path, start_worker: StartWorker) -> AsyncIterator[DecodeWorker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.common.ranks._end_process", lambda reason: None)
        yield await start_worker(model=str(model), decode_tensor_parallel=2)


class Senders:
    """Ranks of prefill that send their heads of the prompt's KV to a worker's ranks."""

    def __init__(self, client: Client, model: DecoderModel) -> None:
        self._client = client
        self._model = model
        self._layers, self._result = prefill_all(model, PROMPT, UNPRUNED)
        self._channels = [
            grpc.insecure_channel(address, options=channel_options())
            for address in client.worker.rank_kv_addresses
        ]

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def frames(
        self,
        heads: range | None,
        attempt: int = 1,
        grant: Grant | None = None,
        kv_dtype: KvDtype = "auto",
    ) -> list[bytes]:
        header = Header(
            "r1",
            attempt,
            (grant or self._client.grants["r1"]).ticket(attempt),
            self._model.fingerprint,
            self._model.shape,
            len(PROMPT),
            kv_dtype=kv_dtype,
            heads=heads,
        )
        encoder = TransferEncoder(header, frame_bytes=4096)
        frames = [encoder.header()]
        for layer in self._layers:
            frames += encoder.layer(layer if heads is None else take_heads(layer, heads))
        return [*frames, encoder.trailer(self._result.final_hidden, self._result.report)]

    def push(self, heads: range, frames: Sequence[bytes]) -> OpenPush:
        """Opened to the rank that has these heads."""
        (rank,) = [rank for rank, own in enumerate(RANKS) if heads[0] in own]
        push = OpenPush(self._channels[rank])
        push.write(*frames)
        return push


@pytest.fixture
def senders(client: Client, whole: DecoderModel) -> Iterator[Senders]:
    senders = Senders(client, whole)
    yield senders
    senders.close()


def right_tokens(whole: DecoderModel, **recompression: int) -> list[int]:
    engine = make_engine(whole)
    admit(engine, spec("alone", len(PROMPT), GREEDY, **recompression), PROMPT)
    return ids(decode_all(engine)["alone"])


async def refusal(push: OpenPush) -> BaseException:
    with pytest.raises(grpc.RpcError) as refused:
        await push.finish()
    return error_from_rpc(refused.value)


async def finish_parts(
    senders: Senders, heads: Sequence[range], attempt: int = 1, kv_dtype: KvDtype = "auto"
) -> int:
    """Send parts as prefill does, the last ones first; returns the bytes of the first."""
    *frames, trailer = senders.frames(heads[0], attempt, kv_dtype=kv_dtype)
    others = [
        senders.push(own, senders.frames(own, attempt, kv_dtype=kv_dtype))
        for own in reversed(heads[1:])
    ]
    first = senders.push(heads[0], frames)
    for other in others:
        await other.finish()
    first.write(trailer)
    return (await first.finish()).payload_bytes


async def admitted(client: Client, **recompression: Any) -> Call:
    decode_side = replace(UNPRUNED, **recompression).decode_side
    request = client.request(recompression=recompression_to_proto(decode_side))
    return await client.admit(request)


@pytest.mark.parametrize(
    ("heads", "kv_dtype"),
    [
        ((range(2), range(2, 4)), "auto"),
        ((range(1), range(1, 2), range(2, 3), range(3, 4)), "auto"),
        ((range(2), range(2, 3), range(3, 4)), "int8"),
    ],
    ids=["two ranks", "four ranks", "uneven, int8"],
)
async def test_ranks_that_take_their_own_heads_answer_as_one_process(
    client: Client,
    senders: Senders,
    whole: DecoderModel,
    heads: Sequence[range],
    kv_dtype: KvDtype,
) -> None:
    received = client.worker.metrics.received_bytes
    before = received._value.get()
    call = await admitted(client, **SHRINKING)
    bytes_of_first = await finish_parts(senders, heads, kv_dtype=kv_dtype)
    tokens = await token_ids_of(call)
    assert len(tokens) == GREEDY.max_tokens
    if kv_dtype == "auto":
        assert tokens == right_tokens(whole, **SHRINKING)
    total = received._value.get() - before
    assert bytes_of_first == pytest.approx(total * len(heads[0]) / 4, rel=0.01)


async def test_a_worker_that_sends_all_from_one_process_is_served_too(
    client: Client, senders: Senders, whole: DecoderModel
) -> None:
    call = await admitted(client)
    await client.push(senders.frames(None))
    assert await token_ids_of(call) == right_tokens(whole)


async def test_a_damaged_part_fails_the_transfer_and_the_next_attempt_does_not_suffer(
    client: Client, senders: Senders, whole: DecoderModel
) -> None:
    call = await admitted(client)
    *frames, trailer = senders.frames(RANKS[0])
    first = senders.push(RANKS[0], frames)
    other = senders.push(RANKS[1], damage_data(senders.frames(RANKS[1])))
    assert isinstance(await refusal(other), TransferDamaged)
    first.write(trailer)
    error = await refusal(first)
    assert isinstance(error, TransferDamaged)
    assert "at rank 1, KV heads [2, 3] did not arrive whole" in str(error)
    await finish_parts(senders, RANKS, attempt=2)
    assert await token_ids_of(call) == right_tokens(whole)


async def test_a_transfer_that_lacks_a_part_is_refused(client: Client, senders: Senders) -> None:
    call = await admitted(client)
    missing = senders.push(range(1), senders.frames(range(1)))
    error = await refusal(missing)
    assert isinstance(error, TransferDamaged)
    assert "KV heads [1] did not arrive whole" in str(error)
    call.cancel()


async def test_a_newer_attempt_ends_the_parts_of_the_older_one_on_every_rank(
    client: Client, senders: Senders, whole: DecoderModel
) -> None:
    call = await admitted(client)
    older = [senders.push(heads, senders.frames(heads)[:-1]) for heads in RANKS]
    await client.until_pages_used()
    await finish_parts(senders, RANKS, attempt=2)
    for push in older:
        assert await push.code() in BROKEN_OFF
    assert await token_ids_of(call) == right_tokens(whole)


async def test_refuses_a_part_without_the_token_of_its_attempt(
    client: Client, senders: Senders
) -> None:
    call = await admitted(client)
    first = senders.push(RANKS[0], senders.frames(RANKS[0])[:-1])
    forged = senders.frames(RANKS[1], grant=replace(client.grants["r1"], secret=b"guessed"))
    assert isinstance(await refusal(senders.push(RANKS[1], forged)), TransferForged)
    first.cancel()
    call.cancel()


async def test_a_part_whose_attempt_does_not_begin_is_refused(
    client: Client, senders: Senders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.decode.parts.BEGIN_TIMEOUT_S", 0.1)  # at rank 0
    call = await admitted(client)
    error = await refusal(senders.push(range(1, 2), senders.frames(range(1, 2))))
    assert isinstance(error, StaleAttempt)
    call.cancel()


async def test_a_port_that_another_rank_finds_taken_is_refused_with_its_name(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = worker.engine.pool.ranks  # type: ignore[attr-defined]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(worker, "_settings", Settings(kv_port=port - 1))
        with pytest.raises(
            InvalidSetting, match=f"rank 1: .*:{port}: the port is taken"
        ) as refusal:
            worker._serve_on_ranks(ranks, None)
    assert refusal.value.param == "kv_port"


async def test_a_rank_killed_in_mid_transfer_fails_it_at_once(
    worker: DecodeWorker, whole: DecoderModel
) -> None:
    """The last test of this module: the worker cannot go on."""
    async with Client(worker) as client:
        senders = Senders(client, whole)
        call = await admitted(client)
        *frames, trailer = senders.frames(RANKS[0])
        first = senders.push(RANKS[0], frames)
        other = senders.push(RANKS[1], senders.frames(RANKS[1])[:-1])
        await client.until_pages_used()
        ranks = worker.engine.pool.ranks  # type: ignore[attr-defined]
        os.kill(ranks.process_ids[0], signal.SIGKILL)
        assert await other.code() is grpc.StatusCode.UNAVAILABLE
        first.write(trailer)
        await refusal(first)
        await error_of(call)
        senders.close()
