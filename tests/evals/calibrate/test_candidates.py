"""What is tried, and how one layer's answers are evened out."""

import pytest

from evals.calibrate.candidates import (
    UNPRUNED_VARIANT,
    Budgets,
    fixed_layers,
    kv_grid,
    layer_grid,
    observers,
)
from evals.calibrate.curve import LayerCurve
from evals.calibrate.measured import Measured
from tests.evals.calibrate.records import record
from tests.winnow.shapes import SLIDING, shape_of
from winnow.layers import FULL

OBSERVATION = {"window_size": 16, "kernel_size": 31}


@pytest.mark.parametrize("num_layers", [4, 6, 12, 30, 32, 80])
def test_no_layer_of_the_middle_third_is_left_out(num_layers: int) -> None:
    grid = layer_grid(shape_of(num_layers))
    assert {*range(num_layers // 3, num_layers * 2 // 3)} <= {*grid}
    assert grid == sorted(set(grid))
    assert grid[0] > 0
    assert grid[-1] < num_layers - 1


def test_of_a_model_with_windows_every_full_layer_in_the_middle_is_tried() -> None:
    shape = shape_of(([SLIDING] * 5 + [FULL]) * 4)
    assert layer_grid(shape) == [5, 11, 17]
    options = [one.spec.options for one in observers(Budgets(4000, 1000), OBSERVATION, shape)]
    assert {(own["observed_layers"], own["min_layer"]) for own in options} == {(2, 11)}
    windows = {one.spec.options["window_size"] for one in kv_grid(Budgets(4000, 1000), shape)}
    assert windows == {8}, "none longer than the layers'"


@pytest.mark.parametrize(
    ("num_tokens", "kv_budget", "window_size", "sizes"),
    [
        (4000, 1000, 32, [250, 500, 1000]),
        (4000, 100, 32, [50, 100]),
        (4000, 40, 32, [40]),
        (41, 40, 8, [10, 20, 40]),
    ],
)
def test_tokens_selected_are_above_the_window_and_within_the_budget(
    num_tokens: int, kv_budget: int, window_size: int, sizes: list[int]
) -> None:
    assert Budgets(num_tokens, kv_budget).select_tokens(window_size) == sizes


def test_a_layer_that_finds_what_its_neighbours_miss_keeps_its_score() -> None:
    fixed = fixed_layers(Budgets(4000, 1000), OBSERVATION, shape_of(30))
    records = [
        record(one.method, float(layer == 17), layer)
        for one in fixed
        for layer in [one.spec.options["fixed_layer"]]
    ]
    measured = Measured([record(UNPRUNED_VARIANT.method, 1.0, None), *records])
    curve = LayerCurve(measured, fixed)
    kept = {
        one.spec.options["fixed_layer"]: curve.figures(one, [("passkey", 0)]).kept for one in fixed
    }
    assert {layer for layer, share in kept.items() if share} == {17}
    assert kept[17] == 1.0


def test_one_number_of_tokens_alone_is_not_believed() -> None:
    fixed = fixed_layers(Budgets(4000, 1000), OBSERVATION, shape_of(30))
    lucky = next(one for one in fixed if one.spec.options["select_tokens"] == 250)
    records = [
        record(one.method, float(one is lucky), one.spec.options["fixed_layer"]) for one in fixed
    ]
    measured = Measured([record(UNPRUNED_VARIANT.method, 1.0, None), *records])
    assert LayerCurve(measured, fixed).figures(lucky, [("passkey", 0)]).kept == 0.5
