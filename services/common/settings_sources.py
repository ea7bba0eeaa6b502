"""Where settings come from.

Command-line flags override `WINNOW_*` variables, which override a YAML file, which overrides the
defaults. Unknown or invalid ones are refused with a one-line error.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource
from pydantic_settings.exceptions import SettingsError

from services.common.settings import Settings
from winnow.errors import InvalidSetting

MAPS = ("pruning", "chat_template_kwargs")  # their entries from all sources are merged

_ENV_PREFIX = "WINNOW_"
_CONFIG_VARIABLE = "WINNOW_CONFIG"


class _Environment(BaseSettings, Settings):  # type: ignore[misc]  # both configure pydantic
    """The fields of `Settings`, for pydantic-settings to read from environment variables."""


def load_settings(flags: Mapping[str, Any] | None = None, config: Path | None = None) -> Settings:
    """The settings of this process; `config` is the YAML file (default: $WINNOW_CONFIG).

    Raises InvalidSetting, with a one-line message, for anything unknown, malformed or out of range.
    """
    _refuse_unknown_variables()
    if config is None and os.environ.get(_CONFIG_VARIABLE):
        config = Path(os.environ[_CONFIG_VARIABLE])
    sources = [_read_file(config) if config else {}, _read_environment(), dict(flags or {})]
    merged = {name: value for source in sources for name, value in source.items()}
    for name in MAPS:
        if all(isinstance(source.get(name, {}), dict) for source in sources):
            merged[name] = {k: v for s in sources for k, v in s.get(name, {}).items()}
    try:
        return Settings(**merged)
    except ValidationError as error:
        raise _one_line(error) from error


def _refuse_unknown_variables() -> None:
    known = {_ENV_PREFIX + name.upper() for name in Settings.model_fields} | {_CONFIG_VARIABLE}
    for name in sorted(os.environ):
        if name.upper().startswith(_ENV_PREFIX) and name.upper() not in known:
            raise InvalidSetting(f"{name} is not a setting of Winnow; see winnow serve --help")


def _read_environment() -> dict[str, Any]:
    source = EnvSettingsSource(_Environment, env_prefix=_ENV_PREFIX, env_parse_none_str="null")
    try:
        return source()
    except SettingsError as error:
        raise InvalidSetting(f"the environment is malformed: {error}") from error


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InvalidSetting(f"settings file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # Neither the error's text nor the error as a cause: it quotes the line, passwords included.
        raise InvalidSetting(f"settings file {path} is not YAML{_where(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InvalidSetting(f"settings file {path} must map names to values")
    return content


def _where(error: Exception) -> str:
    """Line, column and problem, if PyYAML reports them."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return ""
    mark = error.problem_mark
    return f": line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def _one_line(error: ValidationError) -> InvalidSetting:
    """The first validation error, with the setting's name and value."""
    first = error.errors(include_url=False, include_context=False)[0]
    if not first["loc"]:
        return InvalidSetting(first["msg"].removeprefix("Value error, "))
    name = ".".join(str(part) for part in first["loc"][:1])
    if first["type"] == "extra_forbidden":
        return InvalidSetting(f"{name} is not a setting of Winnow; see winnow serve --help")
    value = "" if name == "redis_url" else f" is {first['input']!r}"
    reason = first["msg"].removeprefix("Value error, ")
    return InvalidSetting(f"setting {name}{value}: {reason}", param=name)
