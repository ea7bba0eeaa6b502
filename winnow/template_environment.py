"""The Jinja environment of chat templates: transformers' extensions, marked text, resource limits.

A template is untrusted code from the model's publisher. It runs in Jinja's sandbox, with limits on
time and on output size.
"""

import functools
import json
import re
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
from jinja2.filters import do_format
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from winnow.marked_text import Value, carried, joined, substituted

MAX_SECONDS = 10.0
MAX_CHARS = 64 << 20
_MAX_POWER = 64
_SUBSTITUTING = ("format", "format_map", "join")  # string methods and filters
# Filters that return one of their inputs.
_PICKING = frozenset({"attr", "d", "default", "first", "last", "max", "min", "random"})
_NUMBER = re.compile(r"\d+", re.ASCII)
# What may have a width: `%5d`, `{:>5}`, and with the width among the arguments `%*d`, `{:{}}`.
_FIELD = re.compile(r"%[-+ #0-9.*]+|\{[^{}]*[{}]")
_deadline_s: ContextVar[float] = ContextVar("_deadline_s")


@contextmanager
def bounded_time() -> Iterator[None]:
    """Abort a template that runs in this block with TemplateError after MAX_SECONDS."""
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


def _require_small(*arguments: Value) -> None:
    """Refuse widths and counts that make a text too long."""
    _require_room(max((one for one in arguments if isinstance(one, int)), default=0))


def _require_small_fields(form: str, *arguments: Value) -> None:
    """As _require_small, for the widths in a format string and those it takes from arguments.

    form: for `%` or for str.format.
    """
    for field in _FIELD.findall(form):
        _require_small(*map(int, _NUMBER.findall(field)))
        if field.endswith(("{", "*")):
            _require_small(*arguments)


def _concatenated(parts: Iterable[str]) -> str:
    _require_time()
    parts = list(parts)
    _require_room(sum(map(len, parts)))
    return joined(parts)


def _as_text(value: Value) -> str:
    """Like str(), but with the marks of the strings inside a list or mapping."""
    return value if isinstance(value, str) else str(carried(str(value), [value]))


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Compile `a ~ b`, which Jinja would concatenate as plain text."""
        self.write("environment.concat(map(environment.finalize, (")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write(")))")


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's text for training: renders its contents."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # Jinja's own is a set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Keeps the marks of marked text through every operation; see winnow/marked_text.py."""

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
            _require_small_fields(left, *(right if isinstance(right, tuple) else (right,)))
            return substituted(_modulo, left, right)
        if operator == "*":
            _require_room(_times(left, right))
            return carried(super().call_binop(context, operator, left, right), [left, right])
        if operator == "**" and right > _MAX_POWER:
            raise TemplateRuntimeError(f"it raises to a power over {_MAX_POWER}")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Value, *args: Value, **kwargs: Value) -> Value:
        """Call an object; as in Jinja, parameters have names that no template argument has."""
        _require_time()
        method: Value = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps str.format
        text = getattr(method, "__self__", None)
        if not isinstance(text, str):
            return super().call(__context, __obj, *args, **kwargs)
        name: str = method.__name__
        if name in _SUBSTITUTING:
            if name != "join":
                _require_small_fields(text, *args, *kwargs.values())

            def on(text: str, args: Value, kwargs: Value) -> Value:
                called = __self.getattr(text, name)
                return super(TemplateEnvironment, __self).call(__context, called, *args, **kwargs)

            return substituted(on, text, args, kwargs)
        _require_small(*args, *kwargs.values())
        result = super().call(__context, __obj, *args, **kwargs)
        return carried(result, [text, args, kwargs])


def _times(left: Value, right: Value) -> int:
    """Length of `left * right` if it repeats a sequence, else 0."""
    lengths = [len(one) for one in (left, right) if isinstance(one, str | list | tuple)]
    numbers = [one for one in (left, right) if isinstance(one, int)]
    return lengths[0] * numbers[0] if lengths and numbers else 0


def _modulo(left: str, right: Value) -> Value:
    return left % right


def _carrying(function: Callable[..., Value]) -> Callable[..., Value]:
    """Wrap a filter so that its result has all marks of its inputs."""

    @functools.wraps(function)
    def filtered(*args: Value, **kwargs: Value) -> Value:
        _require_time()
        _require_small(*args[1:], *kwargs.values())
        result = function(*args, **kwargs)
        return carried(result, [args, kwargs]) if isinstance(result, str) else result

    return filtered


def _substituting(function: Callable[..., Value]) -> Callable[..., Value]:
    """Wrap a filter that formats or joins strings."""

    @functools.wraps(function)
    def filtered(*args: Value, **kwargs: Value) -> Value:
        if args and isinstance(args[0], str) and function is do_format:
            _require_small_fields(args[0], *args[1:], *kwargs.values())
        return substituted(lambda args, kwargs: function(*args, **kwargs), args, kwargs)

    return filtered


class _Namespace(Namespace):
    """Jinja's namespace, without names that reach Python internals."""

    def __init__(self, /, *args: Value, **kwargs: Value) -> None:
        for name in dict(*args, **kwargs):
            _require_plain(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Value) -> None:
        _require_plain(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        """Without the contents, which would become text without marks."""
        return "<Namespace>"


def _require_plain(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace can have no name like {name!r}")


def _strftime_now(form: str) -> Value:
    return carried(datetime.now().strftime(form), [form])


def _new_dict(*pairs: Value, **named: Value) -> dict[Value, Value]:
    """Replaces the class `dict`, so that a template cannot reach its methods."""
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
    """Like transformers' `tojson`; Jinja's own would escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
