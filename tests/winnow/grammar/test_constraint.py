"""What may come next is a function of the tokens so far, whatever else has been generated."""

import json
import random
from string import ascii_lowercase
from typing import Any

import pytest
from llguidance import LLParserLimits

from tests.winnow.grammar.walks import END, allowed, walk
from winnow.grammar import Grammar
from winnow.grammar.compiler import GrammarCompiler
from winnow.grammar.source import choice_grammar, schema_grammar
from winnow.tokenizer import Tokenizer

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", 'c"']}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "next"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "array", "prefixItems": [{"type": "boolean"}], "maxItems": 1}},
}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_sampled_is_json_of_the_schema(
    compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int
) -> None:
    *tokens, last = walk(compiler.compile(schema_grammar(PERSON)), seed)
    assert last == END
    answer = json.loads(tokenizer.decode(tokens))
    assert len(answer["name"]) <= 6
    assert 0 <= answer["age"] <= 130
    assert set(answer.get("tags", ())) <= {"a", "b\n", 'c"'}
    assert answer["next"] in (None, [], [True], [False])
    assert list(answer) == [name for name in PERSON["properties"] if name in answer]


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        (choice_grammar(["yes", "no", 'may"be\n']), {"yes", "no", 'may"be\n'}),
        (Grammar("regex", "(ab|c)/?"), {"ab", "ab/", "c", "c/"}),
        (Grammar("lark", 'start: "x" rest\nrest: "y" | "é"'), {"xy", "xé"}),
        (Grammar("lark", 'root ::= "x" rest\nrest ::= "y" | "z"'), {"xy", "xz"}),
        (Grammar("regex", ""), {""}),
    ],
)
def test_every_text_of_a_grammar_and_no_other_can_come(
    compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, texts: set[str]
) -> None:
    compiled = compiler.compile(grammar)
    answers = [walk(compiled, seed) for seed in range(60)]
    assert {tokenizer.decode(tokens[:-1]) for tokens in answers} == texts
    assert all(tokens[-1] == END for tokens in answers)


def test_white_space_cannot_go_on_for_ever(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(schema_grammar({"type": "array", "maxItems": 0})).constraint()
    (space,), (line_break,) = tokenizer.encode(" "), tokenizer.encode("\n")
    start = tokenizer.encode("[\n")
    assert line_break not in allowed(constraint, start)
    assert space in allowed(constraint, [*start, *[space] * 19])
    assert space not in allowed(constraint, [*start, *[space] * 20])


def test_compact_json_has_no_white_space(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiler.compile(schema_grammar(PERSON, compact=True))
    for seed in range(10):
        text = tokenizer.decode(walk(grammar, seed)[:-1])
        assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)


def test_tokens_taken_one_by_one_or_at_once_allow_the_same(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(schema_grammar(PERSON))
    tokens = walk(grammar, seed=3)
    by_one = grammar.constraint()
    for count in range(len(tokens)):
        expected = allowed(by_one, tokens[:count])
        assert allowed(grammar.constraint(), tokens[:count]) == expected
        assert tokens[count] in expected


def test_a_token_that_is_known_already_is_not_taken_again(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Grammar("regex", "aab"))
    constraint = grammar.constraint()
    tokens = [one for one in walk(grammar, 0) if one != END]
    for count in (1, 1, 2, 3):
        constraint.advance(tokens[:count])
    assert allowed(constraint) == {END}
    assert len(tokens) == 3


def test_after_the_end_token_anything_may_come(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Grammar("regex", "a|ab"))
    tokens = walk(grammar, 1)
    constraint = grammar.constraint()
    assert len(allowed(constraint, tokens)) == 320
    assert constraint.failure is None


def test_min_tokens_put_the_end_off_unless_it_is_all_that_may_come(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    constraint = compiler.compile(Grammar("regex", "a{1,2}")).constraint()
    (a,) = tokenizer.encode("a")
    assert allowed(constraint, [a]) == {a, END}
    assert allowed(constraint, [a], may_end=False) == {a}
    assert allowed(constraint, [a, a], may_end=False) == {END}


def test_a_stop_token_ends_where_the_end_token_may_and_text_where_text_may(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    user = next(idx for idx, text in tokenizer.added_token_ids.items() if text == "<|user|>")
    constraint = compiler.compile(Grammar("regex", "a[ab]?")).constraint(frozenset({user, b}))
    assert allowed(constraint) == {a}
    assert allowed(constraint, [a]) == {a, b, user, END}
    assert allowed(constraint, [a], may_end=False) == {a}


def test_no_control_token_is_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    anything = compiler.compile(Grammar("regex", r"(?s:.*)"))
    assert allowed(anything.constraint()).isdisjoint(tokenizer.added_token_ids.keys() - {END})
    spelled = compiler.compile(choice_grammar(["<|user|>"]))
    answers = {tuple(walk(spelled, seed)[:-1]) for seed in range(10)}
    assert {tokenizer.decode(tokens) for tokens in answers} == {"<|user|>"}
    assert all(set(tokens).isdisjoint(tokenizer.added_token_ids) for tokens in answers)


def test_a_token_that_is_not_allowed_fails_the_sequence(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    constraint = compiler.compile(Grammar("regex", "ab")).constraint()
    assert len(allowed(constraint, tokenizer.encode("b"))) == 320
    assert constraint.failure is not None
    assert "after 1 tokens" in constraint.failure.message


def test_answers_do_not_use_up_the_lexer_that_they_share(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its automaton has half a million states, each answer visits some hundreds of them."""
    monkeypatch.setattr("winnow.grammar.matcher._LIMITS", LLParserLimits(max_lexer_states=1000))
    grammar = compiler.compile(Grammar("regex", "([a-z ]*[a-m][a-z ]{18}[n-z][a-z ]*)"))
    first = grammar._prototype
    for seed in range(20):
        walk(grammar, seed, max_tokens=30)  # none of which fails
    assert grammar._prototype is not first


def test_a_grammar_that_becomes_too_complex_fails_the_sequence(
    compiler: GrammarCompiler, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("winnow.grammar.matcher._LIMITS", LLParserLimits(max_lexer_states=1000))
    grammar = compiler.compile(Grammar("regex", "([a-z]*[a-m][a-z]{18}[n-z][a-z]*)"))
    constraint = grammar.constraint()
    tokens = tokenizer.encode("".join(random.Random(0).choices(ascii_lowercase, k=3000)))
    assert len(allowed(constraint, tokens)) == 320
    assert constraint.failure is not None
    assert "too many states" in constraint.failure.message
