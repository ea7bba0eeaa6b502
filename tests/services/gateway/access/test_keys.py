"""API keys and their limits, over REST and gRPC."""

import asyncio
import os
import socket
import time
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.cli.main import main
from services.common.logs import TextFormatter
from services.common.rpc import ERROR_KEY
from services.common.settings import Settings
from services.gateway.access.access import Access
from services.gateway.access.keys import ApiKeys, entry_text, new_key
from tests.deadlines import SOON_S
from tests.services.exposed import value
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from winnow.errors import InvalidKey, InvalidSetting
from winnow.v1 import inference_pb2 as pb
from winnow.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODY: dict[str, Any] = {"model": MODEL_NAME, "prompt": [5, 6, 7], "max_tokens": 2}
FREE, FREE_ENTRY = new_key("free")
FEW, FEW_ENTRY = new_key("few", requests_per_minute=2)
SHORT, SHORT_ENTRY = new_key("short", tokens_per_minute=12)
UNKNOWN, _ = new_key("unknown")


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text("".join(map(entry_text, (FREE_ENTRY, FEW_ENTRY, SHORT_ENTRY))))
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(model_path: Path, redis_url: str, keys_file: Path) -> AsyncIterator[TestService]:
    async with running_service(model_path, redis_url, api_keys_file=keys_file) as service:
        yield service
        await service.until_idle()


async def post(service: TestService, key: str | None, **changes: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return await service.http.post("/v1/completions", json=BODY | changes, headers=headers)


async def test_a_key_lets_in(service: TestService) -> None:
    assert (await post(service, FREE)).status_code == 200


@pytest.mark.parametrize("key", [None, UNKNOWN, FREE + "x", "é"])
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/tokenize", "/v1/models", "/metrics", "/metrics/targets", "/nope"]
)
async def test_without_one_every_path_but_the_probes_is_closed(
    service: TestService, key: str | None, path: str
) -> None:
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    for method in ("GET", "POST"):
        refused = await service.http.request(method, path, headers=headers)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert not key or key not in error["message"]


async def test_a_body_is_not_read_without_a_key(service: TestService) -> None:
    host, _, port = service.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: 1000000\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(SOON_S):
        assert b" 401 " in await reader.readline()
    writer.close()


async def test_probes_need_no_key(service: TestService) -> None:
    for path in ("/health", "/ready"):
        assert (await service.http.get(path)).status_code == 200


async def test_the_operators_port_needs_no_key(service: TestService) -> None:
    for path in ("/health", "/ready", "/metrics", "/metrics/targets"):
        assert (await service.admin.get(path)).status_code == 200


async def test_requests_a_minute_are_limited(service: TestService) -> None:
    assert [(await post(service, FEW)).status_code for _ in range(3)] == [200, 200, 429]
    refused = await post(service, FEW)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "key few may use 2 requests a minute; 0 are left now" in error["message"]
    assert (await post(service, FREE)).status_code == 200


async def test_tokens_a_minute_are_limited(service: TestService) -> None:
    assert (await post(service, SHORT)).status_code == 200  # 3 and up to 2
    assert (await post(service, SHORT, n=2)).status_code == 200  # 3 and up to 4
    assert (await post(service, SHORT)).status_code == 429
    num_jobs = len(service.prefiller.jobs)
    never = await post(service, SHORT, max_tokens=10)
    assert "the request has 13 tokens; key short may use 12 a minute" in never.text
    assert (await post(service, SHORT, max_tokens=9)).status_code == 429
    assert len(service.prefiller.jobs) == num_jobs


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tokenize", {"prompt": "abcdef"}), ("/detokenize", {"tokens": [5, 6, 7, 8, 9]})],
)
async def test_tokens_that_are_made_or_read_alone_count_too(
    service: TestService, keys_file: Path, path: str, body: dict[str, Any]
) -> None:
    key, entry = new_key(path.strip("/"), tokens_per_minute=12)
    keys_file.write_text(keys_file.read_text() + entry_text(entry))  # noqa: ASYNC240 - short
    headers = {"authorization": f"Bearer {key}"}
    async with asyncio.timeout(SOON_S):
        while (done := await service.http.post(path, json=body, headers=headers)).is_error:
            pass  # until the file is read again
    statuses = [done.status_code]
    for _ in range(2):
        statuses.append((await service.http.post(path, json=body, headers=headers)).status_code)
    assert statuses == [200, 200, 429]


@pytest.mark.parametrize("way", ["rest", "grpc"])
async def test_a_request_that_the_service_refuses_uses_up_no_tokens(
    model_path: Path, redis_url: str, tmp_path: Path, way: str
) -> None:
    key, entry = new_key("short", tokens_per_minute=12)
    (tmp_path / "keys.yaml").write_text(entry_text(entry))
    changes: dict[str, Any] = {
        "api_keys_file": tmp_path / "keys.yaml",
        "namespace": f"refused-{way}",
    }
    ask = complete if way == "grpc" else completion
    async with running_service(model_path, redis_url, num_workers=0, **changes) as nobody:
        assert [await ask(nobody, key) for _ in range(4)] == ["no_decode_worker"] * 4
    async with running_service(model_path, redis_url, **changes) as one:
        assert [await ask(one, key) for _ in range(3)] == ["", "", "rate_limit_exceeded"]
        await one.until_idle()


async def completion(service: TestService, key: str) -> str:
    """The error's code."""
    body = (await post(service, key)).json()
    return str(body["error"]["code"]) if "error" in body else ""


async def complete(service: TestService, key: str) -> str:
    """As `completion`, over gRPC."""
    request = pb.CompleteRequest(
        model=MODEL_NAME, token_ids=pb.TokenIds(ids=BODY["prompt"]), max_tokens=2
    )
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        metadata = (("authorization", f"Bearer {key}"),)
        try:
            [_ async for _ in InferenceStub(channel).Complete(request, metadata=metadata)]
        except grpc.aio.AioRpcError as error:
            return str(dict(error.trailing_metadata() or ())[ERROR_KEY])
    return ""


async def test_grpc_asks_for_the_key_too(service: TestService) -> None:
    request = pb.CompleteRequest(model=MODEL_NAME, text="a", max_tokens=2)
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        stub = InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            [_ async for _ in stub.Complete(request)]
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert dict(refused.value.trailing_metadata() or ())[ERROR_KEY] == "invalid_api_key"
        metadata = (("authorization", f"Bearer {FREE}"),)
        assert [chunk async for chunk in stub.Complete(request, metadata=metadata)]


async def test_grpc_reads_no_message_without_a_key(service: TestService) -> None:
    """The caller never sends one, and is answered all the same."""
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        for method in ("/winnow.v1.Inference/Complete", "/winnow.v1.Inference/Nothing"):
            call = channel.stream_stream(method)(timeout=30)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_grpc_tells_without_a_key_whether_it_serves_and_nothing_else(
    service: TestService,
) -> None:
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert await health.Check(health_pb2.HealthCheckRequest(), timeout=SOON_S)
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(iter([listing]), timeout=SOON_S).read()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_revoked_key_is_refused_without_a_restart(
    service: TestService, keys_file: Path
) -> None:
    key, entry = new_key("for-a-while")
    before = keys_file.read_text()  # noqa: ASYNC240 - a short file
    for text, status in ((before + entry_text(entry), 200), (before, 401)):
        keys_file.write_text(text)  # noqa: ASYNC240
        async with asyncio.timeout(SOON_S):
            while (await post(service, key)).status_code != status:
                pass


async def test_refusals_are_counted_and_keys_are_in_no_log(
    service: TestService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    assert (await post(service, UNKNOWN)).status_code == 401
    assert (await post(service, FREE)).status_code == 200
    service.prefiller.failures = [ValueError("broken")]  # its traceback is logged
    assert (await post(service, FREE)).status_code == 500
    metrics = (await service.admin.get("/metrics")).text
    assert value(metrics, "winnow_requests_refused_total", reason="invalid_api_key") >= 1
    served = ("winnow", "services", "uvicorn")
    records = [record for record in caplog.records if record.name.startswith(served)]
    log = "\n".join(map(TextFormatter().format, records))
    assert "finished: " in log and "ValueError: broken" in log
    assert UNKNOWN not in log and FREE not in log


async def test_limits_are_counted_in_redis_for_all_gateways(
    model_path: Path, redis_url: str, tmp_path: Path
) -> None:
    key, entry = new_key("shared", requests_per_minute=1)
    (tmp_path / "keys.yaml").write_text(entry_text(entry))
    changes: dict[str, Any] = {
        "api_keys_file": tmp_path / "keys.yaml",
        "namespace": "shared-limits",
    }
    statuses = []
    for _ in range(2):
        async with running_service(model_path, redis_url, **changes) as one:
            statuses.append((await post(one, key)).status_code)
            await one.until_idle()
    assert statuses == [200, 429]


async def test_a_broken_file_keeps_the_keys_that_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(entry_text(FREE_ENTRY))
    keys = ApiKeys(path)
    path.write_text("- name: x\n")
    monkeypatch.setattr("services.gateway.access.keys._LOOK_AGAIN_S", 0)
    assert keys.require(f"bearer {FREE}").name == "free"
    assert "sha256: Field required; the keys from before stay" in caplog.text
    path.unlink()
    assert keys.require(f"Bearer {FREE}").name == "free"
    path.write_text("[]")
    os.utime(path, (time.time() + 5,) * 2)
    with pytest.raises(InvalidKey):
        keys.require(f"Bearer {FREE}")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- name: x", "0.sha256: Field required"),
        ("a: b", "valid list"),
        ('"secret', "is not YAML"),
        (entry_text(FREE_ENTRY) * 2, "has two keys named free"),
        (entry_text(FREE_ENTRY) + "  key: secret", "0.key: Extra inputs"),
    ],
)
async def test_a_file_that_is_no_use_is_refused_at_start(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(InvalidSetting, match=complaint) as refused:
        ApiKeys(path)
    assert "secret" not in "".join(traceback.format_exception(refused.value))
    with pytest.raises(InvalidSetting, match="cannot be read: No such file"):
        ApiKeys(tmp_path / "none.yaml")


async def test_winnow_key_writes_an_entry_and_shows_the_key_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["key", "team-a", "--tokens-per-minute", "5000"]) == 0
    out, err = capsys.readouterr()
    (tmp_path / "keys.yaml").write_text(out)
    key = err.split()[-1]
    assert key not in out
    found = ApiKeys(tmp_path / "keys.yaml").require(f"Bearer {key}")
    assert (found.name, found.tokens_per_minute, found.requests_per_minute) == (
        "team-a",
        5000,
        None,
    )
    assert main(["key", "no spaces"]) == 2


@pytest.mark.parametrize("answers", [False, True])
async def test_without_redis_keys_are_checked_and_limits_are_not(
    redis_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, answers: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        port = silent.getsockname()[1]
        if not answers:
            silent.close()
        (tmp_path / "keys.yaml").write_text(entry_text(FEW_ENTRY))
        settings = Settings(
            api_keys_file=tmp_path / "keys.yaml", redis_url=f"redis://127.0.0.1:{port}/0"
        )
        access = Access(settings)
        key = access.require(f"Bearer {FEW}")
        async with asyncio.timeout(SOON_S):
            for _ in range(3):
                await access.charge_request(key)
    assert "rate limits are not counted" in caplog.text
