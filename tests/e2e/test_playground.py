"""The playground as a person uses it: a real browser, a running service with keys, a real model.

With PAGE_PICTURES set to a folder, pictures of the page are written there.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Response, Route, expect

from services.gateway.access.keys import entry_text, new_key
from tests.e2e.winnow_process import FREE_PORTS, WinnowServe
from tests.services.playground.browser import LOWEST_CONTRAST, chromium

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

KEY, KEY_ENTRY = new_key("visitor")
ANSWERS = {"quick-fox": "4821937", "amber-barn": "7305164", "pass key": "48219"}
PATIENCE_MS = 60_000
LEAST_CONTRAST = 4.5


@dataclass
class Visit:
    """A tab on the playground, and what in it asks for other addresses or complains."""

    page: Page
    foreign: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def give_key(self, key: str = KEY) -> None:
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Use it").click()

    def show_example(self) -> None:
        self.page.get_by_role("button", name="Example", exact=True).click()

    def ask(self) -> None:
        self.page.get_by_role("button", name="Ask", exact=True).click()

    def until_answered(self) -> None:
        expect(self.page.locator("#go")).to_be_enabled(timeout=PATIENCE_MS)

    def picture(self, name: str, *, dark: bool = False) -> None:
        folder = os.environ.get("PAGE_PICTURES")
        if folder:
            self.page.emulate_media(color_scheme="dark" if dark else "light")
            self.page.evaluate("() => { scrollTo(0, 0); document.activeElement.blur(); }")
            self.page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WinnowServe]:
    folder = tmp_path_factory.mktemp("playground")
    (folder / "keys.yaml").write_text(entry_text(KEY_ENTRY))
    keys = ("--api-keys-file", str(folder / "keys.yaml"))
    memory = ("--kv-memory-bytes", "64MiB", "--prefix-cache-bytes", "64MiB")
    service = WinnowServe(folder, [*FREE_PORTS, *keys, *memory], HOME=str(folder))
    service.wait_until_ready()
    yield service
    service.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def visit(service: WinnowServe, browser: Browser, **options: Any) -> Visit:
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 1200}} | options)
    found = Visit(context.new_page())

    def pass_on(route: Route) -> None:
        if route.request.url.startswith(service.url):
            route.continue_()
        else:
            found.foreign.append(route.request.url)
            route.abort()

    context.route(re.compile("^http"), pass_on)
    found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.page.on("console", lambda message: found.complaints.append(message.text))
    found.page.goto(service.url)
    return found


@pytest.fixture
def tab(service: WinnowServe, browser: Browser) -> Iterator[Visit]:
    """A tab whose key is accepted."""
    found = visit(service, browser)
    found.give_key()
    expect(found.page.locator("#model")).to_contain_text("winnow-tiny")
    found.complaints.clear()  # of the first request, without a key
    yield found
    assert found.foreign == []
    assert found.complaints == []
    found.page.context.close()


def test_asks_for_a_key_and_keeps_it_in_the_tab_alone(
    service: WinnowServe, browser: Browser
) -> None:
    found = visit(service, browser)
    page = found.page
    expect(page.get_by_label("API key")).to_be_visible()
    expect(page.locator("#key-problem")).to_be_hidden()
    found.give_key("winnow-wrong")
    expect(page.locator("#key-problem")).to_have_text("the API key is not valid")
    found.give_key()
    expect(page.get_by_label("API key")).to_be_hidden()
    assert page.evaluate("() => Object.values(sessionStorage)") == [KEY]
    assert page.evaluate("() => [localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    expect(page.locator("#model")).to_contain_text("winnow-tiny")
    another = page.context.new_page()
    another.goto(service.url)
    expect(another.get_by_label("API key")).to_be_visible()
    page.context.close()


def test_asks_streams_compares_and_asks_again(tab: Visit) -> None:
    page = tab.page
    tab.picture("playground_empty")
    tab.show_example()
    page.get_by_label("Ask without pruning as well").check(force=True)
    with page.expect_response("**/v1/chat/completions") as first:
        page.keyboard.press("Control+Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    tab.until_answered()
    assert_asked(first.value)
    expect(page.locator("#answer")).to_have_text(ANSWERS["quick-fox"])
    expect(page.locator("#full-answer")).to_have_text(ANSWERS["quick-fox"])
    expect(page.locator("#note")).to_have_text("Both answers are the same.")
    expect(page.locator("#num-selected")).to_contain_text("512of ")
    expect(page.locator("#first-token")).to_contain_text("unpruned")
    expect(page.locator("#cached")).to_have_count(0)
    text = page.locator("#prompt").text_content() or ""
    assert text.startswith("<|user|>ON WINNOWING") and text.endswith("<|end|><|assistant|>")
    kept = "".join(page.locator("#prompt span:not(.gone)").all_text_contents())
    assert "quick-fox is: 4821937" in kept
    assert page.locator("#rho .chosen").count() == 1
    for chart, bars in (("#time", 12), ("#bytes", 3), ("#layers", 32)):
        assert page.locator(f"{chart} rect").count() == bars
    tab.picture("playground")
    page.get_by_label("Ask without pruning as well").uncheck(force=True)
    page.get_by_role("button", name="amber-barn").click()
    tab.ask()
    tab.until_answered()
    expect(page.locator("#answer")).to_have_text(ANSWERS["amber-barn"])
    cached = page.locator("#cached").inner_text()
    assert int(cached.split()[0].replace(",", "")) > 2_000
    expect(page.locator("#turns tbody tr")).to_have_count(2)
    tab.picture("playground_dark", dark=True)


def assert_asked(response: Response) -> None:
    """The page asks for all it shows in one request."""
    body = response.request.post_data_json
    assert body is not None
    assert body["stream"] is True
    assert body["winnow"] == {"explain": True}


def test_an_answer_is_shown_while_it_comes_and_can_be_stopped(tab: Visit) -> None:
    page = tab.page
    page.get_by_label("Text", exact=True).fill("The wind " * 60)
    page.get_by_label("Tokens of the answer, at most").fill("4000")
    tab.ask()
    page.wait_for_function(
        "() => document.getElementById('answer')?.textContent.length > 5", timeout=PATIENCE_MS
    )
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
    page.keyboard.press("Escape")
    tab.until_answered()
    expect(page.locator(".answer .foot")).to_have_text("stopped")


def test_the_sliders_set_what_goes_on(tab: Visit) -> None:
    page = tab.page
    tab.show_example()
    slider = page.get_by_label("Tokens above the chosen layer")
    assert slider.get_attribute("aria-valuetext") == "512"
    slider.focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "256"
    tab.ask()
    tab.until_answered()
    expect(page.locator("#num-selected")).to_contain_text("256of ")


def test_tells_errors_as_the_api_does(tab: Visit) -> None:
    page = tab.page
    page.get_by_label("Text", exact=True).fill("word " * 9_000)
    tab.ask()
    expect(page.locator(".answer .problem")).to_contain_text("tokens; the limit is 8,191")
    tab.complaints.clear()  # the browser's line about the status 400


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768])
def test_is_readable_on_narrow_screens_and_in_the_dark(
    scheme: Any, width: int, service: WinnowServe, browser: Browser
) -> None:
    size: Any = {"width": width, "height": 800}
    found = visit(service, browser, viewport=size, color_scheme=scheme)
    found.give_key()
    page = found.page
    found.show_example()
    found.ask()
    found.until_answered()
    expect(page.locator("#prompt .gone").first).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    worst = page.evaluate(LOWEST_CONTRAST)
    assert worst["ratio"] >= LEAST_CONTRAST, worst
    found.picture(f"playground_{width}_{scheme}")
    page.context.close()


def test_says_so_when_the_service_is_gone(service: WinnowServe, browser: Browser) -> None:
    """The last test: it ends the service."""
    found = visit(service, browser)
    found.give_key()
    found.show_example()
    expect(found.page.locator("#model")).to_contain_text("winnow-tiny")
    service.kill()
    found.ask()
    expect(found.page.locator(".answer .problem")).to_have_text("The service does not answer.")
    found.page.context.close()
