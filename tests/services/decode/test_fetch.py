"""A running request moves from one worker to another."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from services.common.messages import recompression_to_proto, sampling_to_proto, tokens_from_proto
from services.common.rpc import error_from_rpc
from tests.deadlines import SOON_S
from tests.models_in_code import save_tiny_model
from tests.services.decode.client import GREEDY, PROMPT, Call, Client, error_of
from tests.services.decode.conftest import StartWorker
from tests.winnow.drive import UNPRUNED
from winnow.errors import DeliveryFailed, TransferForged, TransferMismatch, UnknownReservation
from winnow.kv import KvDtype
from winnow.pruning_settings import PruningSettings
from winnow.sampling_params import SamplingParams
from winnow.tokens import Token
from winnow.v1 import decode_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG = replace(GREEDY, max_tokens=600)
FETCH = "/winnow.v1.KvTransfer/Fetch"


@dataclass
class Two:
    """Where a request begins, and where it goes."""

    here: Client
    there: Client

    async def begin(self, request_id: str = "r", **changes: Any) -> Call:
        request = self.here.request(request_id, **({"sampling": sampling_to_proto(LONG)} | changes))
        call = await self.here.admit(request)
        await self.here.push(self.here.frames(request_id))
        return call

    def origin(self, request_id: str = "r", **changes: Any) -> pb.Origin:
        values: dict[str, Any] = {
            "kv_address": self.here.worker.kv_address,
            "request_id": request_id,
            "fetch_token": self.here.grants[request_id].fetch_token,
        }
        return pb.Origin(**(values | changes))

    async def move(self, request_id: str = "r", **changes: Any) -> Call:
        asked: dict[str, Any] = {
            "origin": self.origin(request_id),
            "sampling": sampling_to_proto(LONG),
        }
        return await self.there.admit(self.there.request("moved", **(asked | changes)))


@pytest_asyncio.fixture(loop_scope="module")
async def two(start_worker: StartWorker) -> AsyncIterator[Two]:
    async with clients(start_worker) as two:
        yield two


@asynccontextmanager
async def clients(start_worker: StartWorker, **changes: Any) -> AsyncIterator[Two]:
    workers = [await start_worker(**changes) for _ in range(2)]
    async with Client(workers[0]) as here, Client(workers[1]) as there:
        yield Two(here, there)
        async with asyncio.timeout(SOON_S):
            await here.until_idle()
            await there.until_idle()
    for worker in workers:
        await worker.stop()


async def read(call: Call, num_steps: int | None = None) -> tuple[list[Token], bool]:
    """Tokens of that many steps, or to the end; and whether the request has moved away."""
    tokens: list[Token] = []
    moved = False
    while (event := await call.read()) is not grpc.aio.EOF:
        assert isinstance(event, pb.GenerateEvent)
        tokens += tokens_from_proto(event.tokens)
        moved = moved or event.HasField("moved")
        num_steps = num_steps - event.HasField("tokens") if num_steps is not None else None
        if num_steps == 0:
            break
    return tokens, moved


async def whole(two: Two, **changes: Any) -> list[Token]:
    tokens, moved = await read(await two.begin("whole", **changes))
    assert not moved
    return sorted(tokens, key=lambda token: token.sequence_idx)


SAMPLED = SamplingParams(
    max_tokens=300,
    temperature=0.9,
    seed=5,
    frequency_penalty=0.4,
    presence_penalty=0.2,
    num_logprobs=2,
    ignore_eos=True,
)
SETTINGS = {
    "everything": UNPRUNED,
    "snapkv": replace(UNPRUNED, decode_budget=40, recompress_interval=8),
    "rkv": replace(UNPRUNED, decode_budget=40, recompress_interval=8, recompression="rkv"),
}


@pytest.mark.parametrize("pruning", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("sampling", "count"), [(LONG, 1), (SAMPLED, 3)])
async def test_the_tokens_are_those_that_would_have_been(
    two: Two, pruning: PruningSettings, sampling: SamplingParams, count: int
) -> None:
    asked: dict[str, Any] = {
        "sampling": sampling_to_proto(sampling),
        "recompression": recompression_to_proto(pruning.decode_side),
        "num_sequences": count,
    }
    expected = await whole(two, **asked)
    old = await two.begin(**asked)
    early, _ = await read(old, 20)
    new = await two.move(**asked)
    late, moved = await read(old)
    assert moved
    rest, _ = await read(new)
    assert rest
    got = sorted([*early, *late, *rest], key=lambda token: token.sequence_idx)
    assert got == expected


async def test_a_request_moves_with_what_its_windows_see(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    """To smaller pages: there, fewer entries may be held besides those than are held here."""
    windows: dict[str, Any] = {"sliding_window": 20, "max_window_layers": 2}
    model = save_tiny_model(tmp_path, "qwen2", use_sliding_window=True, **windows)
    workers = [await start_worker(model=str(model), page_size=size) for size in (16, 4)]
    asked = {"sampling": sampling_to_proto(LONG)}
    async with Client(workers[0]) as here, Client(workers[1]) as there:
        two = Two(here, there)
        expected = await whole(two, **asked)
        old = await two.begin(**asked)
        early, _ = await read(old, 20)
        new = await two.move(**asked)
        late, moved = await read(old)
        rest, _ = await read(new)
        assert moved
        assert [*early, *late, *rest] == expected


async def test_a_sequence_that_has_ended_stays_behind(two: Two) -> None:
    """Of three answers one has met its end token when the request moves."""
    eos = next(iter(two.here.worker.engine.model.eos_token_ids))
    sampling = SamplingParams(max_tokens=300, temperature=1, seed=4, logit_bias={eos: 4.0})
    asked: dict[str, Any] = {"sampling": sampling_to_proto(sampling), "num_sequences": 6}
    expected = await whole(two, **asked)
    old = await two.begin(**asked)
    early: list[Token] = []
    while not any(token.finish_reason for token in early):
        early += (await read(old, 1))[0]
    new = await two.move(**asked)
    late, moved = await read(old)
    assert moved
    rest, _ = await read(new)
    got = sorted([*early, *late, *rest], key=lambda token: token.sequence_idx)
    assert got == expected
    assert len({token.sequence_idx for token in rest}) < 6


@pytest.mark.parametrize("wire_versions", [(5,), (5, 6)])
@pytest.mark.parametrize("kv_dtypes", [("int8", "int8"), ("int8", "auto"), ("auto", "int8")])
async def test_a_request_moves_whatever_its_workers_pools_and_wire_versions(
    start_worker: StartWorker, kv_dtypes: tuple[str, str], wire_versions: tuple[int, ...]
) -> None:
    """Between int8 pools it loses nothing; else its entries are converted."""
    workers = [await start_worker(kv_dtype=kv_dtype) for kv_dtype in kv_dtypes]
    async with Client(workers[0]) as here, Client(workers[1]) as there:
        two = Two(here, there)
        expected = await whole(two)
        old = await two.begin()
        early, _ = await read(old, 20)
        received = there.worker.metrics.received_bytes._value.get()
        new = await two.move(wire_versions=wire_versions)
        late, moved = await read(old)
        rest, _ = await read(new)
        assert moved
        got, num_here = [*early, *late, *rest], len(early) + len(late)
        assert len(got) == len(expected)
        assert got[:num_here] == expected[:num_here]
        if set(kv_dtypes) == {"int8"}:
            assert got == expected
        shape = there.worker.engine.model.shape
        sent_as: KvDtype = "int8" if kv_dtypes[0] == "int8" else "auto"
        num_entries = shape.num_layers * shape.num_kv_heads * (len(PROMPT) + num_here - 1)
        num_bytes = there.worker.metrics.received_bytes._value.get() - received
        assert num_bytes == shape.kv_bytes(num_entries, sent_as) + 4 * num_entries
    for worker in workers:
        await worker.stop()


async def test_a_request_that_waits_in_host_memory_moves_too(start_worker: StartWorker) -> None:
    async with clients(start_worker, kv_memory_bytes=1 << 20, kv_overcommit=4) as two:
        sampling = sampling_to_proto(LONG)
        expected = await whole(two, sampling=sampling)
        older, younger = (
            await two.begin("older", sampling=sampling),
            await two.begin(sampling=sampling),
        )
        while not two.here.worker.engine.stats().swapped_sequences:
            await older.read()
        new = await two.move(sampling=sampling)
        before, moved = await read(younger)
        assert moved
        after, _ = await read(new)
        assert before + after == expected
        older.cancel()


async def test_a_drained_worker_asks_that_its_requests_move(start_worker: StartWorker) -> None:
    async with clients(start_worker) as two:
        old = await two.begin()
        await read(old, 5)
        draining = asyncio.create_task(two.here.worker.drain(30))
        while not (await old.read()).HasField("leaving"):
            pass
        new = await two.move()
        assert (await read(old))[1]
        assert await draining == 0
        assert (await read(new))[0]


async def test_only_the_worker_that_was_chosen_may_fetch(two: Two) -> None:
    call = await two.begin()
    await read(call, 3)
    for token in (b"", two.here.grants["r"].ticket(1).token, bytes(32)):
        with pytest.raises(TransferForged):
            await fetch(two.here, request_id="r", fetch_token=token)
    tokens, moved = await read(call)  # runs on untouched
    assert (len(tokens), moved) == (LONG.max_tokens - 3, False)


@pytest.mark.parametrize("told", [{}, {"sampler_version": 1}, {"sampler_version": 3}])
async def test_a_worker_with_another_sampler_cannot_fetch_what_is_sampled(
    two: Two, told: dict[str, int]
) -> None:
    """One that does not tell its version has the first one."""
    call = await two.begin(sampling=sampling_to_proto(SAMPLED))
    early, _ = await read(call, 3)
    token = two.here.grants["r"].fetch_token
    with pytest.raises(TransferMismatch, match=r"is [13]; this worker has 2"):
        await fetch(two.here, request_id="r", fetch_token=token, **told)
    late, moved = await read(call)  # runs on untouched
    assert (len(early + late), moved) == (SAMPLED.max_tokens, False)


async def test_what_another_sampler_has_begun_is_not_taken_over(two: Two) -> None:
    call = await two.begin(sampling=sampling_to_proto(SAMPLED))
    early, _ = await read(call, 3)
    asked = {"origin": two.origin(), "sampling": sampling_to_proto(SAMPLED), "sampler_version": 0}
    refused = two.there.generate(two.there.request("moved", **asked))
    error = await error_of(refused)
    assert isinstance(error, TransferMismatch)
    assert "sampler version of the other side is 1; this worker has 2" in error.message
    late, moved = await read(call)
    assert (len(early + late), moved) == (SAMPLED.max_tokens, False)


async def test_greedy_requests_move_between_samplers(two: Two) -> None:
    expected = await whole(two)
    old = await two.begin()
    early, _ = await read(old, 20)
    new = await two.move(sampler_version=0)
    late, moved = await read(old)
    assert moved
    rest, _ = await read(new)
    assert [*early, *late, *rest] == expected


async def test_what_does_not_run_cannot_be_fetched(two: Two) -> None:
    waiting = await two.here.admit(two.here.request("waiting"))
    token = two.here.grants["waiting"].fetch_token
    with pytest.raises(UnknownReservation, match="no sequence of request waiting runs"):
        await fetch(two.here, request_id="waiting", fetch_token=token)
    with pytest.raises(UnknownReservation):
        await fetch(two.here, request_id="nobody", fetch_token=token)
    waiting.cancel()


async def test_a_request_is_fetched_once(two: Two) -> None:
    old = await two.begin()
    await read(old, 3)
    new = await two.move()
    assert (await read(old))[1]
    with pytest.raises(UnknownReservation):
        await fetch(two.here, request_id="r", fetch_token=two.here.grants["r"].fetch_token)
    assert (await read(new))[0]


async def test_an_origin_that_is_not_there_is_a_failed_delivery(two: Two) -> None:
    call = await two.begin()
    gone = await two.move(origin=two.origin(kv_address="127.0.0.1:1"))
    assert isinstance(await error_of(gone), DeliveryFailed)
    call.cancel()


async def test_whoever_leaves_in_mid_move_leaves_nothing(two: Two) -> None:
    for leaver in ("old", "new"):
        for _ in range(5):
            old = await two.begin()
            await read(old, 3)
            new = await two.move()
            (old if leaver == "old" else new).cancel()
            await asyncio.sleep(random.Random(leaver).random() / 50)
            (new if leaver == "old" else old).cancel()
            await two.here.until_idle()
            await two.there.until_idle()


Damage = Callable[[list[bytes]], Iterable[bytes]]


def flip_a_bit(frames: list[bytes]) -> list[bytes]:
    middle = bytearray(frames[3])
    middle[-1] ^= 1
    return [*frames[:3], bytes(middle), *frames[4:]]


def change_a_token(frames: list[bytes]) -> list[bytes]:
    last = pb.PushFrame.FromString(frames[-1])
    last.trailer.sequence.token_ids[0] ^= 1
    return [*frames[:-1], last.SerializeToString()]


def end_after_the_first_sequence(frames: list[bytes]) -> list[bytes]:
    headers = [at for at, f in enumerate(frames) if pb.PushFrame.FromString(f).HasField("header")]
    return frames[: headers[1]]


def repeat_the_first_sequence(frames: list[bytes]) -> list[bytes]:
    first = end_after_the_first_sequence(frames)
    return [*first, *first]


def send_what_prefill_sends(frames: list[bytes]) -> list[bytes]:
    last = pb.PushFrame.FromString(frames[-1])
    last.trailer.ClearField("sequence")
    return [*frames[:-1], last.SerializeToString()]


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        change_a_token,
        end_after_the_first_sequence,
        repeat_the_first_sequence,
        send_what_prefill_sends,
        lambda frames: frames[:-1],
        lambda frames: frames[:4],
        lambda _: [],
    ],
)
async def test_a_damaged_fetch_yields_no_token(two: Two, damage: Damage) -> None:
    old = await two.begin(num_sequences=2)
    await read(old, 3)
    with Forger(two.here.worker.kv_address, damage) as address:
        new = await two.move(origin=two.origin(kv_address=address), num_sequences=2)
        error = await error_of(new)
    assert isinstance(error, DeliveryFailed)
    await read(old)


class Forger:
    """A real worker's Fetch, damaged on its way."""

    def __init__(self, address: str, damage: Damage) -> None:
        self._channel = grpc.insecure_channel(address)
        self._damage = damage
        self._threads = ThreadPoolExecutor(1)
        handler = grpc.unary_stream_rpc_method_handler(self._fetch)
        handlers = grpc.method_handlers_generic_handler("winnow.v1.KvTransfer", {"Fetch": handler})
        self._server = grpc.server(self._threads, handlers=[handlers])
        self._port = self._server.add_insecure_port("127.0.0.1:0")

    def _fetch(self, body: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield from self._damage(list(self._channel.unary_stream(FETCH)(body, timeout=SOON_S)))

    def __enter__(self) -> str:
        self._server.start()
        return f"127.0.0.1:{self._port}"

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()
        self._threads.shutdown()
        self._channel.close()


async def fetch(client: Client, **fields: Any) -> list[bytes]:
    """All frames; raises the WinnowError that the worker refuses with."""
    asked = pb.FetchRequest(into_request_id="x", wire_version=6, **fields)
    async with grpc.aio.insecure_channel(client.worker.kv_address) as channel:
        call = channel.unary_stream(FETCH)(asked.SerializeToString(), timeout=SOON_S)
        try:
            return [frame async for frame in call]
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error


async def test_the_prompt_s_length_must_be_the_same(two: Two) -> None:
    call = await two.begin()
    await read(call, 3)
    new = await two.move(num_prompt_tokens=len(PROMPT) - 1, max_prompt_entries=len(PROMPT) - 1)
    assert isinstance(await error_of(new), DeliveryFailed)
