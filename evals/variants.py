"""Variants: methods and budgets from the command line, such as `asl:threshold=0.4`, `64,128`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from winnow.catalog import METHODS
from winnow.defaults import parse_change
from winnow.errors import InvalidSetting
from winnow.pruning_settings import PruningSettings

UNPRUNED = "full"
_LINE_CHARS = 24
_OPTIONS = sorted({field.name for field in fields(PruningSettings)} - {"method"})


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A method with options. text: as given by the user; options: fields of PruningSettings."""

    text: str
    method: str
    options: MappingProxyType[str, Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """A method at a budget, which sets both select_tokens and kv_budget; none for `full`."""

    spec: MethodSpec
    budget: int | None

    @property
    def method(self) -> str:
        """The method as given by the user, with its options."""
        return self.spec.text

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of PruningSettings to override; an option takes precedence over the budget."""
        sizes = {} if self.budget is None else dict.fromkeys(_SIZES, self.budget)
        return {"method": self.spec.method} | sizes | dict(self.spec.options)

    def __str__(self) -> str:
        return self.method if self.budget is None else f"{self.method} at {self.budget:,}"


_SIZES = ("select_tokens", "kv_budget")


def make_variants(specs: Sequence[MethodSpec], budgets: Sequence[int]) -> tuple[Variant, ...]:
    """Every method at every budget; `full` once, without a budget."""
    return tuple(
        Variant(spec, budget)
        for spec in specs
        for budget in ([None] if spec.method == UNPRUNED else budgets)
    )


def parse_methods(text: str) -> tuple[MethodSpec, ...]:
    """Parse comma-separated methods: `name` or `name:option=value:option=value`.

    Raises InvalidSetting for a method or an option that does not exist.
    """
    return tuple(_parse_method(part) for part in parse_list("methods", text))


def parse_list(name: str, text: str) -> list[str]:
    """The comma-separated parts without duplicates; raises InvalidSetting if there are none."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise InvalidSetting(f"--{name} {text!r} names nothing", param=name)
    return parts


def in_lines(method: str) -> str:
    """A method with its options, with a line break before each option that does not fit a line."""
    lines = [""]
    for part in re.split("(?=:)", method):
        if lines[-1] and len(lines[-1] + part) > _LINE_CHARS:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _parse_method(text: str) -> MethodSpec:
    method, *assignments = text.split(":")
    if method not in METHODS:
        raise InvalidSetting(
            f"method {method!r} is not known; known are {', '.join(METHODS)}", param="methods"
        )
    options = dict(_parse_option(text, assignment) for assignment in assignments)
    return MethodSpec(text, method, MappingProxyType(options))


def _parse_option(method: str, assignment: str) -> tuple[str, Any]:
    try:
        name, value = parse_change(assignment)
    except InvalidSetting as error:
        raise InvalidSetting(f"method {method!r}: {error.message}", param="methods") from error
    if name not in _OPTIONS:
        raise InvalidSetting(
            f"method {method!r}: {name} is not an option; options are {', '.join(_OPTIONS)}",
            param="methods",
        )
    return name, value
