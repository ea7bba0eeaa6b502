"""A page as a real Chromium shows it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.deadlines import SOON_S

expect.set_options(timeout=SOON_S * 1000)

Scheme = Literal["light", "dark"]

LOWEST_CONTRAST = Path(__file__).with_name("contrast.js").read_text(encoding="utf-8")


@dataclass
class Shown:
    """A page, what it asked the network for, and what it complained about."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@contextmanager
def chromium() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    assert executable is not None, "chromium is missing; `make test` installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def shown(
    browser: Browser, url: str, scheme: Scheme = "light", width: int = 1200, height: int = 900
) -> Iterator[Shown]:
    """`url` in a window of its own, in the colours that the system asks for."""
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": height}, locale="en-US"
    )
    try:
        result = Shown(context.new_page())
        result.page.on("request", lambda request: result.requests.append(request.url))
        result.page.on("pageerror", lambda error: result.complaints.append(str(error)))
        result.page.on("console", lambda message: result.complaints.append(message.text))
        result.page.goto(url)
        yield result
    finally:
        context.close()
