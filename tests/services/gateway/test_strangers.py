"""What somebody may try who means harm, against a service that runs; see docs/reliability.md."""

import asyncio
import gzip
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from services.common.logs import TextFormatter
from services.gateway.rest.header_limit import MAX_HEADER_BYTES
from tests.deadlines import SOON_S
from tests.services.gateway.service import MODEL_NAME, TestService
from winnow.errors import ModelMismatch, NotFinite, PrefillFailed, WinnowError
from winnow.v1 import inference_pb2 as pb
from winnow.v1.inference_pb2_grpc import InferenceStub
from winnow.wire import MAX_FRAME_BYTES

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETIONS = "/v1/completions"
BODY = {"model": MODEL_NAME, "prompt": [5, 6, 7], "max_tokens": 2}
LINE = re.compile(r"^\d\d:\d\d:\d\d\.\d{3} [A-Z]+ \S+ ")


async def assert_serves(service: TestService) -> None:
    assert (await service.http.post(COMPLETIONS, json=BODY)).status_code == 200
    await service.until_idle()


@pytest.mark.parametrize(
    "headers",
    [{"x-a": "a" * MAX_HEADER_BYTES}, {f"x-{i}": "a" * 100 for i in range(400)}],
    ids=["one", "many"],
)
@pytest.mark.parametrize("path", [COMPLETIONS, "/health", "/nope"])
async def test_headers_over_the_limit_are_refused(
    service: TestService, headers: dict[str, str], path: str
) -> None:
    refused = await service.http.post(path, json=BODY, headers=headers)
    assert refused.status_code == 431
    error = refused.json()["error"]
    assert error["code"] == "headers_too_large"
    assert re.search(r"headers have [34]\d,\d{3} bytes; the limit is 32,768", error["message"])
    await assert_serves(service)


async def test_a_request_line_over_the_limit_is_refused(service: TestService) -> None:
    refused = await service.http.get("/health?" + "a" * MAX_HEADER_BYTES)
    assert refused.status_code == 431


INSIDE = "worker-7 at 10.0.0.7:7001: ValueError('boom')"


@pytest.mark.parametrize("cls", [PrefillFailed, ModelMismatch, NotFinite, WinnowError, ValueError])
@pytest.mark.parametrize("way", ["whole", "stream", "grpc"])
async def test_a_failure_inside_is_told_by_its_kind_alone(
    service: TestService, caplog: pytest.LogCaptureFixture, cls: type[Exception], way: str
) -> None:
    service.prefiller.failures = [cls(INSIDE) for _ in range(service.settings.prefill_attempts)]
    with caplog.at_level(logging.INFO):
        told = await failed_over_grpc(service) if way == "grpc" else await failed(service, way)
    service.prefiller.failures = []
    assert getattr(cls, "code", "internal_error") in told
    assert "10.0.0.7" not in told and "boom" not in told and "worker-7" not in told
    assert INSIDE in "\n".join(map(TextFormatter().format, caplog.records))
    await assert_serves(service)


async def failed(service: TestService, way: str) -> str:
    """A stream has been admitted by then, so that it tells as its last event."""
    response = await service.http.post(COMPLETIONS, json=BODY | {"stream": way == "stream"})
    assert response.status_code == 200 if way == "stream" else response.status_code >= 500
    return response.text + str(response.headers)


async def failed_over_grpc(service: TestService) -> str:
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        request = pb.CompleteRequest(model=MODEL_NAME, text="a", max_tokens=2)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            [_ async for _ in InferenceStub(channel).Complete(request)]
    return f"{refused.value.details()} {refused.value.trailing_metadata()}"


async def test_headers_below_the_limit_are_taken(service: TestService) -> None:
    headers = {"x-a": "a" * (MAX_HEADER_BYTES - 1000)}
    assert (await service.http.post(COMPLETIONS, json=BODY, headers=headers)).status_code == 200


async def test_metadata_over_the_limit_is_refused(service: TestService) -> None:
    metadata = (("x-a", "a" * (64 << 10)),)
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        call = InferenceStub(channel).Complete(
            pb.CompleteRequest(model=MODEL_NAME, text="a"), metadata=metadata, timeout=30
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await assert_serves(service)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, gzip"])
async def test_a_compressed_body_is_not_unpacked(service: TestService, encoding: str) -> None:
    bomb = gzip.compress(json.dumps(BODY | {"prompt": "a" * (64 << 20)}).encode())
    assert len(bomb) < 100_000
    refused = await service.http.post(
        COMPLETIONS,
        content=bomb,
        headers={"content-type": "application/json", "content-encoding": encoding},
    )
    assert refused.status_code == 415
    assert refused.json()["error"]["code"] == "body_encoded"
    await assert_serves(service)


async def _unpacked_by(address: str, method: str, num_bytes: int) -> grpc.aio.AioRpcError:
    """What comes of a message that is `num_bytes` long, and 1,000 times shorter on the wire."""
    options = [("grpc.max_send_message_length", -1)]
    compression = grpc.Compression.Gzip
    async with grpc.aio.insecure_channel(address, options, compression) as channel:
        call = channel.stream_stream(method)()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async with asyncio.timeout(60):
                await call.write(bytes(num_bytes))
                await call.read()
    return refused.value


async def test_a_compressed_message_is_unpacked_up_to_the_limit_alone(
    service: TestService,
) -> None:
    worker = service.workers[0]
    for address, method, limit in (
        (service.grpc_address, "/winnow.v1.Inference/Complete", service.settings.max_body_bytes),
        (worker.address, "/winnow.v1.Decode/Generate", MAX_FRAME_BYTES),
        (worker.kv_address, "/winnow.v1.KvTransfer/Push", MAX_FRAME_BYTES),
    ):
        refused = await _unpacked_by(address, method, 8 * limit)
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, method
        assert "larger than max" in (refused.details() or ""), method
    await assert_serves(service)


@pytest.mark.parametrize("length", [b"1000000000000000000", b"9" * 30])
async def test_a_body_announced_longer_than_memory_is_refused(
    service: TestService, length: bytes
) -> None:
    host, _, port = service.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: " + length)
    writer.write(b"\r\ncontent-type: application/json\r\n\r\n{")
    async with asyncio.timeout(SOON_S):
        assert re.match(rb"HTTP/1.1 4(00|13) ", await reader.readline())
    writer.close()
    await assert_serves(service)


@pytest.mark.parametrize(
    "message",
    [b"\x0a\xff\xff\xff\xff\x07", b"\x12\xff\xff\xff\xff\x0f", b"\x0b" * 100_000],
    ids=["text of 2 GiB", "text of 4 GiB", "groups within groups"],
)
async def test_a_message_that_lies_about_its_lengths_is_refused(
    service: TestService, message: bytes
) -> None:
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        call = channel.unary_stream("/winnow.v1.Inference/Complete")(message, timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == f"{len(message):,} bytes are no CompleteRequest"
    await assert_serves(service)


def paths(folder: Path) -> Iterator[str]:
    """Names that lead to files, the served model's own folder among them."""
    yield from ("../../../../etc/passwd", "/etc/passwd", "..", ".", "~", "file:///etc/passwd")
    yield from (str(folder), f"../{folder.name}", f"{MODEL_NAME}/../{MODEL_NAME}")
    yield from (f"{MODEL_NAME}:../../adapter", f"./{MODEL_NAME}", f"{MODEL_NAME}\0", "a" * 5000)


async def test_a_model_name_is_no_path(service: TestService, model_path: Path) -> None:
    for name in paths(model_path):
        for path in (COMPLETIONS, "/tokenize"):
            body = {"model": name, "prompt": "a"}
            refused = await service.http.post(path, json=body)
            assert refused.status_code == 404, name
            assert refused.json()["error"]["code"] == "model_not_found"
            assert "root:" not in refused.text
        async with grpc.aio.insecure_channel(service.grpc_address) as channel:
            call = InferenceStub(channel).Complete(pb.CompleteRequest(model=name, text="a"))
            with pytest.raises(grpc.aio.AioRpcError) as missing:
                await call.read()
            assert missing.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "target",
    ["/v1/models/../../etc/passwd", "/v1/models/%2e%2e/%2e%2e/etc/passwd", "/v1/models//etc"],
)
async def test_a_url_is_no_path(service: TestService, target: str) -> None:
    host, _, port = service.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {target} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode())
    async with asyncio.timeout(SOON_S):
        answer = await reader.read()
    assert b" 404 " in answer.splitlines()[0]
    assert b"root:" not in answer
    writer.close()


async def test_pages_of_others_get_no_leave(service: TestService) -> None:
    origin = {"origin": "https://elsewhere.example"}
    preflight = {"access-control-request-method": "POST"}
    answers = [
        await service.http.options(COMPLETIONS, headers=origin | preflight),
        await service.http.post(COMPLETIONS, json=BODY, headers=origin),
    ]
    assert [answer.status_code for answer in answers] == [204, 200]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the service would write to its standard error, at the finest level."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(TextFormatter())
    loggers = [logging.getLogger(name) for name in ("services", "winnow")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield text
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


async def test_nothing_that_is_sent_begins_a_log_line(
    service: TestService, log: io.StringIO
) -> None:
    forged = "a\n12:00:00.000 INFO services.gateway.request.outcomes finished: forged\r\x1b[2K"
    for body in (BODY | {"model": forged}, BODY | {forged: 1}, BODY | {"user": forged}):
        await service.http.post(COMPLETIONS, json=body)
    await service.http.post("/v1/%0a12:00:00.000%20INFO%20forged", json=BODY)
    await service.http.get("/v1/models/%0d%0a12:00:00.000%20INFO%20forged")
    await service.http.post(COMPLETIONS, json=BODY, headers={"x-request-id": "a\\n12:00 forged"})
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        request = pb.CompleteRequest(model=forged, text="a")
        with pytest.raises(grpc.aio.AioRpcError):
            await InferenceStub(channel).Complete(request).read()
    lines = log.getvalue().split("\n")
    assert lines.pop() == ""
    assert len(lines) >= 3
    for line in lines:
        assert LINE.match(line), line
        assert not line.startswith("12:00:00.000")
        assert line.isprintable()


@pytest.mark.parametrize(
    ("method", "path", "status", "name"),
    [
        ("POST", "/v1/messages", 400, "invalid_value"),
        ("POST", COMPLETIONS, 400, "invalid_value"),
        ("GET", "/v1/messages", 405, "method_not_allowed"),
        ("GET", "/v1/messages/batches", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
    ],
)
async def test_a_refused_request_is_found_in_the_log_by_its_id(
    service: TestService, log: io.StringIO, method: str, path: str, status: int, name: str
) -> None:
    refused = await service.http.request(method, path, json={"model": 1})
    assert refused.status_code == status
    (request_id,) = refused.headers.get_list("x-request-id")
    assert refused.headers["request-id"] == request_id
    (line,) = [one for one in log.getvalue().splitlines() if f"[{request_id}] refused" in one]
    assert path in line and name in line
    if path.startswith("/v1/messages"):
        assert refused.json()["request_id"] == request_id


async def test_a_request_s_id_is_the_service_s_own(service: TestService) -> None:
    """Nobody can name another one's request: ids are drawn, and none is taken from a client."""
    first = await service.http.post(COMPLETIONS, json=BODY)
    theirs = first.json()["id"]
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", theirs)
    again = await service.http.post(COMPLETIONS, json=BODY, headers={"x-request-id": theirs})
    assert again.status_code == 200
    assert theirs not in (again.json()["id"], again.headers["x-request-id"])
    for name in ("id", "request_id"):
        refused = await service.http.post(COMPLETIONS, json=BODY | {name: theirs})
        assert refused.json()["error"]["code"] == "unknown_parameter"
    for method in ("GET", "DELETE", "POST"):
        asked = await service.http.request(method, f"{COMPLETIONS}/{theirs}")
        assert asked.status_code == 404
