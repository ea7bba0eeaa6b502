"""Reasoning, calls of tools and the form of the answer in one grammar."""

from collections.abc import Sequence

import pytest

from tests.winnow.grammar.walks import END, allowed
from winnow.errors import InvalidGrammar
from winnow.grammar import Grammar
from winnow.grammar.compiler import GrammarCompiler
from winnow.grammar.compose import Fragment, Reasoning, Tags, compose, schema_literal
from winnow.grammar.source import choice_grammar, schema_grammar
from winnow.tokenizer import Tokenizer

THINK, END_THINK = 2, 3  # <|user|> and <|assistant|> stand for <think> and </think>
TAGS = Tags(("<think>",), "</think>")
JSON = schema_grammar({"type": "object", "properties": {"a": {"type": "integer"}}})
ARGUMENTS = schema_literal(schema_grammar({"type": "object", "maxProperties": 0}))
CALLS = Fragment(f'call_start: "<call>" {ARGUMENTS} | "<" call_x\ncall_x: "x>"', "call_start")
BODIES = {
    JSON: '{"a":1}',
    Grammar("regex", "[0-9]{2}/x"): "12/x",
    Grammar("lark", 'start: a\n%ignore / +/\na: "x" "y" // }'): "x  y",
    Grammar("lark", 'root ::= "yes" | "no"'): "no",
    choice_grammar(['a"b', "\n}"]): "\n}",
}


def matches(
    compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, parts: Sequence[str | int]
) -> bool:
    """Whether the answer, of texts and control tokens, may come and end."""
    tokens: list[int] = []
    for part in parts:
        tokens += [part] if isinstance(part, int) else tokenizer.encode(part)
    constraint = compiler.compile(grammar).constraint()
    for count, token in enumerate([*tokens, END]):
        if token not in allowed(constraint, tokens[:count]):
            return False
    return True


def with_tokens(tag: str) -> int | None:
    return {"<think>": THINK, "</think>": END_THINK}[tag]


def as_text(_: str) -> None:
    return None


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("token_id", [with_tokens, as_text])
def test_an_answer_reasons_or_not_and_then_calls_or_keeps_to_the_form(
    compiler: GrammarCompiler, tokenizer: Tokenizer, body: Grammar, token_id: object
) -> None:
    text = BODIES[body]
    begin, end = (THINK, END_THINK) if token_id is with_tokens else ("<think>", "</think>")
    expected: dict[Reasoning, tuple[bool, bool, bool]] = {
        "none": (True, False, False),
        "possible": (True, True, False),
        "open": (False, False, True),
    }
    for reasoning, (plain, whole, rest) in expected.items():
        grammar = compose(
            body,
            CALLS,
            must_call=False,
            reasoning=reasoning,
            tags=TAGS,
            token_id=token_id,  # type: ignore[arg-type]
        )
        assert grammar is not None
        for answer in (text, "<call>{}", "<x>"):
            for parts, fits in (
                ([answer], plain),
                ([begin, "hm, {}", end, "\n\n", answer], whole or (rest and begin == "<think>")),
                (["hm, </", end, answer], rest),
            ):
                assert matches(compiler, tokenizer, grammar, parts) is fits, (reasoning, parts)
        assert not matches(compiler, tokenizer, grammar, ["anything"])


def test_what_must_call_has_no_other_form(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compose(
        JSON, CALLS, must_call=True, reasoning="none", tags=TAGS, token_id=with_tokens
    )
    assert grammar is not None
    assert grammar.control_token_ids == frozenset()
    assert matches(compiler, tokenizer, grammar, ["<call>{}"])
    assert not matches(compiler, tokenizer, grammar, ['{"a":1}'])


@pytest.mark.parametrize("reasoning", ["none", "possible"])
def test_what_may_talk_says_anything_and_then_calls_in_the_form_or_not(
    compiler: GrammarCompiler, tokenizer: Tokenizer, reasoning: Reasoning
) -> None:
    rules = f'call_start: <[1]> {ARGUMENTS} "</call>"'
    calls = Fragment(rules, "call_start", frozenset({1}), opens=("<call>",))
    grammar = compose(
        None,
        calls,
        must_call=False,
        may_talk=True,
        reasoning=reasoning,
        tags=TAGS,
        token_id=with_tokens,
    )
    assert grammar is not None
    expected: dict[tuple[str | int, ...], bool] = {
        ("",): True,
        ("Well.\n{}<call",): True,
        (1, "{}</call>"): True,
        ("Well. ", 1, "{}</call>"): True,
        (1, '{"a": 1}</call>'): False,
        (1, "{}"): False,
        (1, "{}</call>", "And?"): False,
        ("<call>[]</call>",): False,
    }
    for parts, fits in expected.items():
        assert matches(compiler, tokenizer, grammar, parts) is fits, parts
        thought: list[str | int] = [THINK, "hm", END_THINK, "\n\n", *parts]
        assert matches(compiler, tokenizer, grammar, thought) is (fits and reasoning != "none")


def test_control_tokens_are_those_that_the_parts_name(compiler: GrammarCompiler) -> None:
    calls = Fragment('call_start: <[1]> "x"', "call_start", frozenset({1}))
    grammar = compose(
        None, calls, must_call=True, reasoning="open", tags=TAGS, token_id=with_tokens
    )
    assert grammar is not None
    assert grammar.control_token_ids == {1, END_THINK}
    compiler.check(grammar)


def test_two_schemas_that_begin_alike_are_told_apart(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    call = schema_literal(
        schema_grammar(
            {
                "type": "object",
                "properties": {"name": {"const": "f"}},
                "required": ["name"],
                "additionalProperties": True,
            }
        )
    )
    calls = Fragment(f"call_start: {call}", "call_start")
    grammar = compose(JSON, calls, must_call=False, reasoning="none", tags=TAGS, token_id=as_text)
    assert grammar is not None
    for text in ('{"a": 1}', '{ "name":"f"}', '{"name": "f", "x":null}'):
        assert matches(compiler, tokenizer, grammar, [text]), text


def test_without_parts_there_is_no_grammar_and_one_form_alone_stays_as_it_is() -> None:
    free = compose(None, None, must_call=False, reasoning="open", tags=TAGS, token_id=with_tokens)
    alone = compose(JSON, None, must_call=False, reasoning="none", tags=TAGS, token_id=with_tokens)
    assert free is None
    assert alone is JSON


def test_a_form_that_names_control_tokens_is_refused() -> None:
    with pytest.raises(InvalidGrammar, match=r"names the token <\[3\]>"):
        compose(
            Grammar("lark", "start: <[3]>"),
            None,
            must_call=False,
            reasoning="open",
            tags=TAGS,
            token_id=with_tokens,
        )


CHANNEL, MESSAGE, START = 1, 2, 3  # control tokens that stand for those of channels
CHANNELS = Tags(("<c>", "analysis", "<m>"), "<e>", ("<s>", "assistant"), ("<c>", "final", "<m>"))
TO_CALL = Fragment('call_start: "<c>to f<m>{}"', "call_start", in_final=False)


def with_channels(tag: str) -> int | None:
    return {"<c>": CHANNEL, "<m>": MESSAGE, "<s>": START}.get(tag)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("token_id", [with_channels, as_text])
def test_what_is_asked_for_is_in_the_last_channel(
    compiler: GrammarCompiler, tokenizer: Tokenizer, body: Grammar, token_id: object
) -> None:
    is_text = token_id is as_text
    channel, message, start = ("<c>", "<m>", "<s>") if is_text else (CHANNEL, MESSAGE, START)
    final: list[str | int] = [channel, "final", message]
    thought: list[str | int] = [channel, "analysis", message, "hm, {}<e>", start, "assistant"]
    rest: list[str | int] = ["hm<e>", start, "assistant"]
    expected: dict[Reasoning, tuple[bool, bool, bool, bool]] = {
        "possible": (False, True, True, False),
        "open": (False, False, is_text, True),  # text of the tags may be text of reasoning
        "none": (True, False, False, False),
    }
    for reasoning, fits in expected.items():
        grammar = compose(
            body,
            TO_CALL,
            must_call=False,
            reasoning=reasoning,
            tags=CHANNELS,
            token_id=token_id,  # type: ignore[arg-type]
        )
        assert grammar is not None
        called = ["<c>to f<m>{}"]
        for before, are_right in zip(
            ([], final, [*thought, *final], [*rest, *final]), fits, strict=True
        ):
            parts = [*before, BODIES[body]]
            assert matches(compiler, tokenizer, grammar, parts) is are_right, (reasoning, parts)
        assert matches(compiler, tokenizer, grammar, called) is (reasoning != "open")
        assert matches(compiler, tokenizer, grammar, [*rest, *called]) is (reasoning == "open")


def test_calls_without_a_channel_of_their_own_are_in_the_last_one(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = compose(
        None, CALLS, must_call=True, reasoning="possible", tags=CHANNELS, token_id=with_channels
    )
    assert grammar is not None
    assert matches(compiler, tokenizer, grammar, [CHANNEL, "final", MESSAGE, "<x>"])
    assert not matches(compiler, tokenizer, grammar, ["<x>"])
