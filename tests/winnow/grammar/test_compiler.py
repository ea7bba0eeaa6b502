"""Compiling: errors name the place, it is bounded, and what was compiled is kept."""

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.models_in_code import VOCAB_SIZE
from tests.winnow.grammar.walks import END
from winnow.errors import InvalidGrammar, Overloaded, WinnowError
from winnow.grammar import Grammar, threads
from winnow.grammar.compiler import GrammarCompiler
from winnow.grammar.source import MAX_SOURCE_CHARS, schema_grammar
from winnow.tokenizer import Tokenizer

AGE = {"type": "integer", "not": {"const": 3}}
NESTED: dict[str, Any] = {}
for _ in range(70):
    NESTED = {"items": NESTED}


def chain(num_links: int, link: Callable[[int], str], last: str) -> str:
    return "\n".join([*map(link, range(num_links)), last])


@pytest.mark.parametrize(
    ("schema", "place", "reason"),
    [
        ({"properties": {"age": AGE}}, ".properties.age", 'Unimplemented keys: ["not"]'),
        ({"items": {"anyOf": [{}, {"uniqueItems": True}]}}, ".items.anyOf[1]", "uniqueItems"),
        ({"prefixItems": [{"format": "cat"}]}, ".prefixItems[0]", "Unknown format: cat"),
        (
            {"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"items": AGE}}},
            ".$defs.b.items",
            "not",
        ),
        ({"$ref": "#/definitions/b", "definitions": {"b": AGE}}, ".definitions.b", "not"),
        ({"properties": {"a": {"$ref": "http://x/y"}}}, ".properties.a", "not present"),
        ({"additionalProperties": {"type": "cat"}}, ".additionalProperties", "Invalid type: cat"),
        ({"minimum": 5, "maximum": 3, "type": "integer"}, "", "minimum (5) is greater"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "", "oneOf"),
        ({"$ref": "#"}, "", "no text matches it"),
        ({"items": {"multipleOf": 999983}}, ".items", "multipleOf comes to 999,983"),
        ({"allOf": [{"multipleOf": 997}, {"multipleOf": 0.991}]}, "", "comes to 988,027"),
        (
            {"$ref": "#/$defs/a", "multipleOf": 991, "$defs": {"a": {"multipleOf": 997}}},
            "",
            "multipleOf comes to 988,027",
        ),
        ({"anyOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "", "comes to 99,400,891"),
        ({"type": "integer", "multipleOf": 2**25}, "", "multipleOf comes to 33,554,432"),
        (NESTED, "", "is nested 71 deep; the limit is 64"),
        ([1], "", "must be a JSON schema"),
        (False, "", "must be a JSON schema"),
        ({"x-guidance": {"lenient": True}, "properties": {"age": AGE}}, ".properties.age", "not"),
    ],
)
def test_an_error_names_the_part_of_a_schema(
    compiler: GrammarCompiler, schema: object, place: str, reason: str
) -> None:
    with pytest.raises(InvalidGrammar) as raised:
        compiler.check(schema_grammar(schema), "response_format.json_schema.schema")
    error = raised.value
    assert error.param == f"response_format.json_schema.schema{place}"
    assert error.message.startswith(f"{error.param} ")
    assert reason in error.message


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("regex", "(?=a)b"), "look-around, including look-ahead"),
        (Grammar("regex", "a("), "unclosed group"),
        (Grammar("lark", 'start: "a" <|user|>'), "names the token <|user|>"),
        (Grammar("lark", "start: <[3]>"), "names the token <[3]>"),
        (Grammar("lark", 'start: <[3]> <[*]> "a"', frozenset({3})), "names the token <[*]>"),
        (Grammar("lark", "start: <[999]>", frozenset({999})), "names token 999; the model has 320"),
        (Grammar("lark", "start: start"), "no text matches it"),
        (Grammar("lark", 'rule: "a"'), "start"),
        (Grammar("lark", "root ::= (a"), "is not GBNF"),
        (Grammar("lark", "root ::= " + "a" * 20_000), "20,009 characters; the limit is 16,384"),
        (Grammar("lark", 'start: "' + '\\"' * 60_000), "cannot be enforced"),
        (Grammar("lark", "x" * 200_000), "has 200,000 characters; the limit is 131,072"),
        (Grammar("json_schema", '{"a'), "is not JSON"),
        (Grammar("json_schema", '{"const": NaN}'), "is not JSON"),
        (Grammar("json_schema", "[" * 100_000), "is not JSON"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_its_reason(
    compiler: GrammarCompiler, grammar: Grammar, reason: str
) -> None:
    for _ in range(2):  # the second time it is known
        with pytest.raises(InvalidGrammar) as raised:
            compiler.compile(grammar)
        assert reason in raised.value.message


@pytest.mark.parametrize(
    "source",
    [
        'start: "<|user|>" // <|user|>\n# <|user|>',
        'start: /<|user|>/ %json {"const": "<|user|>"}',
        'start: <[3]> "a"',
    ],
)
def test_the_text_of_a_control_token_may_be_named(compiler: GrammarCompiler, source: str) -> None:
    compiler.check(Grammar("lark", source, frozenset({3})))


@pytest.mark.parametrize(
    "source",
    [
        chain(9000, lambda i: f"r{i}: r{i + 1}", 'r9000: "a"\nstart: r0'),
        chain(5000, lambda i: f'R{i}: "a" R{i + 1}', 'R5000: "a"\nstart: R0'),
        chain(2000, lambda i: f"r{i}: {'(' * 20}r{i + 1}{')' * 20}", 'r2000: "a"\nstart: r0'),
        "start: " + "(" * 60_000 + '"a"' + ")" * 60_000,
    ],
)
def test_no_depth_of_rules_ends_the_process(compiler: GrammarCompiler, source: str) -> None:
    assert len(source) < MAX_SOURCE_CHARS
    try:
        compiler.check(Grammar("lark", source))
    except InvalidGrammar as error:
        assert "deeply nested" in error.message


def test_no_depth_of_references_ends_the_process(compiler: GrammarCompiler) -> None:
    defs = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(1500)}
    compiler.check(schema_grammar({"$ref": "#/$defs/a0", "$defs": {**defs, "a1500": {}}}))


def test_what_was_compiled_is_kept_for_as_many_as_fit(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiler.compile(Grammar("regex", "first"))
    assert compiler.compile(Grammar("regex", "first")) is first
    monkeypatch.setattr("winnow.grammar.compiler._MAX_KEPT", 3)
    for name in "abc":
        compiler.compile(Grammar("regex", name))
    assert len(compiler._jobs) == 3
    assert compiler.compile(Grammar("regex", "first")) is not first
    monkeypatch.setattr("winnow.grammar.compiler._MAX_KEPT_CHARS", 10)
    compiler.compile(Grammar("regex", "seven77"))
    assert len(compiler._jobs) == 1


def test_a_grammar_that_takes_too_long_is_refused_and_others_wait_their_turn(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, frozenset({END}))
    monkeypatch.setattr(threads, "TIMEOUT_S", 0.2)
    monkeypatch.setattr("winnow.grammar.compiler.new_matcher", lambda *_: goes_on.wait())

    def outcome(name: str) -> WinnowError:
        with pytest.raises(WinnowError) as raised:
            compiler.check(Grammar("regex", name), "own")
        return raised.value

    with ThreadPoolExecutor(2) as clients:
        slow = [*clients.map(outcome, ["a", "b"])]
    assert [type(one) for one in slow] == [InvalidGrammar] * 2
    assert str(slow[0]) == "own takes longer than 0.2 s to compile"
    waiting = [outcome(str(number)) for number in range(9)]
    assert [str(one) for one in waiting[:8]] == ["other grammars take too long to compile"] * 8
    assert str(waiting[8]) == "8 grammars are waiting to be compiled"
    assert {type(one) for one in waiting} == {Overloaded}
    goes_on.set()
    while compiler._threads._num_open:
        time.sleep(0.01)
    compiler.check(Grammar("regex", "z"))
    compiler.close()


def test_a_known_error_is_raised_anew_each_time(compiler: GrammarCompiler) -> None:
    errors = []
    for _ in range(3):
        with pytest.raises(InvalidGrammar) as raised:
            compiler.check(Grammar("regex", "(?=anew)"))
        errors.append(raised.value.__cause__)
    assert len({id(error) for error in errors}) == 3
    assert len({len(traceback.format_tb(error.__traceback__)) for error in errors if error}) == 1


def test_many_grammars_of_one_request_have_one_time_together(compiler: GrammarCompiler) -> None:
    with pytest.raises(Overloaded):
        compiler.check(Grammar("regex", "late"), end_s=time.monotonic() - 1)


def test_what_proved_slow_fails_at_once_and_close_does_not_wait_for_it(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, frozenset({END}))
    monkeypatch.setattr(threads, "TIMEOUT_S", 0.5)
    monkeypatch.setattr("winnow.grammar.compiler.TIMEOUT_S", 0.5)
    monkeypatch.setattr("winnow.grammar.compiler.new_matcher", lambda *_: goes_on.wait())
    for at_most_s in (5.0, 0.3):
        begun_s = time.monotonic()
        with pytest.raises(InvalidGrammar, match="takes longer"):
            compiler.check(Grammar("regex", "a"))
        assert time.monotonic() - begun_s < at_most_s
    with pytest.raises(Overloaded):  # decode takes what others have checked: it is only busy
        compiler.compile(Grammar("regex", "a"))
    begun_s = time.monotonic()
    compiler.close()
    assert time.monotonic() - begun_s < 2
    goes_on.set()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "uniqueItems": False, "description": "d", "items": {"title": "t"}},
        {"type": "object", "properties": {"title": {"type": "string", "title": "t"}}},
        {"multipleOf": 0.25, "type": "number", "if": {}, "dependentRequired": {}},
        {"anyOf": [{"multipleOf": 97}, {"multipleOf": 101}], "type": "integer"},
        {
            "discriminator": {"propertyName": "kind"},
            "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
            "$defs": {
                name: {
                    "type": "object",
                    "properties": {"kind": {"const": name, "default": name}, name: {}},
                    "required": [name],
                }
                for name in ("Cat", "Dog")
            },
        },
    ],
)
def test_keywords_that_say_nothing_are_no_obstacle(
    compiler: GrammarCompiler, schema: dict[str, Any]
) -> None:
    compiler.check(schema_grammar(schema))


def test_a_source_counts_without_descriptions_and_escapes() -> None:
    schema = {"properties": {"title": {"const": "é", "description": "x" * 1000}}}
    assert schema_grammar(schema).source == '{"properties": {"title": {"const": "é"}}}'


def test_a_panic_of_the_library_is_an_error_of_the_grammar(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        pass

    def panic(*_: object) -> None:
        raise Panic("index out of bounds")

    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, frozenset({END}))
    monkeypatch.setattr("winnow.grammar.compiler.new_matcher", panic)
    with pytest.raises(InvalidGrammar, match="cannot be compiled: index out of bounds"):
        compiler.check(Grammar("regex", "a"))
    compiler.close()


def test_a_model_without_an_end_token_takes_no_grammar(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, frozenset({VOCAB_SIZE + 1}))
    with pytest.raises(InvalidGrammar, match="guided_regex cannot be enforced: the model has no"):
        compiler.check(Grammar("regex", "a"), "guided_regex")
    compiler.close()


def test_close_ends_its_threads(tokenizer: Tokenizer) -> None:
    before = set(threading.enumerate())
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, frozenset({END}))
    compiler.check(Grammar("regex", "a"))
    assert len(set(threading.enumerate()) - before) == 1
    compiler.close()
    assert set(threading.enumerate()) <= before
