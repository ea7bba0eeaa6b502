"""What gateway and prefill say to a decode worker, over real channels."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence

import grpc
import grpc.aio

from services.common.messages import recompression_to_proto, sampling_to_proto
from services.common.rpc import channel_options, error_from_rpc
from services.decode.worker import DecodeWorker
from tests.winnow.drive import UNPRUNED, prefill_all
from winnow.errors import WinnowError
from winnow.request import PruningSettings, SamplingParams
from winnow.v1 import decode_pb2 as pb
from winnow.v1.decode_pb2_grpc import DecodeStub
from winnow.wire import TransferEncoder

PROMPT = tuple(range(5, 45))
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
Call = grpc.aio.UnaryStreamCall


class Client:
    """A gateway (`generate`) and a prefill worker (`push`) in one, for one decode worker."""

    def __init__(self, worker: DecodeWorker) -> None:
        self.worker = worker
        self._control = grpc.aio.insecure_channel(worker.address, options=channel_options())
        self._data = grpc.aio.insecure_channel(worker.kv_address, options=channel_options())
        self.decode = DecodeStub(self._control)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._control.close()
        await self._data.close()

    def request(self, request_id: str = "r1", **changes: object) -> pb.GenerateRequest:
        values = {
            "request_id": request_id,
            "model_fingerprint": self.worker.engine.model.fingerprint,
            "num_prompt_tokens": len(PROMPT),
            "num_sequences": 1,
            "max_prompt_entries": len(PROMPT),
            "sampling": sampling_to_proto(GREEDY),
            "recompression": recompression_to_proto(UNPRUNED),
        }
        return pb.GenerateRequest(**(values | changes))

    def generate(self, request: pb.GenerateRequest, timeout_s: float = 30) -> Call:
        return self.decode.Generate(request, timeout=timeout_s)

    async def admit(self, request: pb.GenerateRequest) -> Call:
        """A call whose `admitted` event was read."""
        call = self.generate(request)
        event = await call.read()
        assert event is not grpc.aio.EOF, await error_of(call)
        assert event.HasField("admitted")
        return call

    def frames(
        self,
        request_id: str = "r1",
        attempt: int = 1,
        *,
        token_ids: Sequence[int] = PROMPT,
        pruning: PruningSettings = UNPRUNED,
        fingerprint: str | None = None,
    ) -> list[bytes]:
        """A whole transfer of the prompt's real KV."""
        model = self.worker.engine.model
        layers, result = prefill_all(model, token_ids, pruning)
        encoder = TransferEncoder(
            request_id,
            attempt,
            fingerprint or model.fingerprint,
            model.shape,
            len(token_ids),
            frame_bytes=4096,
        )
        frames = [encoder.header()]
        for layer in layers:
            frames += encoder.layer(layer)
        return [*frames, encoder.trailer(result.final_hidden, result.report)]

    def open_push(self) -> grpc.aio.StreamUnaryCall:
        """A transfer whose frames the test writes itself."""
        push = self._data.stream_unary(
            "/winnow.v1.KvTransfer/Push", response_deserializer=pb.PushReceipt.FromString
        )
        return push(timeout=30)

    async def push(self, frames: Iterable[bytes]) -> pb.PushReceipt:
        """Raises the WinnowError that the worker refuses with."""
        call = self.open_push()
        try:
            for frame in frames:
                await call.write(frame)
            await call.done_writing()
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            pass  # refused before all was sent; awaiting the call tells why
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def until_idle(self) -> None:
        """Returns when the worker holds no request and no page.

        A cancelled request's pages go with the engine's next step, so this asks until they have.
        """
        await self.worker.admission.wait_until_idle(20)
        while (status := await self.status()).pages_reserved:
            pass
        assert (status.pages_used, status.running_sequences, status.reserved_requests) == (0, 0, 0)

    async def status(self) -> pb.StatusResponse:
        return await self.decode.Status(pb.StatusRequest(), timeout=10)


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
