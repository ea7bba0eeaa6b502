"""Metrics over a real HTTP connection."""

import httpx
import pytest

from services.common.metrics import (
    DecodeMetrics,
    GatewayMetrics,
    PrefillMetrics,
    render,
    start_metrics_server,
)
from winnow.errors import InvalidSetting
from winnow.request import PrefillOutcome, PrefillReport, PrefillTimings


def test_serves_its_own_registry_only() -> None:
    gateway, decode = GatewayMetrics(), DecodeMetrics()
    decode.pages_total.set(7)
    server = start_metrics_server(decode.registry, 0)
    text = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
    server.close()
    assert "winnow_kv_pages 7.0" in text
    assert "winnow_requests_received" not in text
    assert b"winnow_requests_received_total 0.0" in render(gateway.registry)


def test_refuses_a_taken_port() -> None:
    metrics = PrefillMetrics()
    server = start_metrics_server(metrics.registry, 0)
    with pytest.raises(InvalidSetting, match=f"127.0.0.1:{server.port}"):
        start_metrics_server(metrics.registry, server.port)
    server.close()


def test_known_reasons_show_from_the_start() -> None:
    assert b'winnow_requests_finished_total{reason="stop"} 0.0' in render(GatewayMetrics().registry)


def test_counts_what_prefill_did() -> None:
    metrics = PrefillMetrics()
    rho = ((2, 1.0), (3, 0.2))
    report = PrefillReport(4096, 2048, 4096, 3, None, rho, 0.6, 1 << 20, 1 << 18, (1,))
    metrics.observe(PrefillOutcome(report, PrefillTimings(0.1, 2.0, 1.9, 0.05, 1000)))
    text = render(metrics.registry).decode()
    assert 'winnow_selection_layer_bucket{le="2.0"} 0.0' in text
    assert 'winnow_selection_layer_bucket{le="3.0"} 1.0' in text
    assert "winnow_wire_bytes_total 1000.0" in text
    assert "winnow_exposed_transfer_seconds_sum 0.05" in text
