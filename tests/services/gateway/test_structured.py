"""What a request's answers must match, read from each of the fields that say it."""

import json
from typing import Any

import pytest

from services.gateway.body import validate
from services.gateway.structured import StructuredOutput, read_grammar
from winnow.errors import InvalidRequest
from winnow.grammar import Grammar
from winnow.grammar.source import MAX_CHOICES, schema_grammar

SCHEMA = {"type": "object", "properties": {"zebra": {"type": "integer"}, "ape": {}}}
AS_TEXT = json.dumps(SCHEMA)
NAMED = {"name": "animals", "schema": SCHEMA, "strict": True}
ANY: dict[str, Any] = {"name": "any", "schema": {}}
OBJECT = Grammar("json_schema", '{"type": "object"}')


def read(body: dict[str, Any]) -> tuple[Grammar, str] | None:
    asked = read_grammar(validate(StructuredOutput, body))
    return None if asked is None else (asked.grammar, asked.param)


@pytest.mark.parametrize(
    ("body", "grammar", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED}},
            Grammar("json_schema", AS_TEXT),
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object"}}, OBJECT, "response_format.schema"),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            Grammar("json_schema", AS_TEXT),
            "response_format.schema",
        ),
        ({"guided_json": SCHEMA}, Grammar("json_schema", AS_TEXT), "guided_json"),
        ({"guided_json": AS_TEXT}, Grammar("json_schema", AS_TEXT), "guided_json"),
        *(
            (body, Grammar("json_schema", "{}"), param)
            for body, param in (
                ({"guided_json": {}}, "guided_json"),
                ({"structured_outputs": {"json": {}}}, "structured_outputs.json"),
                (
                    {"response_format": {"type": "json_schema", "json_schema": ANY}},
                    "response_format.json_schema.schema",
                ),
            )
        ),
        ({"guided_regex": "[a-c]+"}, Grammar("regex", "[a-c]+"), "guided_regex"),
        (
            {"guided_choice": ["ja", 'ne"in', "ja"]},
            Grammar("lark", r'start: "ja" | "ne\"in"'),
            "guided_choice",
        ),
        ({"guided_grammar": "start: /a/"}, Grammar("lark", "start: /a/"), "guided_grammar"),
        (
            {"structured_outputs": {"json": AS_TEXT, "disable_fallback": True}},
            Grammar("json_schema", AS_TEXT),
            "structured_outputs.json",
        ),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": False}},
            Grammar("regex", "a"),
            "structured_outputs.regex",
        ),
        (
            {"structured_outputs": {"choice": ["é"]}},
            Grammar("lark", r'start: "\u00e9"'),
            "structured_outputs.choice",
        ),
        (
            {"structured_outputs": {"grammar": "start: /a/"}},
            Grammar("lark", "start: /a/"),
            "structured_outputs.grammar",
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            schema_grammar(SCHEMA, compact=True),
            "structured_outputs.json",
        ),
        (
            {"structured_outputs": {"json_object": True}},
            OBJECT,
            "structured_outputs.json_object",
        ),
    ],
)
def test_each_field_says_what_an_answer_must_match(
    body: dict[str, Any], grammar: Grammar, param: str
) -> None:
    assert read(body) == (grammar, param)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"response_format": None, "guided_json": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {"json_object": False}},
        {"structured_outputs": {}},
    ],
)
def test_anything_may_come_where_nothing_is_said(body: dict[str, Any]) -> None:
    assert read(body) is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (
            {"response_format": {"type": "structural_tag", "structures": [1]}},
            "response_format.type",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED | {"name": "a b"}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": {"json_schema": NAMED}}, "response_format.type"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_grammar": "start: %json {}"}, "guided_grammar"),
        ({"guided_grammar": "start: %lark {\nstart: /a/\n}"}, "guided_grammar"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_json": '{"a": "\\ud800"}'}, "guided_json"),
        ({"structured_outputs": {"json": "no"}}, "structured_outputs.json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_choice": [f"{idx}" for idx in range(MAX_CHOICES + 1)]}, "guided_choice"),
        ({"guided_choice": ["a", 3]}, "guided_choice[1]"),
        ({"structured_outputs": {"structural_tag": {"a": 1}}}, "structured_outputs.structural_tag"),
        (
            {"structured_outputs": {"whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        (
            {"response_format": {"type": "json_object"}, "guided_choice": ["b"]},
            "guided_choice",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        read(body)
    assert error.value.param == param
    assert param.partition(".")[0].partition("[")[0] in error.value.message
