"""The grammars that requests can ask for, written for llguidance."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from winnow.errors import InvalidGrammar
from winnow.grammar import Grammar
from winnow.grammar.bounds import require_bounded
from winnow.grammar.closed import closed
from winnow.grammar.dates import with_leap_days
from winnow.grammar.endless import require_finite
from winnow.grammar.exclusive import discriminated
from winnow.grammar.plain import plain_schema

MAX_SOURCE_CHARS = 131_072
MAX_GBNF_CHARS = 16_384  # llguidance reads some in time that grows by the square
MAX_NESTING = 64
MAX_CHOICES = 1000

# Between the parts of JSON there may be spaces, or a line break and the next line's indentation.
# JSON allows more, but models idle there: after a line break another one is likely.
_FLEXIBLE = {"whitespace_pattern": r" {1,2}| ?\r?\n[ \t]{0,20}"}
_COMPACT = {"whitespace_flexible": False}
_OPTIONS = "x-guidance"  # llguidance's own key, at the top of a schema
_STRICT = {"lenient": False, "coerce_one_of": False}

# Of Lark: a comment, a string, a regular expression, or <token>. Literals may lack their end, so
# that no text is read twice.
_LITERAL_OR_TOKEN = re.compile(
    r'(?:#|//)[^\n]*|"(?:\\.|[^"\\\n])*+"?|/(?:\\.|[^/\\\n])*+/?|(?P<token><[^<>\s]+>)|(?P<inner>%(?:json|lark)\b)'
)


def schema_grammar(schema: Any, *, compact: bool = False) -> Grammar:  # noqa: ANN401 - any JSON
    """Texts that are JSON of the schema.  compact: without white space between its parts."""
    source = _without_options(schema)
    if nesting(source) <= MAX_NESTING:
        source = plain_schema(source)
    if compact and isinstance(source, dict):
        source = {**source, _OPTIONS: _COMPACT}
    return Grammar("json_schema", json.dumps(source, ensure_ascii=False))


def choice_grammar(texts: Sequence[str]) -> Grammar:
    """One of the texts.  Raises InvalidGrammar unless there are 1 to MAX_CHOICES."""
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise InvalidGrammar(f"has {len(texts)} choices; it must have 1 to {MAX_CHOICES}")
    return Grammar("lark", "start: " + " | ".join(map(json.dumps, texts)))


def written_grammar(text: str) -> Grammar:
    """A client's Lark or GBNF.  Raises InvalidGrammar if it has other grammars in it.

    Those of schemas would come without the limits and options that schemas have.
    """
    inner = next((m["inner"] for m in _LITERAL_OR_TOKEN.finditer(text) if m["inner"]), None)
    if inner is not None:
        raise InvalidGrammar(f"has {inner}; a grammar with others in it is not supported")
    return Grammar("lark", text)


def parsed_schema(source: str) -> dict[str, Any]:
    """A schema's JSON text as an object with llguidance's options, and with its objects `closed`.

    Raises InvalidGrammar if it is no schema, or is nested more than MAX_NESTING deep.
    """
    try:
        schema = json.loads(source)
        json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise InvalidGrammar(f"is not JSON: {error}") from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidGrammar("must be a JSON schema: an object")
    if (depth := nesting(schema)) > MAX_NESTING:
        raise InvalidGrammar(f"is nested {depth} deep; the limit is {MAX_NESTING}")
    spacing = _COMPACT if schema.get(_OPTIONS) == _COMPACT else _FLEXIBLE
    require_bounded(schema)
    require_finite(schema)
    own = _without_options(schema)
    return {**closed(with_leap_days(discriminated(own, own))), _OPTIONS: {**_STRICT, **spacing}}


def with_options(part: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a schema as a schema with the same options."""
    return {**part, _OPTIONS: like[_OPTIONS]}


def lark_source(grammar: Grammar) -> str:
    """The Lark of a grammar of kind `lark`, which may be written in GBNF.

    Raises InvalidGrammar if it names a control token that is not among `control_token_ids`.
    """
    source = _from_gbnf(grammar.source) if "::=" in grammar.source else grammar.source
    known = {f"<[{token_id}]>" for token_id in grammar.control_token_ids}
    for token in _named_tokens(source):
        if token not in known:
            raise InvalidGrammar(f"names the token {token[:100]}, which no text can produce")
    return source


def require_size(source: str, limit: int = MAX_SOURCE_CHARS) -> None:
    """Raise InvalidGrammar if the source is longer than the limit."""
    if len(source) > limit:
        raise InvalidGrammar(f"has {len(source):,} characters; the limit is {limit:,}")


def _without_options(schema: Any) -> Any:  # noqa: ANN401
    if not isinstance(schema, dict):
        return schema
    return {key: value for key, value in schema.items() if key != _OPTIONS}


def nesting(value: object) -> int:
    """How deep JSON is nested: 1 for an object of plain values."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in _inner(one)]
    return depth


def _inner(value: dict[str, object] | list[object]) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value


def _named_tokens(lark: str) -> Iterator[str]:
    return (match["token"] for match in _LITERAL_OR_TOKEN.finditer(lark) if match["token"])


def _from_gbnf(source: str) -> str:
    require_size(source, MAX_GBNF_CHARS)
    from llguidance.gbnf_to_lark import any_to_lark  # noqa: PLC0415 - the gateway's types need none

    try:
        return any_to_lark(source)
    except Exception as error:  # it raises Exception itself
        raise InvalidGrammar(f"is not GBNF: {error}") from error
