"""Winnow: long-context LLM completion with prompt pruning. See README.md."""

from importlib import import_module
from typing import TYPE_CHECKING

from winnow.errors import WinnowError
from winnow.grammar import Grammar
from winnow.pruning_settings import PruningSettings
from winnow.sampling_params import SamplingParams

if TYPE_CHECKING:
    from winnow.batch import BatchJob
    from winnow.completion import Completion
    from winnow.local import Winnow

__version__ = "0.1.0"

__all__ = [
    "BatchJob",
    "Completion",
    "Grammar",
    "PruningSettings",
    "SamplingParams",
    "Winnow",
    "WinnowError",
]

# Imported on first use, since these modules load torch and transformers.
_LAZY = {
    "BatchJob": "winnow.batch",
    "Completion": "winnow.completion",
    "Winnow": "winnow.local",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'winnow' has no attribute {name!r}")
