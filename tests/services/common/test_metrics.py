"""Metrics over a real HTTP connection."""

import httpx
import pytest
import torch

from services.common.jobs import PrefillOutcome, PrefillTimings
from services.common.metrics import render, start_metrics_server
from services.decode.metrics import DecodeMetrics
from services.gateway.metrics import GatewayMetrics
from services.prefill.metrics import PrefillMetrics
from tests.services.exposed import samples, value
from winnow.errors import InvalidSetting
from winnow.kv import ModelShape
from winnow.report import PrefillReport

SHAPE = ModelShape(4, 2, 1, 8, 16, torch.float32)


def test_serves_its_own_registry_only() -> None:
    gateway, decode = GatewayMetrics("tiny"), DecodeMetrics("tiny")
    decode.pages_total.set(7)
    server = start_metrics_server(decode.registry, 0)
    text = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
    server.close()
    assert 'winnow_kv_pages{model="tiny",role="decode"} 7.0' in text
    assert "winnow_requests_received" not in text
    assert value(render(gateway.registry).decode(), "winnow_requests_received_total") == 0.0


def test_refuses_a_taken_port() -> None:
    metrics = PrefillMetrics("tiny")
    server = start_metrics_server(metrics.registry, 0)
    with pytest.raises(InvalidSetting, match=f"127.0.0.1:{server.port}"):
        start_metrics_server(metrics.registry, server.port)
    server.close()


@pytest.mark.parametrize("cls", [GatewayMetrics, PrefillMetrics, DecodeMetrics])
def test_what_is_described_is_exposed(cls: type[GatewayMetrics]) -> None:
    metrics = cls("tiny")
    text = render(metrics.registry).decode()
    kinds = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    ours = {name: kind for name, kind in kinds.items() if name.startswith("winnow_")}
    created = {name for name in ours if name.endswith("_created")}
    assert ours.keys() - created == {metric.name for metric in metrics.described}
    assert all(ours[metric.name] == metric.kind for metric in metrics.described)


def test_known_reasons_show_from_the_start() -> None:
    reasons = samples(render(GatewayMetrics("tiny").registry).decode())
    assert reasons["winnow_requests_finished_total"][("reason", "stop"),] == 0.0
    assert reasons["winnow_requests_refused_total"][("reason", "overloaded"),] == 0.0


def test_counts_what_prefill_did() -> None:
    metrics = PrefillMetrics("tiny")
    rho = ((2, 1.0), (3, 0.2))
    entries = (4096, 4096, 4096, 2048)
    report = PrefillReport(4096, 2048, 4096, 3, None, rho, 0.6, 1 << 20, 1 << 18, entries)
    timings = PrefillTimings(0.1, 2.0, 1.9, 0.05, 1000)
    metrics.observe(PrefillOutcome(report, timings), "asl", SHAPE)
    text = render(metrics.registry).decode()
    assert value(text, "winnow_selection_layer_bucket", le="2.0", method="asl") == 0.0
    assert value(text, "winnow_selection_layer_bucket", le="3.0", method="asl") == 1.0
    assert value(text, "winnow_selection_rho_sum", method="asl") == 0.2
    assert value(text, "winnow_wire_bytes_total") == 1000.0
    assert value(text, "winnow_exposed_transfer_seconds_sum") == 0.05
    assert value(text, "winnow_kv_kept_ratio_sum", method="asl") == 0.25
    assert value(text, "winnow_tokens_kept_total", stage="prefill") == 3584.0
    assert value(text, "winnow_tokens_dropped_total", stage="prefill") == 512.0
