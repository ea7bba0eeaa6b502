"""What a request says of the form of its answers: structured output."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from services.gateway.body import Body
from services.gateway.json_text import parse_object
from services.gateway.typed import Typed, one_of
from winnow.errors import InvalidGrammar, InvalidRequest, InvalidSetting, UnsupportedParameter
from winnow.grammar import Grammar
from winnow.grammar.source import choice_grammar, schema_grammar, written_grammar

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ANY_OBJECT = {"type": "object"}
_UNSUPPORTED = ("whitespace_pattern", "structural_tag")


class JsonSchema(Body):
    """OpenAI's named schema. It is enforced, whether `strict` or not."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Typed):
    """OpenAI's `response_format`; `schema` beside type json_object is other services' form."""

    type: str = one_of("text", "json_object", "json_schema")
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class StructuredOutputs(Body):
    """vLLM's object of constraints, of which a request has one."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None  # in JSON
    # without effect: there is no other implementation, and objects are closed in any case
    disable_fallback: bool | None = None
    disable_additional_properties: bool | None = None
    # not supported
    whitespace_pattern: str | None = None
    structural_tag: Any = None


class StructuredOutput(Body):
    """OpenAI's `response_format`, and vLLM's ways to say more, older and newer."""

    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None


@dataclass(frozen=True, slots=True)
class AskedGrammar:
    """A grammar, and the field of the request that has it."""

    grammar: Grammar
    param: str


def read_grammar(request: StructuredOutput) -> AskedGrammar | None:
    """What every answer must match; None if anything may come.

    Raises InvalidRequest or a subclass, naming the field.
    """
    guided = StructuredOutputs(
        json=request.guided_json,
        regex=request.guided_regex,
        choice=request.guided_choice,
        grammar=request.guided_grammar,
    )
    return _one_of(
        [
            *_in_response_format(request.response_format),
            *_in_outputs(guided, "guided_{}".format),
            *_in_outputs(request.structured_outputs, "structured_outputs.{}".format),
        ]
    )


def read_outputs(asked: StructuredOutputs, name: Callable[[str], str]) -> AskedGrammar | None:
    """As `read_grammar`.  name: the request's name for a field of StructuredOutputs."""
    return _one_of([*_in_outputs(asked, name)])


def _one_of(given: Sequence[AskedGrammar]) -> AskedGrammar | None:
    """The one that is given.  Raises InvalidSetting if there are several."""
    if len(given) > 1:
        names = f"{given[0].param} and {given[1].param}"
        raise InvalidSetting(
            f"{names} both say what an answer must match; give one", param=given[1].param
        )
    return given[0] if given else None


def _choices(texts: Sequence[str], param: str) -> Grammar:
    """Raises InvalidGrammar for none, too many or an empty one."""
    try:
        if "" in texts:
            raise InvalidGrammar(f"has an empty text, number {texts.index('')}")
        return choice_grammar(tuple(dict.fromkeys(texts)))
    except InvalidGrammar as error:
        raise InvalidGrammar(f"{param} {error.message}", param=param) from error


def _written(text: str, param: str) -> Grammar:
    """Raises InvalidGrammar if it has other grammars in it."""
    try:
        return written_grammar(text)
    except InvalidGrammar as error:
        raise InvalidGrammar(f"{param} {error.message}", param=param) from error


def _in_response_format(asked: ResponseFormat | None) -> Iterator[AskedGrammar]:
    if asked is None or asked.type == "text":
        return
    if asked.type == "json_object":
        schema = _ANY_OBJECT if asked.schema_ is None else asked.schema_
        yield AskedGrammar(schema_grammar(schema), "response_format.schema")
    elif asked.type == "json_schema":
        yield AskedGrammar(
            schema_grammar(_named_schema(asked.json_schema)), "response_format.json_schema.schema"
        )
    else:
        asked.require_supported("response_format", "response_format.type")


def _named_schema(named: JsonSchema | None) -> dict[str, Any]:
    param = "response_format.json_schema"
    if named is None:
        raise InvalidRequest(f"missing parameter: {param}", param=param)
    if not _NAME.fullmatch(named.name):
        raise InvalidSetting(
            f"{param}.name is {named.name[:70]!r}; it must be 1 to 64 characters of [A-Za-z0-9_-]",
            param=f"{param}.name",
        )
    if named.schema_ is None:
        raise InvalidRequest(f"missing parameter: {param}.schema", param=f"{param}.schema")
    return named.schema_


def _in_outputs(
    asked: StructuredOutputs | None, name: Callable[[str], str]
) -> Iterator[AskedGrammar]:
    if asked is None:
        return
    for field in _UNSUPPORTED:
        if getattr(asked, field) not in (None, False):
            raise UnsupportedParameter(f"{name(field)} is not supported", param=name(field))
    compact = bool(asked.disable_any_whitespace)
    if asked.json_ is not None:
        schema = _parsed(asked.json_, name("json"))
        yield AskedGrammar(schema_grammar(schema, compact=compact), name("json"))
    if asked.json_object:
        grammar = schema_grammar(_ANY_OBJECT, compact=compact)
        yield AskedGrammar(grammar, name("json_object"))
    if asked.regex is not None:
        yield AskedGrammar(Grammar("regex", asked.regex), name("regex"))
    if asked.choice is not None:
        yield AskedGrammar(_choices(asked.choice, name("choice")), name("choice"))
    if asked.grammar is not None:
        yield AskedGrammar(_written(asked.grammar, name("grammar")), name("grammar"))


def _parsed(schema: dict[str, Any] | str, param: str) -> dict[str, Any]:
    return parse_object(schema.encode(), param, param) if isinstance(schema, str) else schema
