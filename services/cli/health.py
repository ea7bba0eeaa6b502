"""`winnow health` and `winnow drain`: probes and pre-stop hook for containers."""

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.settings import Settings
from services.common.tls import PeerTls, open_channel, own_verification
from winnow.errors import WinnowError
from winnow.v1 import decode_pb2 as pb
from winnow.v1.decode_pb2_grpc import DecodeStub

TIMEOUT_S = 4.0


class Unhealthy(WinnowError):
    """The target does not answer, or answers that it is not serving."""


def drain(address: str, timeout_s: float, settings: Settings) -> int:
    """Drain a decode worker: its requests move or finish, and it admits no more.

    Returns how many are left.  Raises Unhealthy if it does not answer.
    """
    with open_channel(address, PeerTls.load(settings)) as channel:
        stub = DecodeStub(channel)
        try:
            answer = stub.Drain(pb.DrainRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise Unhealthy(f"{address} does not answer: {error.code().name}") from error
    return int(answer.remaining_requests)


def check(target: str, settings: Settings, service: str = "") -> None:
    """Check a gateway's URL, like http://host:8000/ready, or a decode worker's host:port.

    service: a decode worker's service, as in gRPC's health protocol.  Raises Unhealthy.
    """
    if target.startswith(("http://", "https://")):
        _check_http(target, settings)
    else:
        _check_grpc(target, settings, service)


def _check_http(url: str, settings: Settings) -> None:
    try:
        response = httpx.get(url, timeout=TIMEOUT_S, verify=own_verification(settings))
    except httpx.HTTPError as error:
        raise Unhealthy(f"{url} does not answer: {error}") from error
    if not response.is_success:
        raise Unhealthy(f"{url} answers with status {response.status_code}")


def _check_grpc(address: str, settings: Settings, service: str) -> None:
    with open_channel(address, PeerTls.load(settings)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise Unhealthy(f"{address} does not answer: {error.code().name}") from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unhealthy(f"{address} does not take requests")
