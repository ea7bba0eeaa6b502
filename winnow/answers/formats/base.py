"""What every form of calls has: how it is told from text, written, and enforced."""

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

from winnow.answers.call_syntax import CallSyntax
from winnow.grammar import Grammar
from winnow.grammar.compose import Fragment, schema_literal
from winnow.grammar.source import schema_grammar
from winnow.tool_support import Tool

# As in OpenAI's API, but a call's arguments are an object, or text that is no object's JSON.
Call: TypeAlias = Mapping[str, Any]

_NO_PROPERTIES: Mapping[str, Any] = {"type": "object", "properties": {}}
_NO_PARAMETERS = {**_NO_PROPERTIES, "additionalProperties": False}


class ToolFormat(ABC):
    """A form in which models write calls of tools. Immutable.

    markers: texts of it for which a vocabulary may have tokens.
    in_final: calls stand where other text of an answer does.
    """

    name: ClassVar[str]
    in_final: ClassVar[bool] = True
    arguments_key: ClassVar[str] = "arguments"
    markers: tuple[str, ...] = ()
    syntax: CallSyntax

    def new_id(self) -> str:
        """A unique id for a call."""
        return f"call_{secrets.token_hex(12)}"

    def template_id(self, call_id: str) -> str:
        """A client's id for a call, as this model's chat template accepts it."""
        return call_id

    def written(self, calls: Sequence[Call]) -> str:
        """The calls as a model writes them."""
        return self._sequence([self._object(call["function"]) for call in calls])

    def grammar(
        self, tools: Sequence[Tool], parallel: bool, token_id: Callable[[str], int | None]
    ) -> Fragment:
        """Rules for an answer that calls one of these tools, or several if `parallel`.

        token_id: the added token of a text, if there is one. Each schema is one document of its
        own, so that its references stay right.
        """
        functions = [tool["function"] for tool in tools]
        ids = {marker: token_id(marker) for marker in self.markers}
        marks = {
            marker: _literal(marker) if number is None else f"<[{number}]>"
            for marker, number in ids.items()
        }
        rules = [
            f"call_start: {self._rule(marks, parallel)}",
            "call_one: " + " | ".join(f"call_{idx}" for idx in range(len(functions))),
        ]
        for idx, function in enumerate(functions):
            before, after = self._around(function["name"], marks)
            rules += [
                f"call_{idx}: {before} call_arguments_{idx} {after}",
                f"call_arguments_{idx}: {schema_literal(parameters_grammar(function))}",
            ]
        rules.append("call_space: / {1,2}/")
        text = "\n".join(rules)
        named = frozenset(i for i in ids.values() if i is not None and f"<[{i}]>" in text)
        opens = self.syntax.opens
        return Fragment(text, "call_start", named, in_final=self.in_final, opens=opens)

    def begins_by_token(self, token_id: Callable[[str], int | None]) -> bool:
        """Whether every call begins with a token of its own, which no text has.

        token_id: as in `grammar`.
        """
        return not self.syntax.bare and all(token_id(one) is not None for one in self.syntax.opens)

    @abstractmethod
    def _sequence(self, objects: Sequence[str]) -> str:
        """The text of several calls, each given as its JSON object."""

    @abstractmethod
    def _rule(self, marks: Mapping[str, str], parallel: bool) -> str:
        """The rule for an answer, in which `call_one` is a call. marks: rules of the markers."""

    def _around(self, name: str, marks: Mapping[str, str]) -> tuple[str, str]:
        """The rules for what is before and after the arguments of a call of `name`."""
        # Each part is a lexeme of its own, as in the JSON that another answer may be: one that
        # begins alike is else taken for a call's beginning.
        parts = ("{", '"name"', ":", json.dumps(name), ",", f'"{self.arguments_key}"', ":")
        return " call_space? ".join([*map(_literal, parts), ""]), _literal("}")

    def _object(self, function: Mapping[str, Any]) -> str:
        named = {"name": function["name"], self.arguments_key: function["arguments"]}
        return json.dumps(named, ensure_ascii=False)


def arguments_text(function: Mapping[str, Any]) -> str:
    """A call's arguments as a model writes them."""
    arguments = function["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _literal(text: str) -> str:
    return json.dumps(text)


def parameters_grammar(function: Mapping[str, Any]) -> Grammar:
    """A call's arguments: always an object, without any properties if the function names none."""
    schema = function.get("parameters")
    if schema is None:
        return schema_grammar(_NO_PARAMETERS)
    own = {**schema, "type": "object"}
    return schema_grammar(_NO_PARAMETERS if own == _NO_PROPERTIES else own)
