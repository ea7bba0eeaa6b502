"""TLS on the gateway's gRPC API, and mutual TLS between gateway, prefill and decode."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cli.health import Unhealthy, check
from services.common.settings import Settings
from services.common.settings_sources import load_settings
from services.common.tls import PeerTls, open_channel
from tests.certificates import peer_files
from tests.deadlines import SOON_S
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from winnow.errors import InvalidSetting
from winnow.v1 import decode_pb2, inference_pb2
from winnow.v1.decode_pb2_grpc import DecodeStub, KvTransferStub
from winnow.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(
    model_path: Path, redis_url: str, tls_files: dict[str, Path]
) -> AsyncIterator[TestService]:
    changes: dict[str, Any] = {**tls_files}
    async with running_service(model_path, redis_url, **changes) as service:
        yield service
        await service.until_idle()


async def test_answers_over_encrypted_connections(
    service: TestService, authority: trustme.CA
) -> None:
    done = await service.openai.completions.create(model=MODEL_NAME, prompt="a b", max_tokens=4)
    assert done.usage is not None and done.usage.completion_tokens == 4
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    address = service.grpc_address.replace("127.0.0.1", "localhost")
    async with grpc.aio.secure_channel(address, credentials) as channel:
        request = inference_pb2.CompleteRequest(model=MODEL_NAME, text="a b", max_tokens=4)
        responses = [response async for response in InferenceStub(channel).Complete(request)]
    assert responses[-1].HasField("usage")


async def test_the_public_api_speaks_no_plain_text(service: TestService) -> None:
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        call = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=SOON_S
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def stranger(tls_files: dict[str, Path], folder: Path) -> PeerTls:
    """Trusts the service's authority, but shows a certificate of another one."""
    other = peer_files(trustme.CA(), folder / "other")
    other["peer_ca_file"] = tls_files["peer_ca_file"]
    tls = PeerTls.load(Settings(**other))
    assert tls is not None
    return tls


@pytest.mark.parametrize("port", ["address", "kv_address"])
@pytest.mark.parametrize("kind", ["plain", "anonymous", "stranger"])
async def test_only_peers_reach_a_decode_worker(
    service: TestService, tls_files: dict[str, Path], tmp_path: Path, port: str, kind: str
) -> None:
    address = getattr(service.workers[0], port)
    options = [("grpc.ssl_target_name_override", "winnow")]
    if kind == "plain":
        channel = grpc.insecure_channel(address)
    elif kind == "anonymous":
        credentials = grpc.ssl_channel_credentials(tls_files["peer_ca_file"].read_bytes())
        channel = grpc.secure_channel(address, credentials, options)
    else:
        channel = open_channel(address, stranger(tls_files, tmp_path))
    with channel, pytest.raises(grpc.RpcError) as refused:
        if port == "address":
            DecodeStub(channel).Status(decode_pb2.StatusRequest(), timeout=SOON_S)
        else:
            KvTransferStub(channel).Push(iter([decode_pb2.PushFrame()]), timeout=SOON_S)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


STREAMS = {
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/winnow.v1.KvTransfer/Push",
}


@pytest.mark.parametrize(
    "method",
    [
        "/winnow.v1.Decode/Generate",
        "/winnow.v1.Decode/Status",
        "/winnow.v1.Decode/Drain",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/winnow.v1.KvTransfer/Push",
        "/winnow.v1.KvTransfer/Fetch",
    ],
)
async def test_a_certificate_of_the_authority_for_somebody_else_is_no_peer_s(
    service: TestService,
    authority: trustme.CA,
    tls_files: dict[str, Path],
    tmp_path: Path,
    method: str,
) -> None:
    worker = service.workers[0]
    address = worker.kv_address if "KvTransfer" in method else worker.address
    peers = PeerTls.load(Settings(**peer_files(authority, tmp_path / "other", "other.example.org")))
    assert peers is not None
    options = [("grpc.ssl_target_name_override", "winnow")]
    credentials = peers.channel_credentials()
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        call = channel.stream_stream(method)(timeout=SOON_S)
        if method not in STREAMS:  # these are refused before anything is said
            await call.write(b"")
            await call.done_writing()
        assert await call.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_worker_with_a_peers_certificate_of_another_name_is_not_trusted(
    service: TestService, tls_files: dict[str, Path]
) -> None:
    peers = PeerTls.load(Settings(**(tls_files | {"peer_name": "somebody-else"})))
    with open_channel(service.workers[0].address, peers) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            DecodeStub(channel).Status(decode_pb2.StatusRequest(), timeout=SOON_S)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_health_is_asked_with_the_peers_certificate(
    service: TestService, tls_files: dict[str, Path]
) -> None:
    await asyncio.to_thread(check, service.workers[0].address, Settings(**tls_files))
    with pytest.raises(Unhealthy, match="does not answer"):
        await asyncio.to_thread(check, service.workers[0].address, Settings())


async def test_half_of_a_pair_is_refused(tls_files: dict[str, Path]) -> None:
    with pytest.raises(InvalidSetting, match="tls_key_file is set without tls_cert_file"):
        load_settings({"tls_key_file": tls_files["tls_key_file"]})
    with pytest.raises(InvalidSetting, match=r"without peer_ca_file, peer_key_file"):
        load_settings({"peer_cert_file": tls_files["peer_cert_file"]})


async def test_files_that_are_no_use_are_named(tls_files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"peer_cert_file .* No such file"):
        PeerTls.load(Settings(**(tls_files | {"peer_cert_file": tmp_path / "none.pem"})))
    with pytest.raises(InvalidSetting, match=r"its key .* cannot be used"):
        PeerTls.load(Settings(**(tls_files | {"peer_key_file": tls_files["tls_key_file"]})))
    with pytest.raises(InvalidSetting, match=r"peer_ca_file .* No such file"):
        PeerTls.load(Settings(**(tls_files | {"peer_ca_file": tmp_path / "none.pem"})))


async def test_the_private_key_is_not_printed(tls_files: dict[str, Path]) -> None:
    assert "PRIVATE" not in repr(PeerTls.load(Settings(**tls_files)))
