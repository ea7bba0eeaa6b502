"""Strings that track, per character, whether a client or the chat template wrote it.

A chat template mixes its own text with a client's. Only the template's own text may become control
tokens, so each character carries a mark of its origin. Slicing, concatenation, joining, stripping
and formatting keep marks exactly; the result of any other operation on marked text is marked as a
whole, so that no mark is lost.
"""

import functools
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex, TypeAlias

Value: TypeAlias = Any  # any value in a template

CLIENT = 1  # a client wrote it
FINAL = 2  # it is text of the last message
_ALL = (CLIENT, FINAL, CLIENT | FINAL)

# Unicode noncharacters, reserved for internal use: marks written into a text while it is formatted,
# and BREAK, which control_tokens.py uses. No marked text contains them.
BREAK = "\ufdd0"
_OPEN = {mark: chr(0xFDD0 + mark) for mark in _ALL}
_CLOSE = "\ufdd4"
_INTERNAL = re.compile(f"[{BREAK}-{_CLOSE}]")
_WRITTEN = re.compile(f"([{_OPEN[CLIENT]}-{_CLOSE}])")
_RUN = re.compile(rb"(.)\1*", re.DOTALL)


class MarkedText(str):
    """A string with a mark per character: a sum of CLIENT and FINAL, 0 for the template's own."""

    __slots__ = ("_marks",)
    _marks: bytes

    def __new__(cls, text: str, marks: bytes | None = None) -> "MarkedText":
        """Without `marks`, all of the text is marked CLIENT."""
        self = super().__new__(cls, text)
        self._marks = bytes([CLIENT]) * len(text) if marks is None else marks
        return self

    @property
    def marks(self) -> bytes:
        return self._marks

    def __str__(self) -> str:
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> "MarkedText":
        if isinstance(key, slice):
            return MarkedText(super().__getitem__(key), self._marks[key])
        return MarkedText(super().__getitem__(key), bytes([self._marks[key]]))

    def __iter__(self) -> Iterator["MarkedText"]:
        return (self[idx] for idx in range(len(self)))

    def lstrip(self, chars: str | None = None) -> "MarkedText":
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None) -> "MarkedText":
        return self[: len(super().rstrip(chars))]

    def strip(self, chars: str | None = None) -> "MarkedText":
        return self.rstrip(chars).lstrip(chars)

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        """Raise TypeError: text decoded from the bytes would have no marks."""
        raise TypeError("a template cannot take the bytes of a message's text")


def plain(text: str) -> str:
    """The text without its marks."""
    return str.__str__(text)


def mark(value: Value, with_mark: int) -> Value:
    """A copy of `value` in which every string is marked, mapping keys included."""
    if isinstance(value, str):
        text = _INTERNAL.sub("\ufffd", value)
        return MarkedText(text, bytes([with_mark]) * len(text))
    if isinstance(value, Mapping):
        return {mark(key, with_mark): mark(one, with_mark) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [mark(one, with_mark) for one in value]
    return value


def joined(parts: Iterable[str]) -> str:
    """The concatenated parts, each character with its mark."""
    parts = list(parts)
    text = "".join(parts)
    if not any(isinstance(part, MarkedText) for part in parts):
        return text
    return MarkedText(text, b"".join(map(_marks_of, parts)))


def _marks_of(text: str) -> bytes:
    return text.marks if isinstance(text, MarkedText) else bytes(len(text))


def carried(result: Value, sources: Value) -> Value:
    """`result`, with every unmarked string marked with all marks found in `sources`."""
    found = {one for text in _texts_in(sources) for one in _ALL if one in text.marks}
    marks = functools.reduce(operator.or_, found, 0)
    return _marked_with(result, marks) if marks else result


def _marked_with(result: Value, marks: int) -> Value:
    if isinstance(result, list | tuple):
        return type(result)(_marked_with(one, marks) for one in result)
    if not isinstance(result, str) or isinstance(result, MarkedText):
        return result
    return MarkedText(result, bytes([marks]) * len(result))


def _texts_in(value: Value) -> Iterator[MarkedText]:
    """The marked texts in a value, keys included."""
    if isinstance(value, MarkedText):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts_in(value.items())
    elif isinstance(value, Collection) and not isinstance(value, str | range):
        for one in value:
            yield from _texts_in(one)


def substituted(operation: Callable[..., Value], *values: Value) -> Value:
    """Apply `operation`; the characters of the result keep the marks of the values they come from.

    operation: formats or joins the values, which have their marks written into the text.
    Keys cannot be rewritten, so if any key is marked, the whole result is.
    """
    values = _listed(values)
    if _has_marked_keys(values):
        return carried(operation(*values), values)
    result = operation(*map(_written, values))
    if not isinstance(result, str) or not _WRITTEN.search(result):
        return result
    parts, marks = [], 0
    for piece in _WRITTEN.split(result):
        if _WRITTEN.fullmatch(piece):
            marks = 0 if piece == _CLOSE else ord(piece) - ord(BREAK)
        else:
            parts.append(MarkedText(piece, bytes([marks]) * len(piece)))
    return joined(parts)


def _listed(value: Value) -> Value:
    """The value with iterators replaced by lists."""
    if isinstance(value, tuple):
        return tuple(map(_listed, value))
    return list(value) if isinstance(value, Iterator) else value


def _written(value: Value) -> Value:
    if isinstance(value, MarkedText):
        text = plain(value)
        runs = ((run[1][0], text[run.start() : run.end()]) for run in _RUN.finditer(value.marks))
        return "".join(f"{_OPEN[one]}{run}{_CLOSE}" if one else run for one, run in runs)
    if isinstance(value, Mapping):
        return {key: _written(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_written, value))
    return list(map(_written, value)) if isinstance(value, list) else value


def _has_marked_keys(value: Value) -> bool:
    if isinstance(value, Mapping):
        marked = any(isinstance(key, MarkedText) for key in value)
        return marked or any(map(_has_marked_keys, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_marked_keys, value))
