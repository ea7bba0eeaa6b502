"""A worker whose KV memory runs short while requests run."""

import asyncio
from dataclasses import replace

import grpc
import pytest

from services.common.messages import recompression_to_proto, sampling_to_proto
from services.decode import admission
from tests.services.decode.client import GREEDY, Call, Client, error_of
from tests.services.decode.conftest import StartWorker
from tests.winnow.drive import UNPRUNED
from winnow.errors import Overloaded, Preempted
from winnow.v1 import decode_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_TOKENS = 600  # of which the pool has room for one and a half
TIGHT = {"kv_memory_bytes": 1 << 20, "kv_overcommit": 4, "lease_s": 0.3}
LONG = sampling_to_proto(replace(GREEDY, max_tokens=NUM_TOKENS))


async def begin(client: Client, request_id: str, **changes: object) -> Call:
    call = await client.admit(client.request(request_id, **({"sampling": LONG} | changes)))
    await client.push(client.frames(request_id))
    return call


async def tokens_and_waits(call: Call) -> tuple[list[int], int]:
    """Token ids to the end, and how often the worker said that they have to wait."""
    token_ids, num_waits = [], 0
    while (event := await call.read()) is not grpc.aio.EOF:
        assert isinstance(event, pb.GenerateEvent)
        token_ids += [token.token_id for token in event.tokens.tokens]
        num_waits += event.HasField("waiting")
    return token_ids, num_waits


async def test_a_request_that_waits_says_so_and_ends_with_its_own_tokens(
    start_worker: StartWorker,
) -> None:
    async with Client(await start_worker(**TIGHT)) as client:
        alone, _ = await tokens_and_waits(await begin(client, "alone"))
        calls = [await begin(client, name) for name in ("older", "younger")]
        older, younger = await asyncio.gather(*map(tokens_and_waits, calls))
        assert older == (alone, 0)
        assert younger[0] == alone
        assert younger[1] > 0
        await client.until_idle()


async def test_what_fits_nowhere_ends_with_an_error_that_says_so(
    start_worker: StartWorker,
) -> None:
    async with Client(await start_worker(**TIGHT, swap_bytes=0)) as client:
        calls = [await begin(client, name) for name in ("older", "younger")]
        (tokens, _), error = await asyncio.gather(tokens_and_waits(calls[0]), error_of(calls[1]))
        assert len(tokens) == NUM_TOKENS
        assert isinstance(error, Preempted)
        assert "swap_bytes 0" in error.message
        await client.until_idle()


async def test_nothing_new_is_let_in_before_a_request_that_was_given_up(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "_OWED_S", 60)
    async with Client(await start_worker(**TIGHT)) as client:
        running = await begin(client, "running")
        again = client.request("again", sampling=LONG, assured=True)
        assert isinstance(await error_of(client.generate(again)), Overloaded)
        new = client.request("new")
        assert isinstance(await error_of(client.generate(new)), Overloaded)
        running.cancel()
        await client.until_idle()
        assert isinstance(await error_of(client.generate(new)), Overloaded)
        (await client.admit(again)).cancel()
        (await client.admit(new)).cancel()
        await client.until_idle()


async def test_running_requests_shrink_for_one_that_would_be_refused(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker(**(TIGHT | {"kv_overcommit": 1}))
    frugal = recompression_to_proto(
        replace(UNPRUNED, decode_floor=16, recompress_interval=16).decode_side
    )
    async with Client(worker) as client:
        first = await begin(client, "first", recompression=frugal)
        for _ in range(5):
            await first.read()
        second = await begin(client, "second", recompression=frugal)
        for call in (first, second):
            token_ids, _ = await tokens_and_waits(call)
            assert len(token_ids) > NUM_TOKENS - 10
        assert worker.engine.preemption_stats.shrunk == 1
        await client.until_idle()
