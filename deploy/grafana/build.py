"""Writes the Grafana dashboards next to this file, from `panels`: `make docs`."""

import json
from pathlib import Path
from typing import Any

from deploy.grafana.panels import DASHBOARDS, Dashboard, Panel

FOLDER = Path(__file__).parent / "dashboards"
PICKED = 'model=~"$model",instance=~"$worker"'
WIDTH, HEIGHT, COLUMNS = 8, 8, 24

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


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
