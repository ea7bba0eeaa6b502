import argparse
from collections.abc import Iterable, Mapping

import pytest

from services.cli.flags import (
    DECODE_GROUPS,
    SERVE_GROUPS,
    add_settings_flags,
    settings_from_flags,
)
from services.common.settings import Settings
from services.common.settings_sources import load_settings
from winnow.errors import InvalidSetting


def named(groups: Mapping[str, Iterable[str]]) -> set[str]:
    return {name for names in groups.values() for name in names}


def test_serve_has_a_flag_for_every_setting_but_the_secret_one() -> None:
    assert set(Settings.model_fields) - named(SERVE_GROUPS) == {"redis_url"}


def test_what_decode_takes_serve_takes_too() -> None:
    assert named(DECODE_GROUPS) <= named(SERVE_GROUPS)


def test_what_is_no_variable_of_a_template_is_refused() -> None:
    parser = argparse.ArgumentParser()
    add_settings_flags(parser, SERVE_GROUPS)
    args = parser.parse_args(["--chat-template-kwargs", "enable_thinking"])
    with pytest.raises(InvalidSetting, match="enable_thinking: a template's variable must be NAME"):
        settings_from_flags(args)


def test_a_flag_becomes_its_setting() -> None:
    parser = argparse.ArgumentParser()
    add_settings_flags(parser, SERVE_GROUPS)
    args = parser.parse_args(["--kv-overcommit", "2", "--pruning", "kv_budget=64"])
    assert settings_from_flags(args) == {"kv_overcommit": "2", "pruning": {"kv_budget": 64}}
    chat = ["--chat-template-kwargs", "enable-thinking=false", "--chat-template-kwargs", "style=a"]
    args = parser.parse_args([*chat, "--allow-special-tokens", "true", "--dequantize"])
    assert load_settings(settings_from_flags(args)).model_dump(exclude_defaults=True) == {
        "chat_template_kwargs": {"enable_thinking": False, "style": "a"},
        "allow_special_tokens": True,
        "dequantize": True,
    }
