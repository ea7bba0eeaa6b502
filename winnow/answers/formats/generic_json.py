"""A form for any model that is told of it: a JSON object with name and arguments, or a list."""

from collections.abc import Mapping, Sequence

from winnow.answers.call_syntax import CallSyntax
from winnow.answers.formats.base import ToolFormat


class GenericJson(ToolFormat):
    """Calls are all of an answer. Many models put them into a block of Markdown."""

    name = "json"
    syntax = CallSyntax(bare=True, starts=("```json",), close="```")

    def _sequence(self, objects: Sequence[str]) -> str:
        return objects[0] if len(objects) == 1 else f"[{', '.join(objects)}]"

    def _rule(self, marks: Mapping[str, str], parallel: bool) -> str:
        return 'call_one | "[" call_one (", " call_one)* "]"' if parallel else "call_one"
