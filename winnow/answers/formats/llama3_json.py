"""The form of Llama 3: a JSON object with name and parameters, alone or after <|python_tag|>."""

from collections.abc import Mapping, Sequence

from winnow.answers.call_syntax import CallSyntax
from winnow.answers.formats.base import ToolFormat

PYTHON_TAG = "<|python_tag|>"


class Llama3Json(ToolFormat):
    """Several calls are parted by semicolons; the model is not asked for more than one."""

    name = "llama3_json"
    arguments_key = "parameters"
    markers = (PYTHON_TAG,)
    syntax = CallSyntax(opens=(PYTHON_TAG,), bare=True)

    def _sequence(self, objects: Sequence[str]) -> str:
        return "; ".join(objects)

    def _rule(self, marks: Mapping[str, str], parallel: bool) -> str:
        return "call_one"
