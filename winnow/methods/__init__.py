"""How a prompt is pruned. One method, one file.

To add a method: write its file (a subclass of `winnow.methods.base.Method`), add its line to
METHODS and its row to the README's table; the tests that are shared by all methods run it.
Nothing is imported here, so that names can be checked without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from winnow.kv import ModelShape
    from winnow.methods.base import Method
    from winnow.request import PruningSettings

# name: file and class
METHODS = {
    "full": "full:Full",
    "snapkv": "snapkv:SnapKV",
    "fastkv": "fastkv:FastKV",
    "gemfilter": "gemfilter:GemFilter",
    "pyramidinfer": "pyramidinfer:PyramidInfer",
    "streaming": "streaming:Streaming",
    "h2o": "h2o:H2O",
    "asl": "asl:Asl",
    "asl-2pass": "asl_2pass:AslTwoPass",
}


def method_class(name: str) -> "type[Method]":
    """The class of the method called `name`, one of METHODS."""
    file, _, class_name = METHODS[name].partition(":")
    cls: type[Method] = getattr(import_module(f"winnow.methods.{file}"), class_name)
    return cls


def create(settings: "PruningSettings", num_tokens: int, shape: "ModelShape") -> "Method":
    """The method of `settings` for one prompt of `num_tokens` tokens."""
    return method_class(settings.method)(settings, num_tokens, shape)
