"""Winnow: long-context completions with the prompt pruned on the way. See README.md."""

from importlib import import_module
from typing import TYPE_CHECKING

from winnow.errors import WinnowError
from winnow.request import PruningSettings, SamplingParams

if TYPE_CHECKING:
    from winnow.local import Completion, Winnow

__all__ = ["Completion", "PruningSettings", "SamplingParams", "Winnow", "WinnowError"]


def __getattr__(name: str) -> object:
    """`Winnow` and `Completion` load torch and transformers, so they are imported when used."""
    if name in ("Completion", "Winnow"):
        return getattr(import_module("winnow.local"), name)
    raise AttributeError(f"module 'winnow' has no attribute {name!r}")
