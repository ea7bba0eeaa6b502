"""What a stranger finds at the ports of a running service's Ray."""

from collections.abc import Iterable

import grpc
import psutil

from tests.deadlines import SOON_S
from tests.processes import of_each

# One of each of Ray's services that run code, or tell what is stored; the replica's unpickles.
RAY_CALLS = (
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.serve.ASGIService/HandleRequest",
)


def outward_ports(processes: Iterable[psutil.Process]) -> set[int]:
    """Those that are not on this machine's own address alone."""
    return {
        connection.laddr.port
        for connections in of_each(processes, lambda process: process.net_connections("tcp"))
        for connection in connections
        if connection.status == psutil.CONN_LISTEN and "127.0.0.1" not in connection.laddr.ip
    }


def auth_tokens(processes: Iterable[psutil.Process]) -> set[str]:
    """Those that the processes have in their environment."""
    found = of_each(processes, lambda process: process.environ().get("RAY_AUTH_TOKEN"))
    return {token for token in found if token}


def code_of(port: int, call: str, token: str | None) -> grpc.StatusCode:
    """What an empty message is answered with."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = channel.unary_unary(call).future(b"", metadata=metadata, timeout=SOON_S)
        code: grpc.StatusCode = answer.code()  # waits for it
    return code
