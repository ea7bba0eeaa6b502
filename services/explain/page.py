"""Renders an explanation as a self-contained HTML page without external resources."""

import json
import math
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from winnow.explain import Explanation

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 220, 44, 28  # chart sizes in SVG units
_NUM_LEVELS = 10


@dataclass(frozen=True, slots=True)
class Bar:
    """A layer's KV entries, `kept` of `full` over all KV heads, and its bar in the chart."""

    layer_idx: int
    kept: int
    full: int
    kept_bytes: int
    x: float
    width: float
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Point:
    """ρ at a layer, and its point in the chart."""

    layer_idx: int
    rho: float
    x: float
    y: float


def render(explanation: Explanation, model: str) -> str:
    """The page as HTML."""
    loader = PackageLoader("services.explain", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["mib"] = lambda size: f"{size / 2**20:.2f}"
    environment.filters["percent"] = lambda share: f"{share:.0%}"
    page = environment.get_template("page.html")
    report = explanation.report
    return page.render(
        e=explanation,
        report=report,
        settings=explanation.settings,
        model=model,
        answer=_readable(explanation.answer.text),
        full_answer=_readable(explanation.full_answer.text),
        why_not=_why_not(explanation),
        num_dropped=sum(last < max(explanation.last_layers) for last in explanation.last_layers),
        bars=_bars(explanation),
        points=_points(explanation),
        threshold_y=_rho_y(explanation.settings.threshold, _rho_top(explanation)),
        chart={"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "bottom": _BOTTOM},
        rho_top=_rho_top(explanation),
        data=_data(explanation),
    )


def _readable(text: str) -> str:
    """Text with NUL, which HTML drops, replaced by the replacement character."""
    return text.replace("\0", "\ufffd")


def _why_not(explanation: Explanation) -> str:
    """Why no layer was selected, as text."""
    settings, num_tokens = explanation.settings, explanation.report.num_prompt_tokens
    return {
        None: "",
        "off": f"{settings.method} computes every token at every layer",
        "short_prompt": f"the prompt has no more than {settings.select_tokens:,} tokens",
        "threshold_not_met": f"ρ stayed above {settings.threshold:g} over {num_tokens:,} tokens",
    }[explanation.report.no_selection_reason]


def _bars(explanation: Explanation) -> list[Bar]:
    report = explanation.report
    full = report.num_prompt_tokens * explanation.num_kv_heads
    bytes_per_entry = report.kv_bytes_full / (full * len(report.layer_entries))
    step = (_WIDTH - _LEFT) / len(report.layer_entries)
    bars = []
    for layer_idx, kept in enumerate(report.layer_entries):
        height = kept / full * (_HEIGHT - _BOTTOM)
        bars.append(
            Bar(
                layer_idx=layer_idx,
                kept=kept,
                full=full,
                kept_bytes=round(kept * bytes_per_entry),
                x=_LEFT + layer_idx * step + step * 0.1,
                width=step * 0.8,
                y=_HEIGHT - _BOTTOM - height,
                height=height,
            )
        )
    return bars


def _rho_top(explanation: Explanation) -> float:
    """The top of the chart's scale: a round value above every ρ."""
    highest = max((rho for _, rho in explanation.report.rho if math.isfinite(rho)), default=1)
    return math.ceil(max(highest, explanation.settings.threshold, 1) * 5) / 5


def _rho_y(rho: float, top: float) -> float:
    return (1 - min(rho, top) / top) * (_HEIGHT - _BOTTOM - 8) + 8


def _points(explanation: Explanation) -> list[Point]:
    num_layers = len(explanation.report.layer_entries)
    step = (_WIDTH - _LEFT - 16) / max(1, num_layers - 1)
    top = _rho_top(explanation)
    return [
        Point(layer_idx, rho, _LEFT + layer_idx * step, _rho_y(rho, top))
        for layer_idx, rho in explanation.report.rho
    ]


def _data(explanation: Explanation) -> str:
    """Data for the page's script, as JSON that cannot close its script element.

    levels: per layer one character per token: - for unranked, 0 to 9 by halvings of the rank.
    """
    data: dict[str, Any] = {
        "pieces": explanation.pieces,
        "last": explanation.last_layers,
        "layers": [scores.layer_idx for scores in explanation.layer_scores],
        "levels": [
            "".join(_level(rank, len(scores.ranks)) for rank in scores.ranks)
            for scores in explanation.layer_scores
        ],
        "ranks": [scores.ranks for scores in explanation.layer_scores[-1:]],
        "window": explanation.settings.window_size,
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _level(rank: int, num_ranked: int) -> str:
    if rank == 0:
        return "-"
    return str(min(_NUM_LEVELS - 1, int(math.log2(num_ranked / rank))))
