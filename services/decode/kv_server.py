"""The KvTransfer service on its own sync gRPC server, with a thread per transfer.

Generic handlers without (de)serializers pass each frame as bytes; protobuf classes or asyncio would
cost a third of the throughput (benchmarks/transfer.py).
"""

from concurrent.futures import ThreadPoolExecutor

import grpc

from services.common.peer_guard import PeerGuard
from services.common.rpc import server_options
from services.common.tls import PeerTls, bind
from services.decode.give_away import KvGiver
from services.decode.push import MAX_OPEN_TRANSFERS, KvReceiver

MAX_WAITING_TRANSFERS = 64


class KvServer:
    """Serves Push and Fetch, at most MAX_OPEN_TRANSFERS at once.

    Up to MAX_WAITING_TRANSFERS more wait with their frames unread, which makes their senders wait
    too; further ones are refused with RESOURCE_EXHAUSTED.
    """

    def __init__(self, receiver: KvReceiver, giver: KvGiver, peers: PeerTls | None) -> None:
        self._credentials = peers.server_credentials() if peers else None
        self._threads = ThreadPoolExecutor(MAX_OPEN_TRANSFERS, "winnow-kv")
        methods = {
            "Push": grpc.stream_unary_rpc_method_handler(receiver.push),
            "Fetch": grpc.unary_stream_rpc_method_handler(giver.fetch),
        }
        self._server = grpc.server(
            self._threads,
            interceptors=[PeerGuard(peers.name)] if peers else [],
            handlers=[grpc.method_handlers_generic_handler("winnow.v1.KvTransfer", methods)],
            options=server_options(),
            maximum_concurrent_rpcs=MAX_OPEN_TRANSFERS + MAX_WAITING_TRANSFERS,
        )

    def start(self, host: str, port: int) -> int:
        """Serve on `port` (0: any free one); returns the port.  Raises InvalidSetting if taken."""
        bound = bind(
            self._server, host, port, self._credentials, what="KV transfers", param="kv_port"
        )
        self._server.start()
        return bound

    def stop(self) -> None:
        """Abort open transfers and return when every thread has ended."""
        self._server.stop(grace=None).wait()
        self._threads.shutdown()
