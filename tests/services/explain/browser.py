"""A page as a real Chromium shows it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from playwright.sync_api import Page, sync_playwright

Scheme = Literal["light", "dark"]

LOWEST_CONTRAST = Path(__file__).with_name("contrast.js").read_text(encoding="utf-8")


@dataclass
class Shown:
    """A page, what it asked the network for, and what it complained about."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@contextmanager
def shown(file: Path, scheme: Scheme = "light", width: int = 1200) -> Iterator[Shown]:
    """`file` in a window `width` pixels wide, in the colours that the system asks for."""
    executable = shutil.which("chromium")
    assert executable is not None, "chromium is missing; `make test` installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            page = browser.new_page(
                color_scheme=scheme, viewport={"width": width, "height": 900}, locale="en-US"
            )
            result = Shown(page)
            page.on("request", lambda request: result.requests.append(request.url))
            page.on("pageerror", lambda error: result.complaints.append(str(error)))
            page.on("console", lambda message: result.complaints.append(message.text))
            page.goto(file.as_uri())
            yield result
        finally:
            browser.close()
