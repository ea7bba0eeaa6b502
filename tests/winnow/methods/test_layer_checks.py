"""Settings beside what a model's layers are."""

import re
from dataclasses import replace
from typing import Any

import pytest

from tests.winnow.shapes import CHUNKED, SLIDING, shape_of
from winnow.catalog import METHODS
from winnow.defaults import override_for, scaled_defaults
from winnow.errors import InvalidSetting
from winnow.kv import ModelShape
from winnow.layers import FULL, Layer
from winnow.pruning_settings import PruningSettings

GEMMA = shape_of([SLIDING, SLIDING, FULL] * 3)  # full: 2, 5, 8
LLAMA4 = shape_of([CHUNKED, FULL, CHUNKED, FULL])
MISTRAL = shape_of([SLIDING] * 4)
RECURRENT = shape_of([Layer(None, is_recurrent=True), FULL, Layer(None, is_recurrent=True), FULL])
FITTING = PruningSettings(
    window_size=8, observed_layers=2, min_layer=5, latest_layer=8, fixed_layer=5
)


@pytest.mark.parametrize(
    ("shape", "changes", "message", "param"),
    [
        (
            GEMMA,
            {"method": "fastkv", "fixed_layer": 6},
            "fixed_layer is 6, a sliding layer; tokens are selected after a full one, the nearest "
            "is 5",
            "fixed_layer",
        ),
        (
            GEMMA,
            {"method": "gemfilter", "fixed_layer": 9},
            r"fixed_layer is 9; the allowed range is \[0, 8\], and the nearest full layer is 8",
            "fixed_layer",
        ),
        (
            GEMMA,
            {"latest_layer": 7},
            "latest_layer is 7, a sliding layer; .* the nearest is 8",
            "latest_layer",
        ),
        (
            GEMMA,
            {"min_layer": 6, "latest_layer": 6},
            "latest_layer is 6, a sliding layer; .* the nearest is 8",
            "latest_layer",
        ),
        (
            LLAMA4,
            {"method": "fastkv", "fixed_layer": 2},
            "fixed_layer is 2, a chunked layer; .* the nearest is 1",
            "fixed_layer",
        ),
        (
            RECURRENT,
            {"method": "fastkv", "fixed_layer": 0},
            "fixed_layer is 0, a recurrent layer; .* the nearest is 1",
            "fixed_layer",
        ),
        (
            GEMMA,
            {"min_layer": 3, "observed_layers": 3},
            "observed_layers is 3; the first full layer from min_layer 3 on is 5, number 2 of 3. "
            "observed_layers 2 works, and so does min_layer 8",
            "observed_layers",
        ),
        (
            GEMMA,
            {"observed_layers": 4},
            "observed_layers is 4; .* is 5, number 2 of 3. observed_layers 2 works$",
            "observed_layers",
        ),
        (
            LLAMA4,
            {"min_layer": 3, "latest_layer": None, "method": "asl-2pass", "observed_layers": 3},
            "observed_layers is 3; the first full layer from min_layer 3 on is 3, number 2 of 2",
            "observed_layers",
        ),
        (
            shape_of([FULL, FULL, SLIDING, SLIDING]),
            {"min_layer": 2, "latest_layer": None},
            "min_layer is 2, a sliding layer; tokens are selected after a full one from there on, "
            "and the last is 1",
            "min_layer",
        ),
        (
            GEMMA,
            {"window_size": 9},
            "window_size is 9; layer 0 is a sliding layer, which attends to 8 tokens at most. "
            "window_size 8 works",
            "window_size",
        ),
        (
            MISTRAL,
            {},
            "method is asl; layers 0 to 3 are sliding, and a prompt is pruned by its full layers, "
            "of which there are 0. method full .* works",
            "method",
        ),
        (
            shape_of([SLIDING, CHUNKED]),
            {"method": "snapkv"},
            "method is snapkv; layers 0 to 1 are chunked and sliding",
            "method",
        ),
        (
            MISTRAL,
            {"method": "full", "decode_budget": 64},
            "decode_budget is 64; layers 0 to 3 are sliding",
            "decode_budget",
        ),
        (
            MISTRAL,
            {"method": "full", "decode_floor": 64},
            "decode_floor is 64; layers 0 to 3 are sliding",
            "decode_floor",
        ),
        (
            GEMMA,
            {"method": "pyramidinfer"},
            "method is pyramidinfer, .* layer 0 is a sliding layer. method fastkv or asl works",
            "method",
        ),
    ],
)
def test_settings_that_the_layers_do_not_allow_are_refused_with_what_works(
    shape: ModelShape, changes: dict[str, Any], message: str, param: str
) -> None:
    settings = replace(FITTING, **changes)
    with pytest.raises(InvalidSetting, match=message) as refused:
        settings.require_fits(shape)
    assert refused.value.param == param


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"pyramidinfer"}))
def test_every_other_method_fits_a_model_some_of_whose_layers_are_full(method: str) -> None:
    replace(FITTING, method=method).require_fits(GEMMA)


def test_min_layer_may_be_any_layer_before_a_full_one() -> None:
    for min_layer in (3, 4, 5):
        replace(FITTING, min_layer=min_layer).require_fits(GEMMA)


def test_a_model_without_full_layers_runs_unpruned_with_any_window() -> None:
    PruningSettings(method="full", window_size=32).require_fits(MISTRAL)


@pytest.mark.parametrize("changes", [{"kv_budget": 256}, {"select_tokens": 64}, {"fixed_layer": 2}])
def test_a_budget_without_full_layers_is_refused(changes: dict[str, Any]) -> None:
    ((name, value),) = changes.items()
    message = f"{name} is {value}; layers 0 to 3 are sliding, .* method full .* works"
    with pytest.raises(InvalidSetting, match=message) as refused:
        override_for(scaled_defaults(MISTRAL), changes, MISTRAL)
    assert refused.value.param == name
    override_for(scaled_defaults(GEMMA), {"kv_budget": 256}, GEMMA)


def test_who_asks_for_the_whole_prompt_may_name_a_budget_too() -> None:
    asked = {"method": "full", "kv_budget": 256}
    assert override_for(scaled_defaults(MISTRAL), asked, MISTRAL).method == "full"
    assert override_for(scaled_defaults(MISTRAL), {"kv_budget": None}, MISTRAL).method == "full"


_NEAREST = re.compile(r"(?:nearest|nearest full layer|last) is (\d+)$")
# As Gemma 3, Qwen 3.5 and Mistral 7B.
LIKE = {
    "gemma3": shape_of([*[SLIDING] * 5, FULL] * 3),
    "qwen3_5": shape_of([*[Layer(None, is_recurrent=True)] * 3, FULL] * 4),
    "mistral": MISTRAL,
    "llama": shape_of(4),
}
BAD: list[dict[str, Any]] = [
    *(
        {"method": method, "fixed_layer": idx}
        for method in ("fastkv", "gemfilter")
        for idx in (1, 99)
    ),
    *({"latest_layer": idx} for idx in (16, 99)),
    *({"min_layer": idx} for idx in (-1, 1, 16, 99)),
    *({"min_layer": 16, "method": method} for method in ("asl", "asl-2pass")),
    *({"observed_layers": count} for count in (3, 9, 100)),
    {"observed_layers": 9, "min_layer": 3},
    *({"window_size": size} for size in (9, 1000)),
    {"window_size": 9, "method": "full", "decode_budget": 64},
    *({"kv_budget": 64, "method": method} for method in ("snapkv", "h2o", "streaming")),
    {"kv_budget": 64},
    {"decode_floor": 64},
    {"method": "pyramidinfer"},
]


@pytest.mark.parametrize("kind", LIKE)
@pytest.mark.parametrize("changes", BAD, ids=str)
def test_what_a_refusal_says_works_does(kind: str, changes: dict[str, Any]) -> None:
    """Each choice that it names, alone."""
    shape = LIKE[kind]
    try:
        override_for(scaled_defaults(shape), changes, shape)
    except InvalidSetting as error:
        choices = suggested(error)
        if "without decode_budget" in str(error):
            changes = {k: v for k, v in changes.items() if not k.startswith("decode_")}
        assert choices, error
        for choice in choices:
            override_for(scaled_defaults(shape), changes | choice, shape)


def test_the_latest_layer_goes_up_with_the_first_to_a_full_one() -> None:
    shape = LIKE["gemma3"]
    assert override_for(scaled_defaults(shape), {"min_layer": 12}, shape).latest_layer == 17


def suggested(error: InvalidSetting) -> list[dict[str, Any]]:
    if nearest := _NEAREST.search(error.message):
        return [{str(error.param): int(nearest[1])}]
    if "method fastkv or asl works" in error.message:
        return [{"method": "fastkv"}, {"method": "asl"}]
    if "method full" in error.message:
        return [{"method": "full"}]
    found = re.findall(r"(\w+_\w+) (\d+)(?: works|$)", error.message)
    return [{name: int(value)} for name, value in found]


def test_a_full_layer_is_named_with_its_place_where_not_all_are_full() -> None:
    assert [GEMMA.layer_name(idx) for idx in (5, 6)] == ["5, full layer 2 of 3", "6"]
    assert shape_of(4).layer_name(2) == "2"
