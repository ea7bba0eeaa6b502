"""The Jinja in which chat templates run: transformers' words, marked text, bounds.

A template is a program of whoever published the model. It sees data alone (Jinja's sandbox), and
may neither run for ever nor fill the memory.
"""

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import NoReturn

from jinja2 import TemplateError, TemplateRuntimeError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from winnow.marked_text import Value, carried, joined, substituted

MAX_SECONDS = 10.0
MAX_CHARS = 64 << 20
_MAX_POWER = 64
_SUBSTITUTING = ("format", "format_map", "join")  # methods of a text, and filters
# Filters that give back one of the values they get.
_PICKING = frozenset({"attr", "d", "default", "first", "last", "max", "min", "random"})
_deadline_s: ContextVar[float] = ContextVar("_deadline_s")


@contextmanager
def bounded_time() -> Iterator[None]:
    """A template that runs in this block ends in TemplateError after MAX_SECONDS."""
    token = _deadline_s.set(time.monotonic() + MAX_SECONDS)
    try:
        yield
    finally:
        _deadline_s.reset(token)


def _require_time() -> None:
    if time.monotonic() > _deadline_s.get(float("inf")):
        raise TemplateRuntimeError(f"it runs for more than {MAX_SECONDS:g} seconds")


def _require_room(num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise TemplateRuntimeError(f"it makes a text of more than {MAX_CHARS:,} characters")


def _concatenated(parts: Iterable[str]) -> str:
    _require_time()
    parts = list(parts)
    _require_room(sum(map(len, parts)))
    return joined(parts)


def _as_text(value: Value) -> str:
    """As str(), with the marks of what is inside a list or an object."""
    return value if isinstance(value, str) else str(carried(str(value), [value]))


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`a ~ b`, which Jinja would join as plain text."""
        self.write("environment.concat(map(environment.finalize, (")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write(")))")


class _Generation(Extension):
    """`{% generation %}`, with which training marks the assistant's words: its contents alone."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # Jinja's own is a set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """What every operation makes of marked text has its marks; see winnow/marked_text.py."""

    code_generator_class = _Generator
    concat = staticmethod(_concatenated)
    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=_as_text,
        )
        self.filters["tojson"] = _to_json
        for name in self.filters.keys() - _PICKING:
            keeping = _substituting if name in _SUBSTITUTING else _carrying
            self.filters[name] = keeping(self.filters[name])
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace
        self.globals["dict"] = _new_dict

    def getattr(self, obj: Value, attribute: str) -> Value:
        _require_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Value, argument: Value) -> Value:
        _require_time()
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Value, right: Value) -> Value:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return _concatenated((left, right))
        if operator == "%" and isinstance(left, str):
            return substituted(_modulo, left, right)
        if operator == "*":
            _require_room(_times(left, right))
            return carried(super().call_binop(context, operator, left, right), [left, right])
        if operator == "**" and right > _MAX_POWER:
            raise TemplateRuntimeError(f"it raises to a power over {_MAX_POWER}")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Value, *args: Value, **kwargs: Value) -> Value:
        """Parameters have names, as in Jinja, that no argument of a template has."""
        _require_time()
        method: Value = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps `format` of a text
        text = getattr(method, "__self__", None)
        if not isinstance(text, str):
            return super().call(__context, __obj, *args, **kwargs)
        name: str = method.__name__
        if name in _SUBSTITUTING:

            def on(text: str, args: Value, kwargs: Value) -> Value:
                called = __self.getattr(text, name)
                return super(TemplateEnvironment, __self).call(__context, called, *args, **kwargs)

            return substituted(on, text, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        return carried(result, [text, args, kwargs])


def _times(left: Value, right: Value) -> int:
    """Length of what `left * right` repeats; 0 where nothing is repeated."""
    lengths = [len(one) for one in (left, right) if isinstance(one, str | list | tuple)]
    numbers = [one for one in (left, right) if isinstance(one, int)]
    return lengths[0] * numbers[0] if lengths and numbers else 0


def _modulo(left: str, right: Value) -> Value:
    return left % right


def _carrying(function: Callable[..., Value]) -> Callable[..., Value]:
    """A filter whose text has all marks of what it was made of."""

    @functools.wraps(function)
    def filtered(*args: Value, **kwargs: Value) -> Value:
        _require_time()
        result = function(*args, **kwargs)
        return carried(result, [args, kwargs]) if isinstance(result, str) else result

    return filtered


def _substituting(function: Callable[..., Value]) -> Callable[..., Value]:
    """A filter that formats or joins texts."""

    @functools.wraps(function)
    def filtered(*args: Value, **kwargs: Value) -> Value:
        return substituted(lambda args, kwargs: function(*args, **kwargs), args, kwargs)

    return filtered


class _Namespace(Namespace):
    """Jinja's, without names that lead into Python's own objects."""

    def __init__(self, /, *args: Value, **kwargs: Value) -> None:
        for name in dict(*args, **kwargs):
            _require_plain(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Value) -> None:
        _require_plain(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        """Without what it holds, for that would be text without marks."""
        return "<Namespace>"


def _require_plain(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace can have no name like {name!r}")


def _strftime_now(form: str) -> Value:
    return carried(datetime.now().strftime(form), [form])


def _new_dict(*pairs: Value, **named: Value) -> dict[Value, Value]:
    """In place of Python's class, whose methods a template has no use for."""
    return dict(*pairs, **named)


def _raise(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _to_json(
    value: Value,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own would escape for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
