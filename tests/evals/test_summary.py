from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from evals.summary import Setup, summarize
from evals.table import print_summary
from tests.evals.synthetic import LENGTHS, TASKS, VARIANTS, make_records

(RECORD,) = make_records(("vt",), (1024,), (("asl", 64),), num_samples=1)
ASL = Setup(1024, "asl", 64)


def test_a_cell_is_the_mean_of_its_samples_with_its_standard_error() -> None:
    records = [
        replace(RECORD, index=0, score=1.0, selection_layer=4, computed_share=0.5),
        replace(RECORD, index=1, score=0.0, selection_layer=8, computed_share=0.7),
        replace(RECORD, index=2, score=0.5, selection_layer=None, computed_share=0.9),
    ]
    (cell,) = summarize(records, [ASL], ["vt"]).cells
    assert (cell.mean, cell.count) == (0.5, 3)
    assert cell.standard_error == pytest.approx(0.5 / 3**0.5)
    assert cell.computed_share == pytest.approx(0.7)
    assert cell.selection_layer == 6
    assert cell.selection_layers == {"4": 1, "8": 1, "none": 1}


def test_one_sample_has_no_standard_error() -> None:
    summary = summarize([RECORD], [ASL], ["vt"])
    assert summary.cells[0].standard_error is None
    assert summary.overall[0].standard_error is None


def test_every_task_has_the_same_weight_whatever_its_samples() -> None:
    easy = [replace(RECORD, task="passkey", index=idx, score=1.0) for idx in range(9)]
    hard = [replace(RECORD, index=idx, score=score) for idx, score in enumerate((0.0, 0.5))]
    (overall,) = summarize([*easy, *hard], [ASL], ["vt", "passkey"]).overall
    assert overall.num_tasks == 2
    assert overall.mean == pytest.approx((1 + 0.25) / 2)
    assert overall.standard_error == pytest.approx(0.25 / 2)  # of the hard task alone


def test_keeps_the_order_that_was_asked_for_and_leaves_out_what_has_no_records() -> None:
    records = [replace(RECORD, budget=budget) for budget in (128, 64)]
    setups = [Setup(1024, "full", None), ASL, Setup(1024, "asl", 128)]
    summary = summarize(records, setups, ["passkey", "vt"])
    assert [cell.budget for cell in summary.cells] == [64, 128]
    assert [row.budget for row in summary.overall] == [64, 128]


def test_a_long_method_takes_lines_instead_of_the_scores_room() -> None:
    method = (
        "snapkv:decode_budget=512:recompression=rkv:redundancy_weight=0.2:recompress_interval=64"
    )
    record = replace(RECORD, method=method, score=0.625)
    console = Console(width=72, record=True, file=StringIO())
    print_summary(summarize([record], [Setup(1024, method, 64)], ["vt"]), console)
    text = console.export_text()
    assert "1,024 tokens, 1 sample a task" in text
    assert "…" not in text
    assert all(option in text for option in method.split(":"))
    assert text.split().count("62.5") == 2  # the task's and the mean


@pytest.mark.parametrize("width", [72, 100, 200])
def test_the_table_shows_every_score_at_any_width(width: int) -> None:
    setups = [Setup(length, *variant) for length in LENGTHS for variant in VARIANTS]
    summary = summarize(make_records(), setups, TASKS)
    console = Console(width=width, record=True, file=StringIO())
    print_summary(summary, console)
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for length in LENGTHS:
        assert f"{length:,} tokens, 11 samples a task" in text
    for row in summary.overall:
        line = f"{row.method} {row.budget or ''}".split()
        assert any(part.split()[: len(line)] == line for part in text.splitlines())
    shown = text.split()
    wanted = [f"{100 * cell.mean:.1f}" for cell in summary.cells]
    assert all(shown.count(score) >= wanted.count(score) for score in set(wanted))
