"""The forms of Mistral: [TOOL_CALLS] and a list of JSON objects, or name, [ARGS], arguments."""

import hashlib
import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence

from winnow.answers.call_syntax import CallSyntax
from winnow.answers.formats.base import Call, ToolFormat, arguments_text

OPEN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_ID = re.compile("[A-Za-z0-9]{9}")
_NAMED = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*", re.ASCII)
_ID_CHARS = string.ascii_letters + string.digits


class Mistral(ToolFormat):
    """named: the newer form. has_id: in which an id follows the name."""

    name = "mistral"
    markers = (OPEN, CALL_ID, ARGS)
    syntax = CallSyntax(opens=(OPEN,), named=_NAMED)

    def __init__(self, *, named: bool = False, has_id: bool = False) -> None:
        self._named = named
        self._has_id = has_id

    def new_id(self) -> str:
        return "".join(secrets.choice(_ID_CHARS) for _ in range(9))

    def template_id(self, call_id: str) -> str:
        """The templates refuse ids other than nine letters and digits."""
        if _ID.fullmatch(call_id):
            return call_id
        return hashlib.sha256(call_id.encode()).hexdigest()[:9]

    def _sequence(self, objects: Sequence[str]) -> str:
        return f"{OPEN}[{', '.join(objects)}]"

    def written(self, calls: Sequence[Call]) -> str:
        if not self._named:
            return super().written(calls)
        functions = [call["function"] for call in calls]
        return "".join(f"{OPEN}{one['name']}{ARGS}{arguments_text(one)}" for one in functions)

    def _rule(self, marks: Mapping[str, str], parallel: bool) -> str:
        if self._named:
            return "call_one+" if parallel else "call_one"
        more = '(", " call_one)*' if parallel else ""
        return f'{marks[OPEN]} "[" call_one {more} "]"'

    def _around(self, name: str, marks: Mapping[str, str]) -> tuple[str, str]:
        if not self._named:
            return super()._around(name, marks)
        call_id = f"{marks[CALL_ID]} /[A-Za-z0-9]{{9}}/ " if self._has_id else ""
        return f"{marks[OPEN]} {json.dumps(name)} {call_id}{marks[ARGS]}", ""
