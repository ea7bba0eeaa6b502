"""A date in an answer is a day that there is."""

import json
from typing import Any

import pytest

from tests.winnow.grammar.walks import END, allowed
from winnow.grammar.compiler import GrammarCompiler
from winnow.grammar.source import schema_grammar
from winnow.tokenizer import Tokenizer

DAYS = {
    "2025-02-28": True,
    "2025-02-29": False,
    "2025-02-30": False,
    "2024-02-29": True,
    "1900-02-29": False,
    "2000-02-29": True,
    "2024-04-30": True,
    "2024-04-31": False,
    "2024-12-31": True,
    "2024-13-01": False,
    "2025-01-29": True,
    "2024-2-29": False,
}


@pytest.mark.parametrize("day", DAYS)
@pytest.mark.parametrize(
    ("schema", "rest"),
    [
        ({"type": "string", "format": "date"}, ""),
        ({"type": "string", "format": "date-time"}, "T10:00:00Z"),
        ({"type": ["string", "null"], "format": "date", "minLength": 1}, ""),
        ({"anyOf": [{"type": "integer"}, {"format": "date", "type": "string"}]}, ""),
    ],
)
def test_only_days_that_there_are_can_come(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], rest: str, day: str
) -> None:
    constraint = compiler.compile(schema_grammar(schema)).constraint()
    tokens = [*tokenizer.encode(json.dumps(day + rest)), END]
    fits = all(token in allowed(constraint, tokens[:idx]) for idx, token in enumerate(tokens))
    assert fits is DAYS[day]


def test_a_pattern_of_its_own_stays(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    schema = {"type": "string", "format": "date", "pattern": "^2025-01"}
    constraint = compiler.compile(schema_grammar(schema)).constraint()
    tokens = tokenizer.encode('"2025-01-')
    assert tokenizer.encode("3")[0] in allowed(constraint, tokens)
