"""Finding the calls of tools in a text while it is generated.

The reader is a coroutine that is sent one character after the other: it reads like the parser of a
whole text, and is right however the text is split. Nothing here raises, since a model may write
anything. Each character is read once.
"""

import json
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from winnow.answers.call_syntax import BRACKETS, CallSyntax
from winnow.answers.parts import CallArguments, CallStart, Part, TextPart, joined

_SPACE = " \t\r\n"
_SCALAR_ENDS = _SPACE + ",:]}"
# What may stand between two calls, or be one bracket too many.
_BETWEEN_CALLS = _SPACE + ",;]}"
_ARGUMENTS = ("arguments", "parameters")
_NAMES = ("name", "function")
_KEYS = frozenset({*_ARGUMENTS, *_NAMES, "type", "id"})
_NO_ARGUMENTS = "{}"
_MAX_NAMED_CHARS = 128  # of a call by name, up to its arguments

_T = TypeVar("_T")
_Reader: TypeAlias = Generator[None, str, _T]


class CallParser:
    """Parts of one answer: its text, and the calls of known tools in it.

    What proves to be no call is text, as it was. Whitespace beside a call is left out.
    parallel: report all calls, not only the first.
    """

    def __init__(
        self,
        syntax: CallSyntax,
        tool_names: frozenset[str],
        *,
        parallel: bool,
        new_id: Callable[[], str],
    ) -> None:
        self._syntax = syntax
        self._tool_names = tool_names
        self._parallel = parallel
        self._new_id = new_id
        self._num_calls = 0
        self._in_call = False  # its name is told; nothing is held
        self._may_lack_arguments = True
        self._is_whole = False  # the last call's arguments
        self._parts: list[Part] = []
        self._space: list[str] = []  # it is text unless a call follows
        self._held: list[str] = []  # it may become a call
        self._markers = syntax.at_start
        self._skipped = ""
        self._reader = self._read()
        next(self._reader)

    @property
    def in_call(self) -> bool:
        """Whether the last call's arguments have begun and not ended."""
        return self._num_calls > 0 and not self._is_whole

    def feed(self, text: str) -> tuple[Part, ...]:
        """The parts that are certain after this text."""
        for char in text:
            self._reader.send(char)
        return self._taken()

    def finish(self) -> tuple[Part, ...]:
        """The rest, once no more text will come.

        An unfinished call stays as it is. The mere beginning of one is text, unless it is not the
        first.
        """
        held = "".join(self._held)
        if not (self._num_calls and held.startswith(self._syntax.next_call)):
            self._give_back()
        return self._taken()

    def _taken(self) -> tuple[Part, ...]:
        parts, self._parts = joined(self._parts), []
        return parts

    def _read(self) -> _Reader[None]:
        char = yield
        while True:
            marker = yield from self._text(char)
            if marker == self._syntax.close:
                self._held.clear()
                char = yield
            else:
                char = yield from self._call(marker)

    def _text(self, char: str) -> _Reader[str]:
        """Give out text until a marker is complete, which is held; returns the marker."""
        while True:
            if char in self._skipped and not self._held:
                pass
            elif char in _SPACE:
                if self._held:
                    self._give_back()
                self._space.append(char)
            else:
                self._held.append(char)
                self._give_out()
                held = "".join(self._held)
                if held in self._markers:
                    return held
            char = yield

    def _give_out(self) -> None:
        """Give back what cannot be the beginning of a marker."""
        held = "".join(self._held)
        if not any(marker.startswith(held) for marker in self._markers):
            opens = self._syntax.opens
            begins = (i for i in range(1, len(held)) if any(o.startswith(held[i:]) for o in opens))
            begin = next(begins, len(held))
            self._held = list(held[:begin])
            self._give_back()
            self._held = list(held[begin:])

    def _give_back(self) -> None:
        """Make text of what is held. After text, a call begins with one of `opens`."""
        self._parts.append(TextPart("".join(self._space + self._held)))
        self._space.clear()
        self._held.clear()
        self._markers = self._syntax.opens
        self._skipped = ""

    def _call(self, marker: str) -> _Reader[str]:
        """Read one call after a marker; returns the first character after it.

        If it is no call, what is held is text, up to the character that shows it.
        """
        self._may_lack_arguments = not self._syntax.bare or marker in self._syntax.opens
        try:
            if marker in BRACKETS:
                char = self._held.pop()
            else:
                char = yield from self._next()
            if self._syntax.named is not None and char not in BRACKETS:
                char = yield from self._named(char, self._syntax.named)
            else:
                char = yield from self._listed(char)
        except _UnexpectedError as error:
            char = error.char
        if self._in_call:
            self._end_call()
        elif self._held:
            self._give_back()
        return char

    def _listed(self, char: str) -> _Reader[str]:
        """Read a call that may be the first one of a list."""
        if char == "[":
            self._held.append(char)
            char = yield from self._next()
        if char != "{":
            raise _UnexpectedError(char)
        return (yield from self._object(char))

    def _named(self, char: str, pattern: re.Pattern[str]) -> _Reader[str]:
        """Read a call by name from its first character."""
        head = ""
        while char != "{":
            if len(head) == _MAX_NAMED_CHARS:
                raise _UnexpectedError(char)
            self._hold(char)
            head += char
            char = yield
        found = pattern.fullmatch(head)
        if found is None or found[1] not in self._tool_names:
            raise _UnexpectedError(char)
        self._start_call(found[1])
        return (yield from self._value(char, self._tell))

    def _object(self, char: str) -> _Reader[str]:
        """Read a call from its `{`. Its members come in any order, or inside `function`."""
        call = _Call()
        depth = 0
        while True:
            depth += char == "{"
            self._hold(char)  # { or a comma
            char = yield from self._next()
            if char == '"':
                char = yield from self._member(call, char)
                if char == "{":
                    continue
            while char == "}":
                self._hold(char)
                depth -= 1
                if depth == 0:
                    self._complete(call)
                    return (yield)
                char = yield from self._next()
            if char != ",":
                raise _UnexpectedError(char)

    def _member(self, call: "_Call", char: str) -> _Reader[str]:
        """Read a key and its value, or up to the `{` of `function`; returns what comes next."""
        key, char = yield from self._collected(char)
        key = _string_of(key) or ""
        if char != ":" or not (key in _KEYS or self._in_call):
            raise _UnexpectedError(char)
        self._hold(char)
        char = yield from self._next()
        if key == "function" and char == "{":
            return char
        if key in _ARGUMENTS:
            return (yield from self._arguments(call, char))
        value, char = yield from self._collected(char)
        if key in _NAMES and call.name is None:
            call.name = _string_of(value)
            if call.name not in self._tool_names:
                raise _UnexpectedError(char)
            if call.arguments is not None:
                self._complete(call)
        return char

    def _arguments(self, call: "_Call", char: str) -> _Reader[str]:
        """Read the arguments: told as they come, or kept until the name is known."""
        is_next = call.name is not None and not self._in_call
        if is_next:
            self._start_call(call.name or "")
            if char in BRACKETS:
                return (yield from self._value(char, self._tell))
        value, char = yield from self._collected(char)
        call.arguments = _arguments_of(value)
        if is_next:
            self._tell(call.arguments)
            self._is_whole = True
        return char

    def _collected(self, char: str) -> _Reader[tuple[str, str]]:
        """Read a value; returns its text, and what comes next."""
        text: list[str] = []
        char = yield from self._value(char, text.append)
        return "".join(text), char

    def _value(self, char: str, take: Callable[[str], None]) -> _Reader[str]:
        """Read a JSON value from its first character, giving each to `take`.

        Brackets are counted, not matched. Returns the first character after it and whitespace.
        """
        is_scalar = char not in ('"', *BRACKETS)
        depth = 0
        in_string = is_escaped = False
        while not (is_scalar and char in _SCALAR_ENDS):
            self._hold(char)
            take(char)
            if in_string:
                in_string = is_escaped or char != '"'
                is_escaped = char == "\\" and not is_escaped
            elif char == '"':
                in_string = True
            else:
                depth += (char in BRACKETS) - (char in "]}")
            if not (is_scalar or in_string or depth):
                self._is_whole = True
                return (yield from self._next())
            char = yield
        if char in _SPACE:
            self._hold(char)
            char = yield from self._next()
        return char

    def _next(self) -> _Reader[str]:
        """The next character that is not whitespace."""
        while (char := (yield)) in _SPACE:
            self._hold(char)
        return char

    def _hold(self, char: str) -> None:
        if not self._in_call:
            self._held.append(char)

    def _complete(self, call: "_Call") -> None:
        """Tell the call as it is, unless it is being told, or has no name.

        JSON that begins an answer by itself is only a call if it has arguments.
        """
        if call.arguments is None and not self._may_lack_arguments:
            return
        if call.name is not None and not self._in_call:
            self._start_call(call.name)
            self._tell(call.arguments or _NO_ARGUMENTS)
            self._is_whole = True

    def _start_call(self, name: str) -> None:
        self._space.clear()
        self._held.clear()
        self._in_call = True
        self._is_whole = False
        self._num_calls += 1
        self._emit(CallStart(self._num_calls - 1, self._new_id(), name))

    def _tell(self, arguments: str) -> None:
        self._emit(CallArguments(self._num_calls - 1, arguments))

    def _emit(self, part: Part) -> None:
        if self._parallel or self._num_calls == 1:
            self._parts.append(part)

    def _end_call(self) -> None:
        self._in_call = False
        self._markers = self._syntax.after_call
        self._skipped = _BETWEEN_CALLS


@dataclass(slots=True)
class _Call:
    """What is known of a call that is not told yet."""

    name: str | None = None
    arguments: str | None = None


class _UnexpectedError(Exception):
    """No call has this character here."""

    def __init__(self, char: str) -> None:
        super().__init__(char)
        self.char = char


def _string_of(value: str) -> str | None:
    """The string that a JSON value is; None for any other value."""
    if not value.startswith('"'):
        return None
    try:
        text: str = json.loads(value, strict=False)
    except ValueError:
        return None
    return text.encode(errors="replace").decode()  # half of a surrogate pair is no text


def _arguments_of(value: str) -> str:
    """The arguments' text; some models write it into a string, or null for none."""
    text = _string_of(value)
    text = value if text is None else text
    return _NO_ARGUMENTS if text.strip() in ("", "null") else text
