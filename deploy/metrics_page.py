"""Writes docs/metrics.md from the metrics each process defines: `make docs`."""

from services.common.metrics import COMMON_LABELS, Described, Metrics
from services.decode.metrics import DecodeMetrics
from services.gateway.metrics import GatewayMetrics
from services.prefill.metrics import PrefillMetrics

ROLES: tuple[type[Metrics], ...] = (GatewayMetrics, PrefillMetrics, DecodeMetrics)

_INTRODUCTION = f"""\
# Metrics

Made from the code by `make docs`; a test holds it to what the processes expose.

Every process serves `/metrics` on a port of its own (`gateway_metrics_port`,
`prefill_metrics_port`, `metrics_port`; 0 is any free one) and announces it in the registry.
Prometheus finds all of them, wherever Ray placed them, through the gateway's `admin_port`:

```yaml
scrape_configs:
  - job_name: winnow
    http_sd_configs:
      - url: http://gateway:8002/metrics/targets
        refresh_interval: 15s
```

All of Winnow's metrics carry the labels {" and ".join(f"`{label}`" for label in COMMON_LABELS)}
(gateway, prefill or decode); with the configuration above also `worker`, the process. Counters
start at 0 for every known label value. Besides these each process exposes its own memory, CPU time
and open files (`process_*`).
"""


def render_page() -> str:
    """The page as Markdown."""
    sections = [_INTRODUCTION]
    for role in ROLES:
        described = role("").described
        rows = "\n".join(map(_row, described))
        head = "| name | type | labels | unit | meaning |\n|---|---|---|---|---|"
        sections.append(f"## {role.role.capitalize()}\n\n{head}\n{rows}\n")
    return "\n".join(sections)


def _row(metric: Described) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.unit} | {metric.meaning} |"


if __name__ == "__main__":
    import sys

    sys.stdout.write(render_page())
