"""Writes the Grafana dashboards next to this file: `make docs`.

Grafana's JSON is generated from panels: a title, a sentence, a unit and queries. In a query `@`
stands for the label filters of the dashboard's variables; `rate` covers $__rate_interval.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
PICKED = 'model=~"$model",instance=~"$worker"'
SECONDS, BYTES, SHARE, COUNT, RATE = "s", "bytes", "percentunit", "short", "cps"
TOKENS, TOKEN_RATE, BYTE_RATE = "short", "suffix: tokens/s", "Bps"
WIDTH, HEIGHT, COLUMNS = 8, 8, 24

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """One panel: `queries` by legend; values turn orange and red at `limits`, red below `floor`."""

    title: str
    meaning: str
    unit: str
    queries: dict[str, str]
    kind: str = "timeseries"
    limits: tuple[float, float] | None = None
    floor: float | None = None
    stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    rows: dict[str, list[Panel]] = field(default_factory=dict)


def quantiles(metric: str, by: str = "") -> dict[str, str]:
    """Median, 90th and 99th percentiles of a histogram, for each value of the label `by`."""
    prefix, group = (f"{{{{{by}}}}} ", f"le,{by}") if by else ("", "le")
    return {
        f"{prefix}p{100 * q:.0f}": f"histogram_quantile({q}, "
        f"sum by ({group}) (rate({metric}_bucket{{@}}[$__rate_interval])))"
        for q in (0.5, 0.9, 0.99)
    }


def rate(metric: str, by: str = "") -> str:
    """Increase per second, for each value of the label `by`."""
    return f"sum by ({by}) (rate({metric}{{@}}[$__rate_interval]))"


def mean(metric: str, by: str = "") -> str:
    """Mean of a histogram's observations."""
    return f"{rate(metric + '_sum', by)} / {rate(metric + '_count', by)}"


def agreed(checked: str) -> str:
    """Of what was checked in six hours the share that agreed, for each task."""
    increase = "sum by (task) (increase(winnow_quality_{}{{@}}[6h]))"
    return f"{increase.format(f'{checked}_agreed_total')} / {increase.format(f'{checked}_total')}"


SERVICE = Dashboard(
    "winnow-service",
    "Winnow: service",
    {
        "Now": [
            Panel(
                "Requests",
                "Prompts ended per second",
                RATE,
                {"": rate("winnow_requests_finished_total")},
                "stat",
            ),
            Panel(
                "Running",
                "Prompts accepted and not ended",
                COUNT,
                {"": "sum(winnow_requests_running{@})"},
                "stat",
            ),
            Panel(
                "Decode workers",
                "Live decode workers that requests can be routed to",
                COUNT,
                {"": "max(winnow_decode_workers{@})"},
                "stat",
                floor=1,
            ),
        ],
        "Traffic": [
            Panel(
                "Ended, by reason",
                "How prompts ended",
                RATE,
                {"{{reason}}": rate("winnow_requests_finished_total", "reason")},
                stacked=True,
            ),
            Panel(
                "Refused, by reason",
                "Errors instead of tokens, by code",
                RATE,
                {"{{reason}}": rate("winnow_requests_refused_total", "reason")},
                limits=(0.1, 1),
                stacked=True,
            ),
            Panel(
                "Tokens",
                "Tokens per second",
                TOKEN_RATE,
                {
                    "prompt": rate("winnow_prompt_tokens_total"),
                    "generated": rate("winnow_generated_tokens_total"),
                },
            ),
        ],
        "Latency": [
            Panel(
                "Time to first token",
                "From a prompt's arrival to its first token",
                SECONDS,
                quantiles("winnow_ttft_seconds"),
                limits=(2.048, 4.096),
            ),
            Panel(
                "Between tokens",
                "Between two tokens of one sequence",
                SECONDS,
                quantiles("winnow_inter_token_seconds"),
                limits=(0.16, 0.32),
            ),
            Panel(
                "Time per output token",
                "After the first, averaged over a prompt",
                SECONDS,
                quantiles("winnow_time_per_output_token_seconds"),
            ),
            Panel(
                "End to end",
                "From a prompt's arrival to its end",
                SECONDS,
                quantiles("winnow_request_seconds"),
            ),
        ],
        "Queue and saturation": [
            Panel(
                "Waiting",
                "Prompts without their KV in place, by what they wait for",
                COUNT,
                {"{{reason}}": "sum by (reason) (winnow_requests_waiting{@})"},
                limits=(8, 64),
                stacked=True,
            ),
            Panel(
                "Time in queue",
                "99th percentiles of the two waits",
                SECONDS,
                {
                    "for KV memory": quantiles("winnow_admission_seconds")["p99"],
                    "for the prefill engine": quantiles("winnow_prefill_queue_seconds")["p99"],
                },
            ),
            Panel(
                "Prompt tokens waiting for prefill",
                "What is ahead of a new prompt",
                TOKENS,
                {"": "sum(winnow_prefill_waiting_tokens{@})"},
            ),
            Panel(
                "KV pool promised",
                "To admitted requests, of all that can be promised now",
                SHARE,
                {
                    "": "sum(winnow_kv_pages_reserved{@}) / "
                    "(sum(winnow_kv_pages_reserved{@}) + sum(winnow_kv_pages_free{@}))"
                },
                limits=(0.8, 0.95),
            ),
            Panel(
                "Gave way for want of KV memory",
                "Sequences shrunk to decode_floor, swapped out to host memory, or given up",
                RATE,
                {"{{how}}": rate("winnow_kv_relief_total", "how")},
                limits=(0.1, 1),
                stacked=True,
            ),
            Panel(
                "Waiting in host memory",
                "KV of sequences that were swapped out",
                BYTES,
                {"": "sum(winnow_kv_swapped_bytes{@})"},
            ),
            Panel(
                "Prefills tried again",
                "After a failure that another worker may not have",
                RATE,
                {"": rate("winnow_prefill_retries_total")},
            ),
            Panel(
                "Computed anew at another decode worker",
                "Prompts whose decode worker was lost, by what befell it",
                RATE,
                {"{{reason}}": rate("winnow_migrations_total", "reason")},
                limits=(0.01, 0.1),
                stacked=True,
            ),
            Panel(
                "Moved to another decode worker",
                "Sequences that went on elsewhere with their KV, because their worker drained",
                RATE,
                {"{{direction}}": rate("winnow_sequences_moved_total", "direction")},
            ),
            Panel(
                "Prompt lengths",
                "Tokens per prompt",
                TOKENS,
                quantiles("winnow_request_prompt_tokens"),
            ),
        ],
    },
)

KV = Dashboard(
    "winnow-kv",
    "Winnow: KV and pruning",
    {
        "Memory": [
            Panel(
                "KV held",
                "Keys and values that decode holds, and what the same sequences "
                "would take unpruned",
                BYTES,
                {
                    "held": "sum(winnow_kv_resident_bytes{@})",
                    "unpruned": "sum(winnow_kv_unpruned_bytes{@})",
                },
            ),
            Panel(
                "Sent, of all KV",
                "Prompts' keys and values that prefill sent",
                SHARE,
                {"{{method}}": mean("winnow_kv_kept_ratio", "method")},
            ),
            Panel(
                "KV pool in use, by worker",
                "Pages with entries, of all",
                SHARE,
                {"{{instance}}": "sum by (instance) (winnow_kv_used_ratio{@})"},
                limits=(0.8, 0.95),
            ),
            Panel(
                "KV held, by worker",
                "Keys and values",
                BYTES,
                {"{{instance}}": "sum by (instance) (winnow_kv_resident_bytes{@})"},
            ),
        ],
        "Selection": [
            Panel(
                "Selection layer",
                "After which only selected tokens went on",
                COUNT,
                {
                    "{{le}}": "sum by (le) (increase("
                    "winnow_selection_layer_bucket{@}[$__rate_interval]))"
                },
                "heatmap",
            ),
            Panel(
                "Layer-tokens computed",
                "Of all, by method",
                SHARE,
                {"{{method}}": mean("winnow_computed_ratio", "method")},
            ),
            Panel(
                "Rank variance at selection",
                "ρ at the layer that ASL chose",
                COUNT,
                quantiles("winnow_selection_rho"),
            ),
            Panel(
                "Not selected, by reason",
                "Prompts that all their tokens went through",
                RATE,
                {"{{reason}}": rate("winnow_no_selection_total", "reason")},
                stacked=True,
            ),
            Panel(
                "Tokens kept and dropped",
                "Of which KV was kept or dropped",
                TOKEN_RATE,
                {
                    "kept in {{stage}}": rate("winnow_tokens_kept_total", "stage"),
                    "dropped in {{stage}}": rate("winnow_tokens_dropped_total", "stage"),
                },
            ),
            Panel(
                "Recompressions",
                "Sequences cut back to their decode_budget",
                RATE,
                {"{{instance}}": rate("winnow_recompressions_total", "instance")},
            ),
        ],
        "Quality in use": [
            Panel(
                "First tokens as unpruned",
                "Of checked answers in six hours those whose likeliest first token is the unpruned "
                "model's, by task; nothing without quality_sample",
                SHARE,
                {"{{task}}": agreed("first_tokens")},
            ),
            Panel(
                "Tokens as unpruned",
                "Of checked greedy answers in six hours: tokens that the unpruned model gives as "
                "well, mean over answers",
                SHARE,
                {
                    "{{task}}": "sum by (task) (increase("
                    "winnow_quality_tokens_agreed_ratio_sum{@}[6h])) / sum by (task) "
                    "(increase(winnow_quality_tokens_agreed_ratio_count{@}[6h]))"
                },
            ),
            Panel(
                "Answers as unpruned",
                "Of checked greedy answers in six hours those that are the unpruned model's, token "
                "for token",
                SHARE,
                {"{{task}}": agreed("answers")},
            ),
            Panel(
                "Divergence of the first token",
                "KL divergence, unpruned from pruned, in nats, at least; over six hours",
                COUNT,
                {
                    f"{{{{task}}}} p{100 * q:.0f}": f"histogram_quantile({q}, sum by (le, task) "
                    "(increase(winnow_quality_first_kl_nats_bucket{@}[6h])))"
                    for q in (0.5, 0.9)
                },
            ),
            Panel(
                "Checks",
                "Sampled answers, by what became of the check",
                RATE,
                {"{{outcome}}": rate("winnow_quality_checks_total", "outcome")},
                stacked=True,
            ),
        ],
        "Transfer": [
            Panel(
                "Throughput",
                "Bytes of all frames",
                BYTE_RATE,
                {"{{instance}}": rate("winnow_wire_bytes_total", "instance")},
            ),
            Panel(
                "Transfer time",
                "First frame to receipt",
                SECONDS,
                quantiles("winnow_transfer_seconds", "instance"),
            ),
            Panel(
                "Exposed transfer time",
                "What compute did not hide",
                SECONDS,
                quantiles("winnow_exposed_transfer_seconds", "instance"),
                limits=(0.5, 2),
            ),
            Panel(
                "In flight",
                "Transfers begun and not ended",
                COUNT,
                {
                    "{{role}} {{instance}}": (
                        "sum by (role, instance) (winnow_transfers_in_flight{@})"
                    )
                },
            ),
            Panel(
                "Failed, by reason",
                "Transfers refused or broken",
                RATE,
                {"{{reason}}": rate("winnow_transfers_failed_total", "reason")},
                limits=(0.01, 0.1),
                stacked=True,
            ),
            Panel(
                "Leases expired",
                "Reservations whose KV did not come in time",
                RATE,
                {"": rate("winnow_lease_expiries_total")},
                limits=(0.01, 0.1),
            ),
        ],
    },
)

WORKERS = Dashboard(
    "winnow-workers",
    "Winnow: workers",
    {
        "Processes": [
            Panel("Alive", "1 where a process answers", COUNT,
                  {"{{role}} {{instance}}": "sum by (role, instance) (winnow_build_info{@})"}),
            Panel("CPU", "Cores in use", COUNT,
                  {"{{role}} {{instance}}": rate("process_cpu_seconds_total", "role, instance")}),
            Panel("Memory", "Resident", BYTES,
                  {"{{role}} {{instance}}":
                   "sum by (role, instance) (process_resident_memory_bytes{@})"}),
            Panel("GPU memory", "Of tensors; 0 on a CPU", BYTES,
                  {"{{role}} {{instance}}":
                   "sum by (role, instance) (winnow_device_memory_bytes{@})"}),
        ],
        "Prefill": [
            Panel("Waiting and open", "Prompts waiting to begin; begun and not ended", COUNT,
                  {"waiting {{instance}}": "sum by (instance) (winnow_prefill_waiting{@})",
                   "open {{instance}}": "sum by (instance) (winnow_prefill_open{@})"}),
            Panel("Oldest prompt", "Time since it came; it is not computed yet", SECONDS,
                  {"{{instance}}": "max by (instance) (winnow_prefill_oldest_seconds{@})"}),
            Panel("Compute", "Forward passes of one prompt", SECONDS,
                  quantiles("winnow_prefill_compute_seconds", "instance")),
            Panel("Layer", "One layer of one prompt", SECONDS,
                  quantiles("winnow_prefill_layer_seconds", "instance")),
            Panel("Failures, by reason", "Prefills begun and not delivered", RATE,
                  {"{{reason}}": rate("winnow_prefill_failures_total", "reason")}, stacked=True),
        ],
        "Decode": [
            Panel("Step", "One step of the whole batch", SECONDS,
                  quantiles("winnow_decode_step_seconds", "instance")),
            Panel("Batch", "Sequences per step", COUNT,
                  {"{{instance}}": mean("winnow_decode_batch_size", "instance")}),
            Panel("Running and waiting", "Sequences in the batch; requests whose KV is not in "
                  "place", COUNT,
                  {"running {{instance}}":
                   "sum by (instance) (winnow_decode_running_sequences{@})",
                   "waiting {{instance}}":
                   "sum by (instance) (winnow_decode_waiting_requests{@})"}),
            Panel("Pages in use", "Pages with entries, of all", SHARE,
                  {"{{instance}}": "sum by (instance) (winnow_kv_pages_used{@}) "
                   "/ sum by (instance) (winnow_kv_pages{@})"}, limits=(0.8, 0.95)),
            Panel("KV received", "Payload from prefill", BYTE_RATE,
                  {"{{instance}}": rate("winnow_transfer_received_bytes_total", "instance")}),
            Panel("Draining", "1 while a worker admits nothing more", COUNT,
                  {"{{instance}}": "sum by (instance) (winnow_draining{@})"}),
        ],
    },
)  # fmt: skip

DASHBOARDS = (SERVICE, KV, WORKERS)


def to_json(dashboard: Dashboard) -> str:
    """The dashboard as Grafana provisions it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in dashboard.rows.items():
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place})
        top += 1
        per_line = COLUMNS // WIDTH
        for idx, panel in enumerate(row):
            x, y = idx % per_line * WIDTH, top + idx // per_line * HEIGHT
            panels.append(_panel(panel, len(panels) + 1, {"x": x, "y": y, "w": WIDTH, "h": HEIGHT}))
        top += -(-len(row) // per_line) * HEIGHT
    return (
        json.dumps(
            {
                "uid": dashboard.uid,
                "title": dashboard.title,
                "tags": ["winnow"],
                "schemaVersion": 39,
                "editable": True,
                "refresh": "10s",
                "time": {"from": "now-30m", "to": "now"},
                "links": [_link()],
                "templating": {"list": _variables()},
                "panels": panels,
            },
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )


def _panel(panel: Panel, panel_id: int, place: dict[str, int]) -> dict[str, Any]:
    is_heatmap = panel.kind == "heatmap"
    targets = [
        {
            "refId": chr(ord("A") + idx),
            "datasource": _DATASOURCE,
            "expr": query.replace("@", PICKED),
            "legendFormat": legend or panel.title,
            "format": "heatmap" if is_heatmap else "time_series",
        }
        for idx, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "id": panel_id,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.meaning,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": {"calculate": False, "yAxis": {"unit": "short"}} if is_heatmap else {},
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.floor is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.floor}]
    if panel.limits is not None:
        colors = zip(("orange", "red"), panel.limits, strict=True)
        steps += [{"color": color, "value": value} for color, value in colors]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "fillOpacity": 20 if panel.stacked else 5,
            "stacking": {"mode": "normal" if panel.stacked else "none"},
            "thresholdsStyle": {"mode": "line" if panel.limits else "off"},
        }
    return defaults


def _variables() -> list[dict[str, Any]]:
    labels = {
        "model": "label_values(winnow_build_info, model)",
        "worker": 'label_values(winnow_build_info{model=~"$model"}, instance)',
    }
    return [{"name": "datasource", "type": "datasource", "query": "prometheus"}] + [
        {
            "name": name,
            "label": name.capitalize(),
            "type": "query",
            "datasource": _DATASOURCE,
            "query": {"query": query, "refId": name},
            "definition": query,
            "refresh": 2,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        }
        for name, query in labels.items()
    ]


def _link() -> dict[str, Any]:
    return {
        "type": "dashboards",
        "tags": ["winnow"],
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
        "title": "Winnow",
    }


if __name__ == "__main__":
    for made in DASHBOARDS:
        (FOLDER / f"{made.uid}.json").write_text(to_json(made))
