"""The receiving end of a push as a real gRPC server, with hooks to make it slow or broken."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from services.common.rpc import abort, server_options
from winnow.decoder import DecoderModel
from winnow.errors import WinnowError
from winnow.kv import LayerKV
from winnow.v1 import decode_pb2 as pb
from winnow.wire import WIRE_VERSIONS, Expected, Grant, Header, Trailer, TransferDecoder

MAX_ENTRIES, MAX_WINDOW = 8192, 64
GRANT = Grant.issue(WIRE_VERSIONS)


class Receiver:
    """Keeps what arrives. `before_layer` runs before each layer is taken; it may block or raise."""

    def __init__(
        self, model: DecoderModel, num_prompt_tokens: int, heads: range | None = None
    ) -> None:
        """heads: those of a rank; None: all."""
        self.expected = Expected(
            GRANT,
            model.fingerprint,
            model.shape,
            num_prompt_tokens,
            MAX_ENTRIES,
            MAX_WINDOW,
            heads=heads,
        )
        self.headers: list[Header] = []
        self.layers: list[LayerKV] = []
        self.trailers: list[Trailer] = []
        self.before_layer: Callable[[int], None] = lambda layer_idx: None
        self.stop_after_layer: int | None = None  # answer as if this were the last one
        self.call_begun = threading.Event()
        self.call_ended = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(4), options=server_options())
        handler = grpc.stream_unary_rpc_method_handler(
            self._push,
            request_deserializer=None,
            response_serializer=pb.PushReceipt.SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("winnow.v1.KvTransfer", {"Push": handler}),)
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait(10)

    def _push(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> pb.PushReceipt:
        if not context.add_callback(self.call_ended.set):  # it has ended already
            self.call_ended.set()
        self.call_begun.set()
        decoder = TransferDecoder(self.expected)
        try:
            for frame in frames:
                self._keep(event := decoder.feed(frame))
                if isinstance(event, LayerKV) and event.layer_idx == self.stop_after_layer:
                    break
        except WinnowError as error:
            abort(context, error)
        return pb.PushReceipt(num_layers=decoder.num_layers, payload_bytes=decoder.payload_bytes)

    def _keep(self, event: Header | LayerKV | Trailer | None) -> None:
        if isinstance(event, Header):
            self.headers.append(event)
        elif isinstance(event, Trailer):
            self.trailers.append(event)
        elif event is not None:
            self.before_layer(event.layer_idx)
            self.layers.append(_owned(event))


def _owned(layer: LayerKV) -> LayerKV:
    """A copy: the decoder's own tensors are views of a buffer that it uses again."""
    tensors: dict[str, Any] = {
        name: getattr(layer, name).clone()
        for name in ("keys", "values", "positions", "window_queries", "scales")
        if getattr(layer, name) is not None
    }
    tensors["states"] = tuple(state.clone() for state in layer.states)
    return LayerKV(layer_idx=layer.layer_idx, head_lengths=layer.head_lengths, **tensors)
