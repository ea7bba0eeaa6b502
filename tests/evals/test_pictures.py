from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from evals.pictures import accuracy, draw_pictures, layers
from evals.records import Record
from evals.summary import Setup, Summary, summarize
from tests.evals.synthetic import LENGTHS, TASKS, VARIANTS, make_records


def summary_of(records: list[Record]) -> Summary:
    setups = [Setup(length, *variant) for length in LENGTHS for variant in VARIANTS]
    return summarize(records, setups, TASKS)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_draws_every_picture_of_a_whole_run(tmp_path: Path) -> None:
    records = make_records()
    files = draw_pictures(tmp_path, records, summary_of(records), {"asl": 0.4})
    names = {file.name for file in files}
    assert names == {path.name for path in tmp_path.iterdir()}
    assert names > {"accuracy_vs_budget.png", "accuracy_vs_prefill.png", "rho.png"}
    assert names > {"selection_layer.png", "niah_full.png", "niah_fastkv-fixed_layer-5_64.png"}
    for file in files:
        image = Image.open(file).convert("L")
        assert min(image.size) > 200
        assert len(image.getcolors() or []) > 10  # lines and words, not a blank page


def test_draws_no_picture_without_data(tmp_path: Path) -> None:
    records = make_records(tasks=("vt",), variants=(("full", None),))
    files = draw_pictures(tmp_path, records, summary_of(records), {})
    assert [file.name for file in files] == ["accuracy_vs_prefill.png"]


def test_a_line_per_method_over_budgets_and_a_level_for_full() -> None:
    records = make_records()
    figure = accuracy.against_budget(summary_of(records))
    assert figure is not None
    methods = list(dict.fromkeys(method for method, _ in VARIANTS))
    assert legend(figure) == methods
    assert [panel.get_title() for panel in figure.axes] == [
        "1,024 tokens",
        "2,048 tokens",
    ]
    labels = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert labels == ["64", "128", "256"]


def test_tasks_stand_in_the_order_of_their_mean_selection_layer() -> None:
    (record,) = make_records(("vt",), (1024,), (("asl", 64),), num_samples=1)
    records = [
        replace(record, task=task, index=index, selection_layer=layer + index)
        for task, layer in (("late", 9), ("early", 3), ("middle", 6))
        for index in range(3)
    ]
    figure = layers.selection_layers(records)
    assert figure is not None
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels == ["early", "middle", "late"]


def test_rho_has_a_line_per_task_that_ends_where_few_samples_are_left() -> None:
    (record,) = make_records(("vt",), (1024,), (("asl", 64),), num_samples=1)
    short = replace(record, rho=((3, 1.0), (4, 0.2)))
    longer = replace(record, rho=((3, 1.0), (4, 0.8), (5, 0.1)))
    figure = layers.rho_by_layer([short] * 7 + [longer], {"asl": 0.3})
    assert figure is not None
    assert legend(figure) == ["vt", "threshold 0.3"]
    line = figure.axes[0].lines[0]
    assert np.asarray(line.get_xdata()).tolist() == [3, 4]
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx([1.0, (7 * 0.2 + 0.8) / 8])
