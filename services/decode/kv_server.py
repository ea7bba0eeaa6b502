"""The KvTransfer service on its own sync gRPC server, with a thread per transfer.

Generic handlers without (de)serializers pass each frame as bytes; protobuf classes or asyncio would
cost a third of the throughput (benchmarks/transfer.py).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import grpc
import torch

from services.common.peer_guard import PeerGuard
from services.common.rpc import STOP_GRACE_S, server_options
from services.common.tls import PeerTls, bind
from services.decode.give_away import KvGiver
from winnow.distributed.arrivals import MAX_PARTS

MAX_OPEN_TRANSFERS = 32  # prompts that prefill workers compute for this one, paused ones too
MAX_WAITING_TRANSFERS = 64


class Receiver(Protocol):
    """Serves Push."""

    def push(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> bytes: ...


class KvServer:
    """Serves Push and Fetch, at most MAX_OPEN_TRANSFERS calls at once.

    Up to MAX_WAITING_TRANSFERS more wait with their frames unread, which makes their senders wait
    too; further ones are refused with RESOURCE_EXHAUSTED.

    giver: None: Fetch is not served.  of_several_ranks: each transfer may be several calls, all of
    which have to be served at once, or none of them would end. So MAX_PARTS times as many calls are
    served, and rank 0 begins MAX_OPEN_TRANSFERS attempts at once (push.py).  device: that layers go
    to.
    """

    def __init__(
        self,
        receiver: Receiver,
        giver: KvGiver | None,
        peers: PeerTls | None,
        *,
        of_several_ranks: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._credentials = peers.server_credentials() if peers else None
        num_threads = MAX_OPEN_TRANSFERS * (MAX_PARTS if of_several_ranks else 1)
        self._threads = ThreadPoolExecutor(num_threads, "winnow-kv", _choosing(device))
        methods: dict[str, grpc.RpcMethodHandler] = {
            "Push": grpc.stream_unary_rpc_method_handler(receiver.push)
        }
        if giver is not None:
            methods["Fetch"] = grpc.unary_stream_rpc_method_handler(giver.fetch)
        self._server = grpc.server(
            self._threads,
            interceptors=[PeerGuard(peers.name)] if peers else [],
            handlers=[grpc.method_handlers_generic_handler("winnow.v1.KvTransfer", methods)],
            options=server_options(),
            maximum_concurrent_rpcs=num_threads + MAX_WAITING_TRANSFERS,
        )

    def start(self, host: str, port: int) -> int:
        """Serve on `port` (0: any free one); returns the port.  Raises InvalidSetting if taken."""
        bound = bind(
            self._server, host, port, self._credentials, what="KV transfers", param="kv_port"
        )
        self._server.start()
        return bound

    def stop(self) -> None:
        """Abort transfers still open after STOP_GRACE_S; return when every thread has ended."""
        self._server.stop(STOP_GRACE_S).wait()
        self._threads.shutdown()


def _choosing(device: torch.device | None) -> Callable[[], Any] | None:
    """What a thread begins with, so that the device's kernels run there."""
    if device is None or device.type != "cuda":
        return None
    return partial(torch.cuda.set_device, device)
