"""The form of Hermes and Qwen: <tool_call>, a JSON object on a line of its own, </tool_call>."""

from collections.abc import Mapping, Sequence

from winnow.answers.call_syntax import CallSyntax
from winnow.answers.formats.base import ToolFormat

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ToolFormat):
    name = "hermes"
    markers = (OPEN, CLOSE)
    syntax = CallSyntax(opens=(OPEN,), close=CLOSE)

    def _sequence(self, objects: Sequence[str]) -> str:
        return "\n".join(f"{OPEN}\n{one}\n{CLOSE}" for one in objects)

    def _rule(self, marks: Mapping[str, str], parallel: bool) -> str:
        call = f'{marks[OPEN]} "\\n" call_one "\\n" {marks[CLOSE]}'
        return f'{call} ("\\n" {call})*' if parallel else call
