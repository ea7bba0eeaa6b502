"""`winnow explain` from the command line to the browser."""

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from services.cli.main import main
from services.explain.page import render
from tests.services.explain.browser import LOWEST_CONTRAST, Scheme, shown
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


@pytest.fixture(scope="module")
def explanation(tiny_models: dict[str, Path]) -> Explanation:
    winnow = Winnow.load(tiny_models["llama"], **SETTINGS)
    return explain(winnow, winnow.tokenizer.encode(TEXT), SAMPLING)


@pytest.fixture(scope="module")
def report(explanation: Explanation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(explanation, "tiny"), encoding="utf-8")
    return file


def test_shows_the_prompt_and_the_reports_own_figures(
    report: Path, explanation: Explanation
) -> None:
    figures = explanation.report
    with shown(report) as view:
        page = view.page
        assert page.locator("#prompt").text_content() == TEXT
        spans = page.locator("#prompt span")
        assert spans.count() == figures.num_prompt_tokens
        num_dropped = figures.num_prompt_tokens - figures.num_selected_tokens
        assert page.locator("#prompt .gone").count() == num_dropped > 0
        assert page.locator("#prompt .window").count() == explanation.settings.window_size
        assert page.locator("#num-tokens").inner_text() == f"{figures.num_prompt_tokens:,}"
        assert page.locator("#selection-layer").inner_text().split() == ["1", "of", "0", "to", "3"]
        assert f"{num_dropped:,} dropped" in page.locator("#num-selected").inner_text()
        for where, answer in (
            ("#answer", explanation.answer),
            ("#full-answer", explanation.full_answer),
        ):
            assert page.locator(where).text_content() == answer.text.replace("\0", "\ufffd")
        kept = [int(bar.split(":")[1].split()[0]) for bar in _titles(view.page, ".kept")]
        assert tuple(kept) == figures.layer_entries
        assert view.complaints == []
        assert view.requests == [report.as_uri()]


def _titles(page: Page, selector: str) -> list[str]:
    titles = page.locator(f"{selector} title").all_text_contents()
    return [title.replace(",", "") for title in titles]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(report: Path, scheme: Scheme) -> None:
    with shown(report, scheme) as view:
        for theme in (scheme, "the other"):
            if theme == "the other":
                view.page.locator("#theme").click()
            worst = view.page.evaluate(LOWEST_CONTRAST)
            assert worst["ratio"] >= LEAST_CONTRAST, f"{theme}: {worst}"


def test_the_switch_changes_light_to_dark_and_back(report: Path) -> None:
    with shown(report, "light") as view:
        paper = "() => getComputedStyle(document.body).backgroundColor"
        colours = [view.page.evaluate(paper)]
        for _ in range(2):
            view.page.locator("#theme").click()
            colours.append(view.page.evaluate(paper))
        assert colours[0] == colours[2] != colours[1]


def test_nothing_is_wider_than_a_phone(report: Path) -> None:
    with shown(report, width=360) as view:
        width = view.page.evaluate("() => document.documentElement.scrollWidth")
        assert width <= 360


def test_tells_a_tokens_rank_and_fate_to_mouse_and_keyboard(
    report: Path, explanation: Explanation
) -> None:
    ranks, last = explanation.layer_scores[-1].ranks, explanation.last_layers
    dropped = next(i for i, layer in enumerate(last) if layer == 1)
    with shown(report) as view:
        view.page.locator("#prompt span").nth(dropped).hover()
        told = view.page.locator("#told").inner_text()
        assert f"Token {dropped} " in told
        assert f"rank {ranks[dropped]:,}, dropped after layer 1" in told
        view.page.locator("#prompt").focus()
        view.page.keyboard.press("ArrowRight")
        assert f"Token {dropped + 1} " in view.page.locator("#told").inner_text()


def test_shades_by_the_layer_that_is_chosen(report: Path) -> None:
    shades = "() => [...document.querySelectorAll('#prompt span')].map((s) => s.style.background)"
    with shown(report) as view:
        before = view.page.evaluate(shades)
        view.page.locator("#layer").select_option("0")
        after = view.page.evaluate(shades)
    assert before != after
    assert len(set(before)) > 3


def test_says_so_where_nothing_was_pruned(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "full.html"
    flags = ["--model", str(tiny_models["llama"]), "--pruning", "method=full", "--max-tokens", "2"]
    assert main(["explain", "--prompt", "some words", *flags, "-o", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    with shown(file) as view:
        assert "full computes every token" in view.page.locator("#no-rho").inner_text()
        assert view.page.locator("#prompt .gone").count() == 0
        assert view.complaints == []


def test_draws_rho_with_the_chosen_layer(tiny_models: dict[str, Path], tmp_path: Path) -> None:
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
    file.write_text(render(found, "tiny"), encoding="utf-8")
    with shown(file) as view:
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
    assert "".join(json.loads(data)["pieces"]) == TEXT
