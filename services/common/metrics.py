"""The only module that imports prometheus_client: the base class of each process's metrics.

A process creates one subclass of `Metrics` at startup. Each has its own registry, so that several
can live in one process (as in tests). Every sample carries the labels `model` and `role`.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import ClassVar, TypeVar
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
    make_wsgi_app,
)

from winnow import __version__
from winnow.errors import InvalidSetting
from winnow.wire import WIRE_VERSIONS

CONTENT_TYPE = CONTENT_TYPE_LATEST
PREFIX = "winnow_"
COMMON_LABELS = ("model", "role")
_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)

REQUEST_BUCKETS_S = (*(0.001 * 2**i for i in range(22)), 2560.0)  # 1 ms to 43 min
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.5, 5, 10)
COUNT_BUCKETS = tuple(float(4**i) for i in range(12))  # 1 to 4 M tokens
BYTES_BUCKETS = tuple(float(4**i) for i in range(5, 18))  # 1 KiB to 16 GiB
LAYER_BUCKETS = tuple(float(layer) for layer in range(128))
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RATIO_BUCKETS = tuple(i / 20 for i in range(1, 21))


@dataclass(frozen=True, slots=True)
class Described:
    """A metric as Prometheus shows it; `labels` are those besides COMMON_LABELS."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str

    @property
    def unit(self) -> str:
        """Unit of the values, from the end of the name."""
        name = self.name.removesuffix("_total")
        unit = name.rsplit("_", 1)[-1]
        if unit == "ratio":
            return "0 to 1"
        return unit if unit in ("seconds", "bytes", "tokens", "nats") else ""


class _Registry(CollectorRegistry):
    """Adds the same labels to every sample."""

    def __init__(self, labels: dict[str, str]) -> None:
        super().__init__()
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        for family in super().collect():
            family.samples = [
                sample._replace(labels=sample.labels | self._labels) for sample in family.samples
            ]
            yield family


class Metrics:
    """One process's metrics in their own registry; `described` lists them."""

    role: ClassVar[str]

    def __init__(self, model: str) -> None:
        self.registry = _Registry({"model": model, "role": self.role})
        self.described: list[Described] = []
        ProcessCollector(registry=self.registry)
        named = ("winnow_build_info", "1; release, newest wire version")
        labels = self._describe("gauge", *named, "version", "wire_version")
        info = Gauge(*named, labels, registry=self.registry)
        info.labels(__version__, str(max(WIRE_VERSIONS))).set(1)

    # Of a metric with a label every known value is exposed from the start, as 0.

    def _counter(
        self, name: str, meaning: str, label: str = "", values: Iterable[str] = ()
    ) -> Counter:
        labels = self._describe("counter", f"{name}_total", meaning, label)
        return _exposing(values, Counter(name, meaning, labels, registry=self.registry))

    def _gauge(self, name: str, meaning: str, label: str = "", values: Iterable[str] = ()) -> Gauge:
        labels = self._describe("gauge", name, meaning, label)
        return _exposing(values, Gauge(name, meaning, labels, registry=self.registry))

    def _histogram(
        self,
        name: str,
        meaning: str,
        buckets: Sequence[float],
        label: str = "",
        values: Iterable[str] = (),
    ) -> Histogram:
        labels = self._describe("histogram", name, meaning, label)
        made = Histogram(name, meaning, labels, buckets=buckets, registry=self.registry)
        return _exposing(values, made)

    def _describe(self, kind: str, name: str, meaning: str, *labels: str) -> tuple[str, ...]:
        """The labels, without an empty one."""
        assert name.startswith(PREFIX)
        labels = tuple(filter(None, labels))
        self.described.append(Described(name, kind, labels, meaning))
        return labels


class WorkerMetrics(Metrics):
    """What prefill and decode workers both measure."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        stage = ("stage", (self.role,))
        self.tokens_kept = self._counter(
            "winnow_tokens_kept", "Tokens whose KV was kept, averaged over layers and heads", *stage
        )
        self.tokens_dropped = self._counter(
            "winnow_tokens_dropped",
            "Tokens whose KV was dropped, averaged over layers and heads",
            *stage,
        )
        self.transfers_in_flight = self._gauge(
            "winnow_transfers_in_flight", "Transfers begun and not ended"
        )
        self.adapters_loaded = self._gauge(
            "winnow_adapters_loaded", "Adapters in the model's slots, used or not"
        )
        self.device_memory_bytes = self._gauge(
            "winnow_device_memory_bytes",
            "Memory of the GPU that tensors take; 0 on a CPU, see process_resident_memory_bytes",
        )


def _exposing(values: Iterable[str], metric: _Metric) -> _Metric:
    for value in values:
        metric.labels(value)
    return metric


def render(registry: CollectorRegistry) -> bytes:
    """The metrics in Prometheus's text format, of type CONTENT_TYPE."""
    return generate_latest(registry)


@dataclass(frozen=True, slots=True)
class MetricsServer:
    """Serves one registry's /metrics from its own thread."""

    port: int
    _server: WSGIServer
    _thread: threading.Thread

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_metrics_server(
    registry: CollectorRegistry, port: int, host: str = "127.0.0.1", *, share_port: bool = False
) -> MetricsServer:
    """Start a server of /metrics; port 0 picks a free one.  Raises InvalidSetting if it is taken.

    share_port: the port may be shared with another process that allows it too, as when a replica
    is replaced.
    """
    server_class = _SharingServer if share_port else _Server
    app = make_wsgi_app(registry)
    try:
        server = make_server(host, port, app, server_class, handler_class=_SilentHandler)
    except OSError as error:
        raise InvalidSetting(
            f"metrics cannot be served on {host}:{port}: {error.strerror}", param="metrics_port"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="winnow-metrics", daemon=True)
    thread.start()
    return MetricsServer(server.server_port, server, thread)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _SharingServer(_Server):
    allow_reuse_port = True


class _SilentHandler(WSGIRequestHandler):
    timeout = 30  # seconds that a silent client can hold a thread

    def log_message(self, *values: object) -> None:
        """Do not log scrapes."""
