"""RequestLimits that are known before any request comes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.common.settings import Settings
from services.gateway.access.request_limits import RequestLimits
from services.gateway.served_model import ServedModel
from winnow.errors import InvalidSetting, PromptTooLong, UnknownModel, UnusableModel

PRUNING = {"window_size": 8, "observed_layers": 2, "min_layer": 1}


def limits(model_path: Path, **changes: Any) -> RequestLimits:
    settings = Settings(**({"model": str(model_path), "pruning": PRUNING} | changes))
    return RequestLimits(settings, ServedModel.load(settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_kv_budget": 512}, "kv_budget is 2,048; the operator's cap max_kv_budget is 512"),
        ({"max_select_tokens": 99}, "the operator's cap max_select_tokens is 99"),
        ({"max_decode_budget": 512}, "decode_budget is unlimited; the operator's cap"),
        ({"pruning": {"min_layer": 9, "observed_layers": 2}}, "min_layer is 9; the allowed range"),
        ({"pruning": {"kv_budget": 8, "window_size": 8}}, "it must be above window_size, 8"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs has 'messages'"),
        ({"generation_config": "nowhere"}, "generation_config is 'nowhere'; it must be auto, none"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_the_start(
    model_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidSetting, match=message):
        limits(model_path, **changes)


def test_a_broken_model_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UnusableModel, match=r"no config\.json"):
        limits(tmp_path)


def test_aliases_are_names_of_the_model(model_path: Path) -> None:
    ours = limits(model_path, model_name="own", model_aliases="gpt-5, claude-opus")
    for name in ("own", "gpt-5", "claude-opus"):
        ours.require_model(name)
    any_name = limits(model_path, model_aliases="*")
    any_name.require_model("m" * 256)
    for name in ("", "m" * 257):
        with pytest.raises(UnknownModel):
            any_name.require_model(name)
    for name in ("claude", "*", "gpt-5, claude-opus"):
        with pytest.raises(UnknownModel, match="served is 'own'"):
            ours.require_model(name)
    limits(model_path, model_aliases="gpt-5,*").require_model("anything")


def test_a_prompt_leaves_room_for_at_least_one_token(model_path: Path) -> None:
    assert limits(model_path, max_prompt_tokens=10**6).max_prompt_tokens == 8191


def test_default_length_is_what_context_and_operator_leave(model_path: Path) -> None:
    ours = limits(model_path, max_new_tokens=500)
    assert ours.max_tokens(None, None, 100, "max_tokens") == 500
    assert ours.max_tokens(None, None, 8000, "max_tokens") == 192
    assert ours.max_tokens(None, 16, 8190, "max_tokens") == 2


@pytest.mark.parametrize("asked", [501, 10**9])
def test_too_many_tokens_are_refused_by_default_and_clamped_where_the_operator_says(
    model_path: Path, asked: int
) -> None:
    refusing = limits(model_path, max_new_tokens=500)
    with pytest.raises(InvalidSetting, match="the allowed range is 1 to 500"):
        refusing.max_tokens(asked, None, 100, "max_tokens")
    clamping = limits(model_path, max_new_tokens=500, max_tokens_policy="clamp")
    assert clamping.max_tokens(asked, None, 100, "max_tokens") == 500
    assert clamping.max_tokens(7, None, 100, "max_tokens") == 7


def test_clamping_also_fits_an_answer_into_the_context(model_path: Path) -> None:
    refusing = limits(model_path)
    with pytest.raises(PromptTooLong, match="make 8,193; the model's limit is 8,192"):
        refusing.max_tokens(193, None, 8000, "max_tokens")
    clamping = limits(model_path, max_tokens_policy="clamp")
    assert clamping.max_tokens(193, None, 8000, "max_tokens") == 192
    assert clamping.max_tokens(4096, None, 8191, "max_tokens") == 1


def test_clamping_makes_no_tokens_of_none(model_path: Path) -> None:
    clamping = limits(model_path, max_tokens_policy="clamp")
    for asked in (0, -1):
        with pytest.raises(InvalidSetting, match="the allowed range is 1 to 4,096"):
            clamping.max_tokens(asked, None, 8, "max_tokens")


def test_the_longest_answer_is_the_operators_or_the_models(model_path: Path) -> None:
    assert limits(model_path, max_new_tokens=500).max_output_tokens == 500
    assert limits(model_path, max_new_tokens=10**6).max_output_tokens == 8191


def test_a_text_far_over_the_limit_is_not_tokenized_whole(model_path: Path) -> None:
    ours = limits(model_path, max_prompt_tokens=10)
    with pytest.raises(PromptTooLong, match="at least 60 tokens; the limit is 10"):
        ours.encode("z" * 10_000_000, "prompt")


def test_a_long_text_of_few_tokens_is_measured_whole(model_path: Path) -> None:
    ours = limits(model_path, max_prompt_tokens=3)
    text = " jumps jumps jumps"  # one token each, 18 characters
    assert len(ours.encode(text, "prompt")) == 3
    with pytest.raises(PromptTooLong, match="prompt has 4 tokens; the limit is 3"):
        ours.encode(text + " the", "prompt")


def test_the_gateway_imports_no_engine_and_no_model_code() -> None:
    code = (
        "import sys, services.gateway.rest.api, services.gateway.grpc.server\n"
        "heavy = ('winnow.models', 'winnow.engine', 'winnow.local', 'ray')\n"
        "print(*(name for name in sys.modules if name.startswith(heavy)))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output == "\n"
