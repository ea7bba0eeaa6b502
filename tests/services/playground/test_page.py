"""What the page does with answers that a real service seldom gives; the API is played."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from services.playground.page import playground
from tests.services.playground.browser import chromium

ADDRESS = "http://winnow.test/below/"
PRUNING = {"method": "asl", "window_size": 8, "select_tokens": 512, "kv_budget": 512}
CAPS: dict[str, int | None] = {"select_tokens": None, "kv_budget": None, "decode_budget": None}
WINNOW: dict[str, Any] = {
    "selection_layer": None,
    "no_selection_reason": "short_prompt",
    "selected_tokens": 3,
    "computed_share": 1.0,
    "kv_bytes_full": 3072,
    "kv_bytes_kept": 3072,
    "rho": {},
    "recompressed_entries": 0,
    "wire_bytes": 3100,
    "exposed_transfer_s": 0.001,
    "ttft_s": 0.05,
    "cached_tokens": 0,
    "saved_layer_tokens": 0,
    "explain": None,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def card(**winnow: Any) -> dict[str, Any]:
    own = {"pruning": PRUNING, "caps": CAPS, "prefix_cache": False, "chat": True} | winnow
    return {"id": "played", "max_model_len": 8192, "max_output_tokens": 100, "winnow": own}


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields, "finish_reason": None}], "usage": None}


def usage(**winnow: Any) -> dict[str, Any]:
    told = {"prompt_tokens": 3, "completion_tokens": 2, "winnow": WINNOW | winnow}
    return {"choices": [], "usage": told}


def stream(*events: dict[str, Any], done: bool = True) -> str:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return "".join(lines) + ("data: [DONE]\n\n" if done else "")


@contextmanager
def played(
    browser: Browser, model: dict[str, Any], answer: str
) -> Iterator[tuple[Page, list[Any]]]:
    """A tab on the page below a path, and the bodies that it sends; every answer is `answer`."""
    context, sent = browser.new_context(locale="en-US"), []
    page = playground()

    def respond(route: Route) -> None:
        path = route.request.url.removeprefix(ADDRESS)
        if path == "":
            route.fulfill(body=page.html, content_type="text/html", headers=dict(page.headers))
        elif path == "v1/models":
            route.fulfill(json={"data": [model]})
        else:
            sent.append((path, route.request.post_data_json))
            route.fulfill(body=answer, content_type="text/event-stream")

    context.route("**/*", respond)
    tab = context.new_page()
    tab.goto(ADDRESS)
    expect(tab.locator("#model")).to_contain_text("played")
    yield tab, sent
    context.close()


def ask(tab: Page, text: str = "a text") -> None:
    tab.get_by_label("Text", exact=True).fill(text)
    tab.get_by_role("button", name="Ask", exact=True).click()
    expect(tab.locator("#go")).to_be_enabled()


def test_an_answer_is_text_and_never_html(browser: Browser) -> None:
    answer = stream(delta(content="<b>bold</b>"), delta(content=" & <img src=x>"), usage())
    with played(browser, card(), answer) as (tab, _):
        ask(tab)
        expect(tab.locator("#answer")).to_have_text("<b>bold</b> & <img src=x>")
        assert tab.locator("#answer *").count() == 0


def test_figures_are_shown_without_an_explanation(browser: Browser) -> None:
    with played(browser, card(), stream(delta(content="x"), usage())) as (tab, _):
        ask(tab)
        expect(tab.locator("#num-selected")).to_have_text("3of 3 tokens")
        expect(tab.locator("#no-rho")).to_contain_text("nothing was dropped")
        expect(tab.locator("#text-section")).to_be_hidden()


def test_reasoning_stands_apart_from_the_answer(browser: Browser) -> None:
    answer = stream(delta(reasoning_content="let me see"), delta(content="so"), usage())
    with played(browser, card(), answer) as (tab, _):
        ask(tab)
        expect(tab.locator(".thought")).to_have_text("let me see")
        expect(tab.locator("#answer")).to_have_text("so")


def test_without_pruning_nothing_is_dropped_while_decoding_either(browser: Browser) -> None:
    with played(browser, card(), stream(delta(content="x"), usage())) as (tab, sent):
        tab.get_by_label("Ask without pruning as well").check(force=True)
        ask(tab)
    whole = {"explain": True, "method": "full", "decode_budget": None, "decode_floor": None}
    assert [body["winnow"] for _, body in sent] == [{"explain": True}, whole]


def test_a_key_that_cannot_be_sent_is_asked_for_again(browser: Browser) -> None:
    with played(browser, card(), "") as (tab, _):
        tab.evaluate("() => sessionStorage.setItem('winnow-key', 'k\u2013ey')")
        tab.reload()
        expect(tab.locator("#key-problem")).to_contain_text("a character that no key can have")
        tab.get_by_label("API key").fill("k-ey")
        tab.get_by_role("button", name="Use it").click()
        expect(tab.locator("#model")).to_contain_text("played")
        expect(tab.locator("#key-form")).to_be_hidden()


BROKEN = {
    "an error": (
        stream(delta(content="so"), {"error": {"message": "it broke", "param": None}}, done=False),
        "it broke",
    ),
    "the end too early": (
        stream(delta(content="so"), done=False),
        "The stream broke off. The answer above is not complete.",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_came_before_an_error_stays(case: str, browser: Browser) -> None:
    answer, told = BROKEN[case]
    with played(browser, card(), answer) as (tab, _):
        ask(tab)
        expect(tab.locator(".answer .problem")).to_have_text(told)
        expect(tab.locator("#answer")).to_have_text("so")


def test_a_model_without_a_chat_template_completes_the_text(browser: Browser) -> None:
    answer = stream({"choices": [{"text": "so", "finish_reason": "stop"}]}, usage())
    with played(browser, card(chat=False), answer) as (tab, sent):
        ask(tab, "a text\n")
        expect(tab.locator("#answer")).to_have_text("so")
    ((path, body),) = sent
    assert path == "v1/completions"
    assert body["prompt"] == "a text"


# Method, preset, cap; then what the slider tells at its preset and at its end, and what is sent.
SLIDERS = {
    "no cap": ("asl", 512, None, "512 (preset)", "all", None),
    "cap": ("asl", 512, 600, "512 (preset)", "600", 600),
    "preset is the cap": ("snapkv", 600, 600, "600 (preset)", "600 (preset)", 512),
    "all is the preset": ("snapkv", None, None, "all (preset)", "all (preset)", 7168),
}


@pytest.mark.parametrize("case", SLIDERS)
def test_a_slider_goes_up_to_the_cap(case: str, browser: Browser) -> None:
    method, preset, cap, at_preset, at_end, sends = SLIDERS[case]
    pruning = PRUNING | {"method": method, "kv_budget": preset}
    model = card(pruning=pruning, caps=CAPS | {"kv_budget": cap})
    with played(browser, model, stream(usage())) as (tab, sent):
        assert tab.locator("#select-slide").is_visible() == (method == "asl")
        expect(tab.locator("#kv-told")).to_have_text(at_preset)
        slider = tab.get_by_label("KV entries kept per head")
        slider.press("End")
        expect(tab.locator("#kv-told")).to_have_text(at_end)
        if at_preset == at_end:
            slider.press("ArrowLeft")
        ask(tab)
    assert sent[0][1]["winnow"] == {"explain": True, "kv_budget": sends}


def test_opens_a_file_and_refuses_one_that_is_no_text(browser: Browser) -> None:
    with played(browser, card(), "") as (tab, _):
        files = tab.locator("#file")
        files.set_input_files({"name": "a.txt", "mimeType": "", "buffer": "ein Wörtchen".encode()})
        expect(tab.get_by_label("Text", exact=True)).to_have_value("ein Wörtchen")
        expect(tab.locator("#length")).to_have_text("12 characters, about 3 tokens")
        files.set_input_files({"name": "a.png", "mimeType": "", "buffer": b"\x89PNG\xff"})
        expect(tab.locator("#problem")).to_have_text("a.png is not a text in UTF-8.")
