"""What gateway and prefill say to a decode worker, over real channels."""

import asyncio
import queue
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest

from services.common.messages import recompression_to_proto, sampling_to_proto
from services.common.rpc import channel_options, error_from_rpc
from services.decode.worker import DecodeWorker
from services.gateway.request.generate_call import grant_in
from tests.deadlines import SOON_S
from tests.winnow.drive import UNPRUNED, admit, decode_all, ids, make_engine, prefill_all, spec
from winnow.engine.prefill import PrefillResult
from winnow.errors import WinnowError
from winnow.kv import LayerKV
from winnow.pruning_settings import PruningSettings
from winnow.sampler_version import SAMPLER_VERSION
from winnow.sampling_params import SamplingParams
from winnow.v1 import decode_pb2 as pb
from winnow.v1.decode_pb2_grpc import DecodeStub
from winnow.wire import WIRE_VERSIONS, Grant, Header, TransferEncoder

PROMPT = tuple(range(5, 45))
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
NOT_GRANTED = Grant(max(WIRE_VERSIONS), b"a secret of nobody's")
# A transfer that waits for frames is cancelled; one that is writing is refused.
BROKEN_OFF = (
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.NOT_FOUND,
)
Call: TypeAlias = grpc.aio.UnaryStreamCall[Any, Any]


class Client:
    """A gateway (`generate`) and a prefill worker (`push`) in one, for one decode worker."""

    def __init__(self, worker: DecodeWorker) -> None:
        self.worker = worker
        self.grants: dict[str, Grant] = {}  # by request id
        self._control = grpc.aio.insecure_channel(worker.address, options=channel_options())
        self._data = grpc.insecure_channel(worker.kv_address, options=channel_options())
        self.decode = DecodeStub(self._control)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._control.close()
        self._data.close()

    def request(self, request_id: str = "r1", **changes: Any) -> pb.GenerateRequest:
        values: dict[str, Any] = {
            "request_id": request_id,
            "model_fingerprint": self.worker.engine.model.fingerprint,
            "num_prompt_tokens": len(PROMPT),
            "num_sequences": 1,
            "max_prompt_entries": len(PROMPT),
            "sampling": sampling_to_proto(GREEDY),
            "recompression": recompression_to_proto(UNPRUNED.decode_side),
            "wire_versions": WIRE_VERSIONS,
            "sampler_version": SAMPLER_VERSION,
        }
        return pb.GenerateRequest(**(values | changes))

    def generate(self, request: pb.GenerateRequest, timeout_s: float = 30) -> Call:
        return self.decode.Generate(request, timeout=timeout_s)

    async def admit(self, request: pb.GenerateRequest, timeout_s: float = 30) -> Call:
        """A call whose `admitted` event was read."""
        call = self.generate(request, timeout_s)
        event = await call.read()
        assert event is not grpc.aio.EOF, await error_of(call)
        assert event.HasField("admitted")
        self.grants[request.request_id] = grant_in(event.admitted)
        return call

    def frames(
        self,
        request_id: str = "r1",
        attempt: int = 1,
        *,
        token_ids: Sequence[int] = PROMPT,
        pruning: PruningSettings = UNPRUNED,
    ) -> list[bytes]:
        """A whole transfer of the prompt's real KV."""
        return self.encode(*self.prefill(token_ids, pruning), request_id, attempt)

    def prefill(
        self, token_ids: Sequence[int] = PROMPT, pruning: PruningSettings = UNPRUNED
    ) -> tuple[list[LayerKV], PrefillResult]:
        return prefill_all(self.worker.engine.model, token_ids, pruning)

    def encode(
        self,
        layers: list[LayerKV],
        result: PrefillResult,
        request_id: str = "r1",
        attempt: int = 1,
    ) -> list[bytes]:
        """The frames of one transfer; many per layer, as those of long prompts are."""
        model = self.worker.engine.model
        header = Header(
            request_id,
            attempt,
            self.grants.get(request_id, NOT_GRANTED).ticket(attempt),
            model.fingerprint,
            model.shape,
            result.report.num_prompt_tokens,
        )
        encoder = TransferEncoder(header, frame_bytes=4096)
        frames = [encoder.header()]
        for layer in layers:
            frames += encoder.layer(layer)
        return [*frames, encoder.trailer(result.final_hidden, result.report)]

    def open_push(self) -> "OpenPush":
        """A transfer whose frames the test writes one by one."""
        return OpenPush(self._data)

    async def push(self, frames: Iterable[bytes]) -> pb.PushReceipt:
        """Sends a whole transfer; raises the WinnowError that the worker refuses with."""
        try:
            return await self._send(frames)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    async def refused_push(self, frames: Iterable[bytes]) -> grpc.RpcError:
        """What gRPC says of a transfer that must not succeed."""
        with pytest.raises(grpc.RpcError) as refusal:
            await self._send(frames)
        return refusal.value

    async def _send(self, frames: Iterable[bytes]) -> pb.PushReceipt:
        call = self.open_push()
        call.write(*frames)
        return await call.finish()

    async def until_open_transfers(self, count: int) -> None:
        while (await self.status()).open_transfers != count:
            pass

    async def until_pages_used(self) -> None:
        while not (await self.status()).pages_used:
            pass

    async def until_idle(self) -> None:
        """Returns when the worker holds no request and no page.

        A cancelled request's pages go with the engine's next step, so this asks until they have.
        """
        await self.worker.admission.wait_until_idle(20)
        while (status := await self.status()).pages_reserved:
            pass
        assert (status.pages_used, status.running_sequences, status.reserved_requests) == (0, 0, 0)

    async def status(self) -> pb.StatusResponse:
        return await self.decode.Status(pb.StatusRequest(), timeout=SOON_S)


class OpenPush:
    """A transfer under way, sent as prefill does: by grpc's own thread, from a queue."""

    def __init__(self, channel: grpc.Channel) -> None:
        push = channel.stream_unary(
            "/winnow.v1.KvTransfer/Push", response_deserializer=pb.PushReceipt.FromString
        )
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = push.future(iter(self._frames.get, None), timeout=30)

    def write(self, *frames: bytes) -> None:
        for frame in frames:
            self._frames.put(frame)

    async def finish(self) -> pb.PushReceipt:
        """Raises grpc.RpcError where the worker refuses."""
        self._frames.put(None)
        return await asyncio.to_thread(self._call.result)

    async def code(self) -> grpc.StatusCode:
        """How the call ended, which was not by `finish`."""
        code = await asyncio.to_thread(self._call.code)
        self._frames.put(None)
        return code

    def cancel(self) -> None:
        self._call.cancel()
        self._frames.put(None)


async def events_of(call: Call) -> AsyncIterator[pb.GenerateEvent]:
    while (event := await call.read()) is not grpc.aio.EOF:
        yield event


async def token_ids_of(call: Call, sequence_idx: int = 0) -> list[int]:
    return [
        token.token_id
        async for event in events_of(call)
        for token in event.tokens.tokens
        if token.sequence_idx == sequence_idx
    ]


async def error_of(call: Call) -> WinnowError:
    """The error that a call ends with, whatever it streams before."""
    try:
        async for _ in events_of(call):
            pass
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error)
    raise AssertionError("the call ended with OK")


def damage_data(frames: list[bytes]) -> list[bytes]:
    frames[2] = frames[2][:-1] + bytes([frames[2][-1] ^ 1])
    return frames


def right_answer(client: Client) -> list[int]:
    engine = make_engine(client.worker.engine.model)
    admit(engine, spec("alone", len(PROMPT), GREEDY), PROMPT)
    return ids(decode_all(engine)["alone"])
