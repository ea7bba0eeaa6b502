"""Registry of methods and rules: each name that a setting may take, and its `module:class`.

To add a method or a rule: write its file and add its line here; docs/methods.md has the recipe.
Modules are imported by `load` only, so that names can be checked without loading torch.
"""

from importlib import import_module
from typing import Any

METHODS = {
    "full": "winnow.methods.full:Full",
    "snapkv": "winnow.methods.snapkv:SnapKV",
    "fastkv": "winnow.methods.fastkv:FastKV",
    "gemfilter": "winnow.methods.gemfilter:GemFilter",
    "pyramidinfer": "winnow.methods.pyramidinfer:PyramidInfer",
    "streaming": "winnow.methods.streaming:Streaming",
    "h2o": "winnow.methods.h2o:H2O",
    "asl": "winnow.methods.asl:Asl",
    "asl-2pass": "winnow.methods.asl_2pass:AslTwoPass",
}
COMPRESSIONS = {
    "snapkv": "winnow.compression.snapkv:SnapKVRule",
    "top_p": "winnow.compression.top_p:TopPRule",
    "adakv": "winnow.compression.adakv:AdaKVRule",
    "none": "winnow.compression.base:KeepAll",
}
RECOMPRESSIONS = {
    "snapkv": "winnow.compression.snapkv:SnapKVRecompression",
    "rkv": "winnow.compression.rkv:RKVRecompression",
}


def load(path: str) -> Any:  # noqa: ANN401 - the caller's table says which class
    """Import the class that a registry entry names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
