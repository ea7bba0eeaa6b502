"""One grammar for all parts of an answer: reasoning, calls of tools, what the client asks for."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from winnow.grammar import Grammar
from winnow.grammar.source import lark_source, parsed_schema

# How an answer begins: without reasoning, perhaps with its tag, or inside of it.
Reasoning: TypeAlias = Literal["none", "possible", "open"]


@dataclass(frozen=True, slots=True)
class Tags:
    """What stands around reasoning and answer: texts one after the other, each perhaps a token.

    before, after: reasoning.  between: from its end to the answer; line breaks if there is nothing.
    final: before the answer, unless the prompt has left no room for reasoning.
    """

    before: tuple[str, ...]
    after: str
    between: tuple[str, ...] = ()
    final: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fragment:
    """Lark rules, and the name of the one to begin with.

    The names begin with `call_`, or `CALL_` for terminals.
    control_token_ids: those that the rules name as <[id]>.  in_final: see ToolFormat.
    opens: texts of the tokens with which calls begin.
    """

    rules: str
    start: str
    control_token_ids: frozenset[int] = frozenset()
    in_final: bool = True
    opens: tuple[str, ...] = ()


def compose(
    body: Grammar | None,
    calls: Fragment | None,
    *,
    must_call: bool,
    may_talk: bool = False,
    reasoning: Reasoning,
    tags: Tags,
    token_id: Callable[[str], int | None],
) -> Grammar | None:
    """What a whole answer must match; None if that is anything.

    body: what the answer must match unless it calls tools.  calls: the calls of tools; `must_call`:
    there is nothing else; `may_talk`: any text may come before them, or in their place, that does
    not spell one of `calls.opens`.  reasoning: whether the answer begins with reasoning, after
    `tags.before` (possible), or within it (open).  token_id: of a control token; None for other
    text.
    """
    if body is None and calls is None:
        return None
    if calls is None and reasoning == "none":
        return body
    rules, alternatives = [], []
    ids = set(calls.control_token_ids if calls else ())
    final = "" if reasoning == "none" else _sequence(tags.final, token_id, ids)
    if calls is not None:
        rules.append(calls.rules)
        alternatives.append(f"{final} {calls.start}" if calls.in_final else calls.start)
        if may_talk:
            rules.append(f"ANSWER_TEXT: {_text_without(calls.opens)}")
            more = f"{calls.start}?" if calls.in_final else ""
            alternatives.append(f"{final} ANSWER_TEXT {more}")
    if body is not None and not must_call:
        rules.append(f"answer_body: {_inline(body)}")
        alternatives.append(f"{final} answer_body")
    rules.append(f"answer: {' | '.join(alternatives)}")
    rules.append(_start(reasoning, tags, token_id, ids))
    return Grammar("lark", "\n".join(rules), frozenset(ids))


def _sequence(texts: Sequence[str], token_id: Callable[[str], int | None], ids: set[int]) -> str:
    """The texts as an expression of Lark.  ids: gets the control tokens that it names."""
    found = [token_id(text) for text in texts]
    ids.update(one for one in found if one is not None)
    return " ".join(
        json.dumps(text) if one is None else f"<[{one}]>"
        for text, one in zip(texts, found, strict=True)
    )


def _text_without(texts: Sequence[str]) -> str:
    """Any text that has none of these, as an expression of Lark."""
    others = (f"~/(?s:.*){re.escape(text)}(?s:.*)/" for text in texts)
    return " & ".join(["/(?s:.*)/", *others])


def _start(
    reasoning: Reasoning,
    tags: Tags,
    token_id: Callable[[str], int | None],
    ids: set[int],
) -> str:
    """The rule `start`, and those of reasoning.  ids: gets the control tokens that it names."""
    if reasoning == "none":
        return "start: answer"
    end = token_id(tags.after)
    if end is None:
        text = f"answer_reasoning[suffix={json.dumps(tags.after)}]: /(?s:.*)/"
    else:
        ids.add(end)
        text = f"answer_reasoning: /(?s:.*)/ <[{end}]>"
    between = _sequence(tags.between, token_id, ids) or r"/\n{1,2}/?"
    reasoned = f"answer_reasoning {between} answer"
    if reasoning == "open":
        return f"{text}\nstart: {reasoned}"
    return f"{text}\nstart: answer | {_sequence(tags.before, token_id, ids)} {reasoned}"


def _inline(grammar: Grammar) -> str:
    """A grammar as an expression of Lark."""
    if grammar.kind == "json_schema":
        return schema_literal(grammar)
    if grammar.kind == "regex":
        return regex_literal(grammar.source)
    return f"%lark {{\n{lark_source(grammar)}\n}}"


def schema_literal(grammar: Grammar) -> str:
    """A JSON schema as Lark writes it, with the same white space wherever one stands.

    Rules that may begin alike, as two schemas do, are told apart only if that is the same.
    """
    return f"%json {json.dumps(parsed_schema(grammar.source), ensure_ascii=False)}"


def regex_literal(regex: str) -> str:
    """A regular expression as Lark writes it."""
    from llguidance import regex_to_lark  # noqa: PLC0415 - the gateway's types need none of it

    return f"/{regex_to_lark(regex)}/" if regex else '""'
