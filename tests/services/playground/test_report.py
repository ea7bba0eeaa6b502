"""`winnow explain` from the command line to the browser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from services.cli.main import main
from services.playground.page import report_page
from services.playground.report import report as report_of
from tests.models_in_code import save_tiny_model
from tests.services.playground.browser import LOWEST_CONTRAST, Scheme, chromium, shown
from winnow import SamplingParams, Winnow
from winnow.explain import Explanation, explain

TEXT = "a <b>bold</b> fox & its </script> jump over the lazy dög – 漢字\n" * 12
SETTINGS: dict[str, Any] = {
    "method": "fastkv",
    "fixed_layer": 1,
    "select_tokens": 96,
    "kv_budget": 48,
}
SAMPLING = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
LEAST_CONTRAST = 4.5
SOON_MS = 5_000  # a tenth of it on a machine with nothing else to do
# Per token, the class of the span that it is in.
FATES = """() => [...document.querySelectorAll("#prompt span")].flatMap(
    (span) => Array(span.last - span.first + 1).fill(span.className))"""
# Of each character of the prompt, where it begins on its line.
LEFTS = """() => [...document.querySelectorAll("#prompt span")].flatMap((span) =>
    [...span.textContent].map((_, at) => {
      const range = new Range();
      range.setStart(span.firstChild, at);
      range.setEnd(span.firstChild, at + 1);
      return range.getBoundingClientRect().left;
    }))"""
IS_FILLED = "(length) => document.getElementById('prompt').textContent.length === length"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def explanation(tiny_models: dict[str, Path]) -> Explanation:
    winnow = Winnow.load(tiny_models["llama"], **SETTINGS)
    return explain(winnow, winnow.tokenizer.encode(TEXT), SAMPLING)


@pytest.fixture(scope="module")
def report(explanation: Explanation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report_page(report_of(explanation, "tiny")), encoding="utf-8")
    return file


def test_shows_the_prompt_and_the_reports_own_figures(
    browser: Browser, report: Path, explanation: Explanation
) -> None:
    figures = explanation.report
    with shown(browser, report.as_uri()) as view:
        page = view.page
        assert page.locator("#prompt").text_content() == TEXT
        num_dropped = figures.num_prompt_tokens - figures.num_selected_tokens
        fates = page.evaluate(FATES)
        assert len(fates) == figures.num_prompt_tokens
        assert fates.count("gone") == num_dropped > 0
        assert fates.count("window") == explanation.settings.window_size
        told = page.locator("#num-selected").inner_text().split()
        num_tokens = f"{figures.num_prompt_tokens:,}"
        assert told == [f"{figures.num_selected_tokens:,}", "of", num_tokens, "tokens"]
        assert page.locator("#selection-layer").inner_text().split() == ["1", "of", "0", "to", "3"]
        for where, answer in (
            ("#answer", explanation.answer),
            ("#full-answer", explanation.full_answer),
        ):
            assert page.locator(where).text_content() == answer.text.replace("\0", "\ufffd")
        kept = [int(bar.split(":")[1].split()[0]) for bar in _titles(page, "#layers .kept")]
        assert tuple(kept) == figures.layer_entries
        assert view.complaints == []
        assert view.requests == [report.as_uri()]


def test_a_layer_s_bar_is_of_its_own_size(browser: Browser, tmp_path: Path) -> None:
    winnow = Winnow.load(save_tiny_model(tmp_path, "gemma4"), **SETTINGS)
    explained = explain(winnow, winnow.tokenizer.encode(TEXT), SAMPLING)
    full = explained.layer_entries_full
    assert len({*full}) > 1
    file = tmp_path / "report.html"
    file.write_text(report_page(report_of(explained, "tiny")), encoding="utf-8")
    with shown(browser, file.as_uri()) as view:
        titles = _titles(view.page, "#layers .kept")
        assert [int(title.split(" of ")[1].split()[0]) for title in titles] == [*full]
        heights = view.page.locator("#layers .whole").evaluate_all(
            "bars => bars.map((bar) => Number(bar.getAttribute('height')))"
        )
        assert heights == pytest.approx([max(heights) * num / max(full) for num in full])
        assert view.complaints == []


def test_what_turns_a_text_around_turns_nothing_that_follows(
    browser: Browser, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    text = "left \u202eright"
    winnow = Winnow.load(tiny_models["llama"])
    explained = explain(winnow, winnow.tokenizer.encode(text, add_special_tokens=False), SAMPLING)
    file = tmp_path / "report.html"
    file.write_text(report_page(report_of(explained, "tiny")), encoding="utf-8")
    with shown(browser, file.as_uri()) as view:
        assert view.page.locator("#prompt").text_content() == text
        lefts = view.page.evaluate(LEFTS)[text.index("right") :]
        assert lefts == sorted(set(lefts))
        view.page.locator("#prompt").press("End")
        assert view.page.locator("#token bdi").count() == 1


def _titles(page: Page, selector: str) -> list[str]:
    titles = page.locator(f"{selector} title").all_text_contents()
    return [title.replace(",", "") for title in titles]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(browser: Browser, report: Path, scheme: Scheme) -> None:
    with shown(browser, report.as_uri(), scheme) as view:
        for theme in (scheme, "the other"):
            if theme == "the other":
                view.page.locator("#theme").click()
            worst = view.page.evaluate(LOWEST_CONTRAST)
            assert worst["ratio"] >= LEAST_CONTRAST, f"{theme}: {worst}"


def test_the_switch_changes_light_to_dark_and_back(browser: Browser, report: Path) -> None:
    with shown(browser, report.as_uri(), "light") as view:
        paper = "() => getComputedStyle(document.body).backgroundColor"
        colours = [view.page.evaluate(paper)]
        for _ in range(2):
            view.page.locator("#theme").click()
            colours.append(view.page.evaluate(paper))
        assert colours[0] == colours[2] != colours[1]


def test_nothing_is_wider_than_a_phone(browser: Browser, report: Path) -> None:
    with shown(browser, report.as_uri(), width=360) as view:
        width = view.page.evaluate("() => document.documentElement.scrollWidth")
        assert width <= 360


def test_tells_a_tokens_rank_and_fate_to_mouse_and_keyboard(
    browser: Browser, report: Path, explanation: Explanation
) -> None:
    ranks, last = explanation.layer_ranks[-1].ranks, explanation.scores.last_layers
    dropped = next(i for i, layer in enumerate(last) if layer == 1)
    with shown(browser, report.as_uri()) as view:
        view.page.locator("#prompt .gone").first.hover(position={"x": 2, "y": 8})
        told = view.page.locator("#token").inner_text()
        assert f"Token {dropped} " in told
        assert f"rank {ranks[dropped]:,}, " in told
        assert "% of the attention, dropped after layer 1" in told
        view.page.locator("#prompt").focus()
        view.page.keyboard.press("ArrowRight")
        assert f"Token {dropped + 1} " in view.page.locator("#token").inner_text()
        view.page.keyboard.press("End")
        assert f"Token {len(last) - 1} " in view.page.locator("#token").inner_text()


def test_what_was_dropped_can_be_hidden(browser: Browser, report: Path) -> None:
    with shown(browser, report.as_uri()) as view:
        height = "() => document.getElementById('prompt').scrollHeight"
        before = view.page.evaluate(height)
        view.page.get_by_role("button", name="Hide what was dropped").click()
        assert view.page.evaluate(height) < before
        assert view.page.locator("#prompt").text_content() == TEXT


def test_the_best_passages_are_shown_one_by_one(browser: Browser, report: Path) -> None:
    with shown(browser, report.as_uri()) as view:
        for number in (1, 2):
            view.page.get_by_role("button", name="Best passages").click()
            told = view.page.locator("#token").inner_text()
            assert told.startswith(f"Passage {number} of ")


def test_shades_by_the_layer_that_is_chosen(browser: Browser, report: Path) -> None:
    shades = "() => [...document.querySelectorAll('#prompt span')].map((s) => s.className)"
    with shown(browser, report.as_uri()) as view:
        before = view.page.evaluate(shades)
        view.page.locator("#layer").select_option("0")
        after = view.page.evaluate(shades)
    assert before != after
    assert len(set(before)) > 3


def test_says_so_where_nothing_was_pruned(
    browser: Browser,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "full.html"
    flags = ["--model", str(tiny_models["llama"]), "--pruning", "method=full", "--max-tokens", "2"]
    assert main(["explain", "--prompt", "some words", *flags, "-o", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    with shown(browser, file.as_uri()) as view:
        assert "full computes every token" in view.page.locator("#no-rho").inner_text()
        assert view.page.locator("#prompt .gone").count() == 0
        assert view.complaints == []


def test_draws_rho_with_the_chosen_layer(
    browser: Browser, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    winnow = Winnow.load(
        tiny_models["llama"],
        method="asl",
        select_tokens=96,
        kv_budget=48,
        min_layer=1,
        observed_layers=2,
        latest_layer=2,
        threshold=0.99,
    )
    found = explain(winnow, winnow.tokenizer.encode(TEXT), SAMPLING)
    file = tmp_path / "asl.html"
    file.write_text(report_page(report_of(found, "tiny")), encoding="utf-8")
    with shown(browser, file.as_uri()) as view:
        told = [title.split(": ") for title in _titles(view.page, ".dot")]
        expected = [[f"layer {layer}", f"{rho:.3f}"] for layer, rho in found.report.rho]
        assert told == expected
        assert view.page.locator(".chosen").count() == int(
            found.report.selection_layer in dict(found.report.rho)
        )
        assert view.complaints == []


BAD = {
    "no prompt file": (["--prompt-file", "/nowhere.txt"], "cannot be read"),
    "folder as output": (["--prompt", "x", "-o", "/tmp"], "is a folder"),
    "no folder": (["--prompt", "x", "-o", "/nowhere/r.html"], "missing or not writable"),
    "empty prompt": (["--prompt", ""], "0 tokens"),
    "too long": (["--prompt", "x " * 20_000], "the limit is"),
    "no tokens": (["--prompt", "x", "--max-tokens", "0"], "max_tokens"),
    "method": (["--prompt", "x", "--pruning", "method=snapvk"], "snapvk"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(
    case: str, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = BAD[case]
    output = ["-o", str(tmp_path / "r.html")]
    model = ["--model", str(tiny_models["llama"])]
    assert main(["explain", *model, *output, *flags]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x and "Loading weights" not in x]
    assert len(lines) == 1
    assert lines[0].startswith("winnow: ")
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_the_data_cannot_end_the_script(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    data = text.split('id="data">')[1].split("</script>")[0]
    assert (
        "".join(json.loads(data)["report"]["runs"][0]["usage"]["winnow"]["explain"]["pieces"])
        == TEXT
    )


def test_a_text_of_100_000_tokens_is_shown_at_once(
    browser: Browser, explanation: Explanation, tmp_path: Path
) -> None:
    """The page answers to the keyboard within two seconds, and has the whole text soon after."""
    data = report_of(explanation, "tiny")
    told = data["runs"][0]["usage"]["winnow"]["explain"]
    times = 100_000 // len(told["pieces"]) + 1
    long = {name: list(told[name]) * times for name in ("pieces", "scores", "last_layers")}
    data["runs"][0]["usage"]["winnow"]["explain"] = told | long
    file = tmp_path / "long.html"
    file.write_text(report_page(data | {"layers": []}), encoding="utf-8")
    with shown(browser, file.as_uri()) as view:
        view.page.locator("#prompt").press("ArrowRight")
        assert "Token 0 " in view.page.locator("#token").inner_text()
        assert view.page.evaluate("() => performance.now()") < SOON_MS
        view.page.wait_for_function(IS_FILLED, arg=len(TEXT) * times)
        view.page.keyboard.press("End")
        assert f"Token {len(long['pieces']) - 1:,} " in view.page.locator("#token").inner_text()
        assert view.complaints == []
