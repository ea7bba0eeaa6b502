"""Matchers of llguidance, with limits, and with errors that name the place."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits
from llguidance.numpy import fill_next_token_bitmask

from winnow.errors import InvalidGrammar
from winnow.grammar import Grammar
from winnow.grammar.place import locate
from winnow.grammar.source import lark_source, parsed_schema, require_size, with_options
from winnow.grammar.vocabulary import Vocabulary

_LIMITS = LLParserLimits(
    max_grammar_size=100_000,  # symbols
    initial_lexer_fuel=1_000_000,  # 20 ms
    step_lexer_fuel=200_000,  # 14 ms
    step_max_items=50_000,  # 3 ms
    max_lexer_states=50_000,  # 20 MB
    verbose_errors=False,
)
_MAX_REASON_CHARS = 300
_NOTHING_ALLOWED = "NoExtensionBias"


def new_matcher(vocabulary: Vocabulary, grammar: Grammar) -> LLMatcher:
    """A matcher at the beginning of an answer.

    llguidance reads grammars recursively: call it where the stack is large.
    Raises InvalidGrammar, whose `param` is the place in the grammar, such as `.properties.age`.
    """
    require_size(grammar.source)
    if grammar.kind == "json_schema":
        schema = parsed_schema(grammar.source)
        return _schema_matcher(vocabulary, schema)
    if grammar.kind == "regex":
        source = LLMatcher.grammar_from_regex(grammar.source)
    else:
        source = lark_source(grammar)
        _require_known(grammar, vocabulary)
    matcher = _matcher(vocabulary, source)
    if (reason := reason_of(matcher)) is not None:
        raise InvalidGrammar(f"cannot be enforced: {reason}")
    return matcher


def _require_known(grammar: Grammar, vocabulary: Vocabulary) -> None:
    for token_id in grammar.control_token_ids:
        if token_id >= vocabulary.size:
            raise InvalidGrammar(
                f"names token {token_id}; the model has {vocabulary.size}, "
                f"up to {vocabulary.size - 1}"
            )


def reason_of(matcher: LLMatcher) -> str | None:
    """Why the matcher cannot go on; None if it can."""
    if not matcher.is_error():
        return None
    first, *further = matcher.get_error().strip().splitlines() or [_NOTHING_ALLOWED]
    if first == _NOTHING_ALLOWED:
        return "no text matches it"
    if first.endswith("regex parse error:"):  # the expression and its place follow
        first += "".join(f" {line}" for line in further if line.startswith("error:"))
    return first[:_MAX_REASON_CHARS]


def _schema_matcher(vocabulary: Vocabulary, schema: Mapping[str, Any]) -> LLMatcher:
    def matcher_for(part: Mapping[str, Any]) -> LLMatcher:
        options = with_options(part, like=schema)
        return _matcher(vocabulary, json.dumps({"grammars": [{"json_schema": options}]}))

    matcher = matcher_for(schema)
    if matcher.is_error():
        place, reason = locate(schema, lambda part: reason_of(matcher_for(part)))
        raise InvalidGrammar(f"cannot be enforced: {reason}", param=place)
    return matcher


def _matcher(vocabulary: Vocabulary, source: str) -> LLMatcher:
    """Also computes the first mask, which fails if no text matches."""
    matcher = LLMatcher(vocabulary.llguidance, source, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        fill_next_token_bitmask(matcher, np.empty((1, vocabulary.num_words), np.int32))
    return matcher
