"""The form of gpt-oss: a message to the function, in the channel for such."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from winnow.answers.call_syntax import CallSyntax
from winnow.answers.channels import (
    CALL,
    CALLED_IN,
    CHANNEL,
    CONSTRAIN,
    MESSAGE,
    ROLE,
    START,
    call_header,
)
from winnow.answers.formats.base import ToolFormat, arguments_text


class Harmony(ToolFormat):
    """A call ends the answer; the model is not asked for more than one."""

    name = "harmony"
    in_final = False
    markers = (CHANNEL, CONSTRAIN, MESSAGE)
    syntax = CallSyntax(
        opens=(CHANNEL,),
        named=re.compile(
            rf"{re.escape(CALLED_IN)}([\w.-]+) {re.escape(f'{CONSTRAIN}json{MESSAGE}')}\s*",
            re.ASCII,
        ),
    )

    def _object(self, function: Mapping[str, Any]) -> str:
        return f"{call_header(function['name'])}{arguments_text(function)}"

    def _sequence(self, objects: Sequence[str]) -> str:
        return f"{CALL}{START}{ROLE}".join(objects)

    def _rule(self, marks: Mapping[str, str], parallel: bool) -> str:
        return "call_one"

    def _around(self, name: str, marks: Mapping[str, str]) -> tuple[str, str]:
        channel = json.dumps(f"{CALLED_IN}{name} ")
        return f'{marks[CHANNEL]} {channel} {marks[CONSTRAIN]} "json" {marks[MESSAGE]}', ""
