import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from transformers import AutoConfig

import winnow
from tests.winnow.shapes import CHUNKED, SLIDING, shape_of
from winnow.defaults import override, parse_change, pruning_defaults, scaled_defaults
from winnow.errors import InvalidSetting, UnusableModel
from winnow.layers import FULL, Layer
from winnow.model_files import ModelDescription, describe_model
from winnow.pruning_settings import PruningSettings


@pytest.mark.parametrize("num_layers", range(1, 81))
def test_defaults_fit_every_depth(num_layers: int) -> None:
    settings = scaled_defaults(shape_of(num_layers))
    settings.require_fits(shape_of(num_layers))
    if num_layers >= 28:
        assert replace(settings, latest_layer=None) == PruningSettings()


LAYERS = {
    "gemma2": [SLIDING, FULL] * 13,
    "gemma3": ([SLIDING] * 5 + [FULL]) * 10 + [SLIDING] * 2,
    "gemma3 270m": ([SLIDING] * 5 + [FULL]) * 3,
    "qwen3_next": [Layer(None, is_recurrent=True)] * 3 + [FULL],
    "llama4": ([CHUNKED] * 3 + [FULL]) * 12,
    "one": [SLIDING] * 5 + [FULL],
    "first": [FULL, *[SLIDING] * 9],
}


@pytest.mark.parametrize("name", LAYERS)
def test_defaults_name_full_layers_where_others_are_between(name: str) -> None:
    shape = shape_of(LAYERS[name])
    settings = scaled_defaults(shape)
    settings.require_fits(shape)
    replace(settings, method="fastkv").require_fits(shape)
    assert settings.latest_layer in shape.full_layers
    assert len(shape.full_layers) == 1 or settings.observed_layers > 1


def test_defaults_are_at_the_depth_of_a_model_with_full_layers_alone() -> None:
    settings = scaled_defaults(shape_of(LAYERS["gemma3"]))  # of 62 layers
    assert (settings.observed_layers, settings.min_layer) == (2, 17)
    assert (settings.fixed_layer, settings.latest_layer) == (29, 41)
    assert settings.window_size == 8, "no longer than the layers' own"


def test_without_full_layers_nothing_is_pruned_by_default() -> None:
    shape = shape_of([SLIDING] * 30)
    assert scaled_defaults(shape).method == "full"
    scaled_defaults(shape).require_fits(shape)


@pytest.mark.parametrize(("num_layers", "latest"), [(1, 0), (4, 2), (12, 8), (30, 19), (48, 30)])
def test_some_layer_selects_by_default(num_layers: int, latest: int) -> None:
    assert scaled_defaults(shape_of(num_layers)).latest_layer == latest


FAMILIES = json.loads((Path(winnow.__file__).parent / "families.json").read_text())


def description_of(folder: Path, **config: Any) -> ModelDescription:
    """Of a folder that has only a configuration."""
    AutoConfig.for_model(**({"model_type": "llama"} | config)).save_pretrained(folder)
    save_file({}, folder / "model.safetensors")
    return describe_model(folder)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family["name"])
def test_a_family_has_settings_of_its_own(family: dict[str, Any], tmp_path: Path) -> None:
    description = description_of(tmp_path, **family["config"], eos_token_id=[1, 2])
    settings = pruning_defaults(description)
    settings.require_fits(description.shape)
    assert family["settings"].items() <= asdict(settings).items()
    assert (Path(winnow.__file__).parents[1] / family["source"]).is_file()
    (tmp_path / "winnow.json").write_text('{"kernel_size": 5}')
    assert pruning_defaults(description).kernel_size == 5


@pytest.mark.parametrize(
    "other",
    [
        {"hidden_size": 1152},
        {"vocab_size": 49153},
        {"model_type": "qwen2", "num_key_value_heads": 3},
    ],
)
def test_a_model_of_another_size_has_the_scaled_settings(
    other: dict[str, Any], tmp_path: Path
) -> None:
    description = description_of(tmp_path, **(FAMILIES[0]["config"] | other))
    assert pruning_defaults(description) == scaled_defaults(shape_of(30))


def test_the_log_recommends_calibration_where_nothing_was_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    unknown = description_of(tmp_path / "unknown", num_hidden_layers=12)
    pruning_defaults(unknown)
    assert (
        "with kernel_size 7, which lost answers on small models: `winnow calibrate`" in caplog.text
    )
    caplog.clear()
    pruning_defaults(description_of(tmp_path / "family", **FAMILIES[0]["config"]))
    (unknown.folder / "winnow.json").write_text("{}")
    pruning_defaults(unknown)
    assert not caplog.text


def test_the_latest_layer_goes_up_with_the_first_unless_it_is_named() -> None:
    settings = scaled_defaults(shape_of(30))
    assert override(settings, {"min_layer": 25}).latest_layer == 25
    assert override(settings, {"min_layer": 12}).latest_layer == 19
    with pytest.raises(InvalidSetting, match="latest_layer is 20; it must be at least min_layer"):
        override(settings, {"min_layer": 25, "latest_layer": 20})


def test_the_model_folder_comes_before_the_scaled_defaults(tmp_path: Path) -> None:
    (tmp_path / "winnow.json").write_text(json.dumps({"kv_budget": 100, "min_layer": 4}))
    settings = pruning_defaults(description_of(tmp_path, num_hidden_layers=12))
    assert (settings.kv_budget, settings.min_layer) == (100, 4)
    assert settings.observed_layers == scaled_defaults(shape_of(12)).observed_layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "winnow.json"),
        ('{"kv_bugdet": 3}', "kv_bugdet is not a pruning setting; known are .*kv_budget"),
        ('{"kv_budget": 32}', "kv_budget is 32; it must be above window_size, 32"),
        ('{"min_layer": 12}', r"min_layer is 12; the allowed range is \[0, 11\]"),
        ("[1]", "winnow.json"),
        ("[]", "winnow.json"),
        ("null", "winnow.json"),
    ],
)
def test_a_broken_settings_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "winnow.json").write_text(text)
    with pytest.raises(UnusableModel, match=message):
        pruning_defaults(description_of(tmp_path, num_hidden_layers=12))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method is 'magic'; known are full, snapkv, fastkv, "),
        ({"compression": "zip"}, "compression is 'zip'"),
        ({"latest_layer": 9}, "latest_layer is 9; it must be at least min_layer, 10"),
        ({"kernel_size": 4}, "kernel_size is 4; it must be odd"),
        ({"decode_budget": 5}, "decode_budget is 5; it must be above window_size, 32"),
        ({"select_tokens": 32}, "select_tokens is 32; it must be above window_size, 32"),
        ({"kv_top_p": 0}, r"kv_top_p is 0; the allowed range is \(0, 1\]"),
        ({"kv_budget": "many"}, "kv_budget is 'many'; it must be a whole number or null"),
        ({"kv_budget": 64.5}, "kv_budget is 64.5; it must be a whole number or null"),
        ({"kv_budget": 2**31}, r"kv_budget is 2147483648; .* \[1, 2147483647\]"),
        ({"decode_budget": 5 * 10**9}, r"decode_budget is 5000000000; .* \[1, 2147483647\]"),
        ({"select_tokens": None}, "select_tokens is None; it must be a whole number"),
        ({"window_size": 8.0}, "window_size is 8.0; it must be a whole number"),
        ({"min_layer": True}, "min_layer is True; it must be a whole number"),
        ({"threshold": "low"}, "threshold is 'low'; it must be a number"),
        ({"threshold": False}, "threshold is False; it must be a number"),
        ({"method": 3}, "method is 3; it must be a word"),
        ({"full_kv_below": "no"}, "full_kv_below is 'no'; it must be true or false"),
        ({"full_kv_below": 1}, "full_kv_below is 1; it must be true or false"),
        ({"recompression": "zip"}, "recompression is 'zip'; known are snapkv, rkv"),
        ({"redundancy_weight": 1.5}, r"redundancy_weight is 1.5; the allowed range is \[0, 1\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        override(PruningSettings(), changes)


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("threshold=0.4", ("threshold", 0.4)),
        ("kv-budget=64", ("kv_budget", 64)),
        ("latest_layer=null", ("latest_layer", None)),
        ("full_kv_below=true", ("full_kv_below", True)),
        ("method=asl-2pass", ("method", "asl-2pass")),
        ("threshold=", ("threshold", None)),
    ],
)
def test_a_change_is_read_as_yaml(text: str, change: tuple[str, object]) -> None:
    assert parse_change(text) == change


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("threshold", "threshold: a pruning setting must be NAME=VALUE"),
        ("threshold={a", "'{a' is not a value for threshold"),
        ("threshold=[1]", r"'\[1\]' is not a value for threshold"),
        ("threshold=2026-02-30", "'2026-02-30' is not a value for threshold"),
        ("threshold=2026-02-20", "'2026-02-20' is not a value for threshold"),
    ],
)
def test_what_is_no_change_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        parse_change(text)
