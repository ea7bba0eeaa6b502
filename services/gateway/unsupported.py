"""Parameters of OpenAI's API that Winnow does not carry out: refused by name, never ignored.

A value that asks for nothing (the API's default) is let through, since many clients send it.
"""

from collections.abc import Mapping
from typing import Any

from winnow.errors import UnsupportedParameter

_COMMON: Mapping[str, tuple[Any, ...]] = {
    "metadata": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_key": (),
    "safety_identifier": (),
}

COMPLETION_PARAMETERS: Mapping[str, tuple[Any, ...]] = {
    **_COMMON,
    "suffix": ("",),
    "best_of": (1,),
}

CHAT_PARAMETERS: Mapping[str, tuple[Any, ...]] = {
    **_COMMON,
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def without_unsupported(
    body: Mapping[str, Any], parameters: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """`body` without the unsupported parameters that ask for nothing.

    parameters: for each the values, besides null, that ask for nothing.
    Raises UnsupportedParameter for one that asks for something.
    """
    for name, harmless in parameters.items():
        value = body.get(name)
        if value is not None and not any(_same(value, one) for one in harmless):
            raise UnsupportedParameter(f"{name} is not supported by Winnow", param=name)
    return {name: value for name, value in body.items() if name not in parameters}


def _same(value: object, other: object) -> bool:
    """Equal, with True and 1 told apart."""
    return type(value) is type(other) and value == other
