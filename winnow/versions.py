"""Frozen dataclasses with slots that processes of two versions send each other, as pickles."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any


def set_fields(instance: Any, values: Sequence[Any]) -> None:  # noqa: ANN401 - any such dataclass
    """A dataclass's `__setstate__`, to be assigned in its body.

    New fields come last and have defaults: an older sender's values are fewer, a newer one's more.
    """
    for idx, field in enumerate(fields(instance)):
        value = values[idx] if idx < len(values) else field.default
        object.__setattr__(instance, field.name, value)
