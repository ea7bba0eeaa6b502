"""The playground's page, with all that it needs in it, and the policy that lets it load no more."""

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

_STYLES = ("look.css", "form.css", "results.css", "narrow.css")
_SCRIPTS = ("base.js", "api.js", "charts.js", "text.js", "results.js", "form.js", "main.js")
_THIS_SERVICE = "'self'"


@dataclass(frozen=True, slots=True)
class Page:
    """headers: to be sent with it."""

    html: str
    headers: Mapping[str, str]


@functools.cache
def playground() -> Page:
    """The page that asks the service which serves it."""
    html = _filled({"example": _read("example.txt").strip()}, policy="")
    return Page(
        html,
        {
            "content-security-policy": f"{_policy(_THIS_SERVICE)}; frame-ancestors 'none'",
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-store",
        },
    )


def report_page(report: Mapping[str, Any]) -> str:
    """The page as a file that shows one answer; `report` as services.playground.report makes it."""
    policy = _policy("'none'")
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    return _filled({"report": report}, policy=meta)


def _filled(data: Mapping[str, Any], policy: str) -> str:
    html = _read("page.html")
    for name, text in (("policy", policy), ("style", _style()), ("script", _script())):
        html = html.replace(f"<!-- {name} -->", text)
    return html.replace("<!-- data -->", _json(data))


def _policy(connect: str) -> str:
    """What a browser lets the page load: its own style and script, and from `connect`."""
    return (
        f"default-src 'none'; style-src '{_hash(_style())}'; script-src '{_hash(_script())}'; "
        f"connect-src {connect}; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _style() -> str:
    return "\n".join(map(_read, _STYLES))


def _script() -> str:
    return "\n".join(('"use strict"; (() => {', *map(_read, _SCRIPTS), "})();"))


def _json(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it is put in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


@functools.cache
def _read(name: str) -> str:
    return files("services.playground").joinpath(name).read_text(encoding="utf-8")
