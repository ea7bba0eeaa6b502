"""One trace per request, over every process it went through, as a collector receives it."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.deadlines import SOON_S
from tests.e2e.winnow_process import FREE_PORTS, WinnowServe
from winnow.v1 import inference_pb2 as pb
from winnow.v1.inference_pb2_grpc import InferenceStub

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PROMPT = "the quick brown fox jumps over the lazy dog " * 20
NAMES = {
    "completion",
    "admission",
    "decode",
    "prefill",
    "prefill.queue",
    "prefill.compute",
    "kv.transfer",
    "kv.receive",
}
PARENTS = {
    "admission": "completion",
    "decode": "completion",
    "prefill": "completion",
    "prefill.queue": "prefill",
    "prefill.compute": "prefill",
    "kv.transfer": "prefill",
    "kv.receive": "kv.transfer",
}


class Collector:
    """Takes OTLP over HTTP and keeps spans by trace, each with its service's name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._traces: dict[str, list[tuple[str, Span]]] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.take(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            service = attributes["service.name"]
            with self._lock:
                for span in [span for scope in resource.scope_spans for span in scope.spans]:
                    spans = self._traces.setdefault(span.trace_id.hex(), [])
                    spans.append((service, span))

    def trace(
        self, trace_id: str, num_spans: int, names: frozenset[str] = frozenset()
    ) -> list[tuple[str, Span]]:
        """Waits until so many spans of a trace have come, and those of such names."""
        deadline_s = time.monotonic() + SOON_S
        while True:
            with self._lock:
                spans = list(self._traces.get(trace_id, ()))
            if len(spans) >= num_spans and names <= {span.name for _, span in spans}:
                return spans
            assert time.monotonic() < deadline_s, [span.name for _, span in spans]
            time.sleep(0.1)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


@pytest.fixture(scope="module")
def service(
    collector: Collector, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WinnowServe]:
    arguments = ["--model", str(tiny_models["qwen2"]), *FREE_PORTS]
    pruning = ["--pruning", "select_tokens=128", "--pruning", "kv_budget=64"]
    traced = ["--otlp-endpoint", collector.url, "--kv-memory-bytes", "64MiB"]
    service = WinnowServe(tmp_path_factory.mktemp("serve"), [*arguments, *pruning, *traced])
    yield service
    service.kill()


@pytest.fixture(scope="module")
def ready(service: WinnowServe) -> tuple[str, str]:
    """HTTP URL and gRPC address."""
    return service.wait_until_ready(), service.grpc_address()


def parents(spans: list[tuple[str, Span]]) -> dict[str, str | None]:
    names = {span.span_id: span.name for _, span in spans}
    return {span.name: names.get(span.parent_span_id) for _, span in spans}


def test_a_request_is_one_trace_over_all_processes(
    ready: tuple[str, str], collector: Collector
) -> None:
    trace_id, client_span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{client_span}-01"}
    body = {"model": "qwen2", "prompt": PROMPT, "max_tokens": 5}
    answer = httpx.post(f"{ready[0]}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.is_success
    spans = collector.trace(trace_id, len(NAMES))
    assert {span.name for _, span in spans} == NAMES
    assert parents(spans) == PARENTS | {"completion": None}
    (root,) = [span for _, span in spans if span.name == "completion"]
    assert root.parent_span_id.hex() == client_span
    services = {span.name: service for service, span in spans}
    assert services["completion"] == "winnow-gateway"
    assert services["prefill.compute"] == services["kv.transfer"] == "winnow-prefill"
    assert services["decode"] == services["kv.receive"] == "winnow-decode"
    for _, span in spans:
        assert span.start_time_unix_nano < span.end_time_unix_nano
        assert span.status.code == Status.STATUS_CODE_UNSET


def test_layers_are_events(ready: tuple[str, str], collector: Collector) -> None:
    trace_id = "1" * 32
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    body = {"model": "qwen2", "prompt": PROMPT, "max_tokens": 2}
    httpx.post(f"{ready[0]}/v1/completions", json=body, headers=headers, timeout=60)
    spans = {span.name: span for _, span in collector.trace(trace_id, len(NAMES))}
    layers = [event.attributes[0].value.int_value for event in spans["prefill.compute"].events]
    assert layers == list(range(len(layers)))
    assert [event.name for event in spans["decode"].events] == ["admitted", "KV in place"]


def test_grpc_carries_the_trace_too(ready: tuple[str, str], collector: Collector) -> None:
    trace_id = "2" * 32
    metadata = (("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"),)
    request = pb.CompleteRequest(model="qwen2", text=PROMPT, max_tokens=2)
    with grpc.insecure_channel(ready[1]) as channel:
        list(InferenceStub(channel).Complete(request, metadata=metadata, timeout=60))
    assert parents(collector.trace(trace_id, len(NAMES))) == PARENTS | {"completion": None}


def test_an_error_is_in_its_span(ready: tuple[str, str], collector: Collector) -> None:
    trace_id = "3" * 32
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    body = {"model": "qwen2", "prompt": [PROMPT] * 16, "n": 8, "max_tokens": 4000}
    answer = httpx.post(f"{ready[0]}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 429, answer.text  # more than the pool holds
    names = frozenset({"completion", "admission"})
    spans = collector.trace(trace_id, 2, names)
    failed = [span for _, span in spans if span.status.code == Status.STATUS_CODE_ERROR]
    assert names <= {span.name for span in failed}
    assert all(PROMPT[:20] not in str(span) for _, span in spans)


def test_untraced_requests_send_nothing(ready: tuple[str, str], collector: Collector) -> None:
    trace_id = "4" * 32
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-00"}  # not sampled
    body = {"model": "qwen2", "prompt": PROMPT, "max_tokens": 2}
    assert httpx.post(
        f"{ready[0]}/v1/completions", json=body, headers=headers, timeout=60
    ).is_success
    test_layers_are_events(ready, collector)  # whatever was to come has come by then
    assert trace_id not in collector._traces
