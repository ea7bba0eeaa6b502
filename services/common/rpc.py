"""Options and error mapping shared by all of Winnow's gRPC servers and channels.

A WinnowError crosses the wire as the gRPC code from the table in winnow/errors.py, its message, and
the trailing metadata `winnow-error` (its code) and `winnow-param` (the field at fault).
"""

from typing import NoReturn

import grpc
import grpc.aio

from winnow.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NoDecodeWorker,
    Overloaded,
    RequestCancelled,
    WinnowError,
    error_class,
    status_of,
)
from winnow.wire import MAX_FRAME_BYTES

ERROR_KEY = "winnow-error"
PARAM_KEY = "winnow-param"

# A dead peer of an open call is detected within the sum of both; idle channels send no pings.
KEEPALIVE_INTERVAL_S = 20
KEEPALIVE_TIMEOUT_S = 10

# For connections to close after a server's last call. Without it gRPC breaks them off with an
# error, of which each client writes a line.
STOP_GRACE_S = 0.5

# A longer one would exceed the 8 KiB that HTTP/2 peers accept as trailing metadata.
_MAX_DETAIL_CHARS = 2000

_FOREIGN: dict[grpc.StatusCode, type[WinnowError]] = {
    grpc.StatusCode.UNAVAILABLE: NoDecodeWorker,
    grpc.StatusCode.PERMISSION_DENIED: NoDecodeWorker,  # the certificate lacks the peers' name
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: RequestCancelled,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
}

Options = list[tuple[str, int]]


def channel_options() -> Options:
    """Options of every outgoing channel."""
    return [*_sizes(), *_keepalive()]


def server_options(*, share_port: bool = False) -> Options:
    """Options of every server; `share_port` lets several processes listen on one port."""
    return [
        *_sizes(),
        *_keepalive(),
        ("grpc.so_reuseport", int(share_port)),
        # Clients ping every KEEPALIVE_INTERVAL_S; the default would treat that as abuse.
        ("grpc.http2.min_ping_interval_without_data_ms", 1000 * KEEPALIVE_INTERVAL_S // 2),
    ]


def _sizes() -> Options:
    return [
        ("grpc.max_send_message_length", MAX_FRAME_BYTES),
        ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ]


def _keepalive() -> Options:
    return [
        ("grpc.keepalive_time_ms", 1000 * KEEPALIVE_INTERVAL_S),
        ("grpc.keepalive_timeout_ms", 1000 * KEEPALIVE_TIMEOUT_S),
        # The default is a minute: a peer cut off in mid-stream was detected after 80 s, not 30.
        ("grpc.http2.ping_timeout_ms", 1000 * KEEPALIVE_TIMEOUT_S),
        ("grpc.keepalive_permit_without_calls", 0),
        # A token stream carries no data while it waits for prefill; the default stops the pings.
        ("grpc.http2.max_pings_without_data", 0),
    ]


def status_code(error: WinnowError) -> grpc.StatusCode:
    """The gRPC status code for `error`."""
    return grpc.StatusCode[status_of(error).grpc]


def error_metadata(error: WinnowError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata with the code and param of `error`."""
    param = ((PARAM_KEY, error.param),) if error.param else ()
    return ((ERROR_KEY, error.code), *param)


def abort(context: grpc.ServicerContext, error: WinnowError) -> NoReturn:
    """End a sync server's call with `error`."""
    context.set_trailing_metadata(error_metadata(error))
    context.abort(status_code(error), error.message[:_MAX_DETAIL_CHARS])
    raise AssertionError("abort raises")


async def abort_aio(
    context: "grpc.aio.ServicerContext[object, object]", error: WinnowError
) -> NoReturn:
    """End an asyncio server's call with `error`."""
    details = error.message[:_MAX_DETAIL_CHARS]
    await context.abort(status_code(error), details, error_metadata(error))
    raise AssertionError("abort raises")


def is_typed(error: grpc.RpcError) -> bool:
    """Whether the error came from a Winnow server, not from gRPC itself or a proxy."""
    return ERROR_KEY in dict(error.trailing_metadata() or ())


def error_from_rpc(error: grpc.RpcError) -> WinnowError:
    """The WinnowError for a failed call.

    Without our metadata (no connection, a deadline, a proxy) the gRPC code decides: UNAVAILABLE
    is NoDecodeWorker, DEADLINE_EXCEEDED is DeadlineExceeded, and so on; otherwise WinnowError.
    """
    code, details = error.code(), error.details() or ""
    metadata = dict(error.trailing_metadata() or ())
    kind = metadata.get(ERROR_KEY)
    if kind is not None:
        return error_class(str(kind))(details, param=metadata.get(PARAM_KEY))
    return _FOREIGN.get(code, WinnowError)(f"{code.name}: {details}")
