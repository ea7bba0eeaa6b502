"""Methods and budgets as they are asked for on the command line: `asl:threshold=0.4`, `64,128`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import yaml

from winnow.errors import InvalidSetting
from winnow.methods import METHODS
from winnow.request import PruningSettings

UNPRUNED = "full"
_OPTIONS = sorted({field.name for field in fields(PruningSettings)} - {"method"})


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """`text` as it was asked for; `options` are fields of PruningSettings."""

    text: str
    method: str
    options: MappingProxyType[str, Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """A method at a budget, which is both select_tokens and kv_budget; none for `full`."""

    spec: MethodSpec
    budget: int | None

    @property
    def method(self) -> str:
        """The method as it was asked for, with its options."""
        return self.spec.text

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of PruningSettings over the model's own; an option wins over the budget."""
        sizes = {} if self.budget is None else dict.fromkeys(_SIZES, self.budget)
        return {"method": self.spec.method} | sizes | dict(self.spec.options)

    def __str__(self) -> str:
        return self.method if self.budget is None else f"{self.method} at {self.budget:,}"


_SIZES = ("select_tokens", "kv_budget")


def make_variants(specs: Sequence[MethodSpec], budgets: Sequence[int]) -> tuple[Variant, ...]:
    """Every method at every budget; what prunes nothing once."""
    return tuple(
        Variant(spec, budget)
        for spec in specs
        for budget in ([None] if spec.method == UNPRUNED else budgets)
    )


def parse_methods(text: str) -> tuple[MethodSpec, ...]:
    """`name` or `name:option=value:option=value`, separated by commas.

    Raises InvalidSetting for a method or an option that does not exist.
    """
    return tuple(_parse_method(part) for part in parse_list("methods", text))


def parse_list(name: str, text: str) -> list[str]:
    """The parts between commas, each once; raises InvalidSetting if there is none."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise InvalidSetting(f"--{name} {text!r} names nothing", param=name)
    return parts


def _parse_method(text: str) -> MethodSpec:
    method, *assignments = text.split(":")
    if method not in METHODS:
        raise InvalidSetting(
            f"method {method!r} is not known; known are {', '.join(METHODS)}", param="methods"
        )
    options = dict(_parse_option(text, assignment) for assignment in assignments)
    return MethodSpec(text, method, MappingProxyType(options))


def _parse_option(method: str, assignment: str) -> tuple[str, Any]:
    name, equals, value = assignment.partition("=")
    if not equals or name not in _OPTIONS:
        raise InvalidSetting(
            f"method {method!r}: {assignment!r} is not OPTION=VALUE; "
            f"options are {', '.join(_OPTIONS)}",
            param="methods",
        )
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InvalidSetting(
            f"method {method!r}: {value!r} is not a value", param="methods"
        ) from error
