"""Pruning methods. One file per method.

To add a method: write its file (a subclass of `winnow.methods.base.Method`), add its line to
winnow/catalog.py and its row to the table in docs/methods.md, which has the recipe. The tests
shared by all methods run it.
"""

from typing import TYPE_CHECKING

from winnow.catalog import METHODS, load

if TYPE_CHECKING:
    from winnow.kv import ModelShape
    from winnow.methods.base import Method
    from winnow.pruning_settings import PruningSettings


def method_class(name: str) -> "type[Method]":
    """The class of the method `name`, one of METHODS."""
    cls: type[Method] = load(METHODS[name])
    return cls


def create(settings: "PruningSettings", num_tokens: int, shape: "ModelShape") -> "Method":
    """Create the method of `settings` for one prompt of `num_tokens` tokens."""
    return method_class(settings.method)(settings, num_tokens, shape)
