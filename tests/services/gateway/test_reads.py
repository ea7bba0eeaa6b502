"""Which requests are read apart: those whose answers may have to match a grammar."""

from typing import Any

import pytest

from services.gateway.reads import may_have_grammar

TOOLS: list[dict[str, Any]] = [{"type": "function"}]
NAMED = {"type": "function", "function": {"name": "a"}}


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}},
        {"guided_choice": ["a"]},
        {"text": {"format": {"type": "json_schema"}}},
        {"output_config": {"format": {"type": "json_schema"}}},
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": NAMED},
        {"tools": TOOLS, "tool_choice": {"type": "any"}},
        {"tools": [*TOOLS, {"type": "function", "strict": True}]},
        {"tools": [{"type": "function", "function": {"strict": True}}], "tool_choice": "auto"},
    ],
)
def test_a_form_or_a_call_that_must_come_is_a_grammar(body: dict[str, Any]) -> None:
    assert may_have_grammar(body)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": [], "prompt": "a"},
        {"response_format": {"type": "text"}},
        {"text": {"format": {"type": "text"}, "verbosity": "low"}},
        {"output_config": {"effort": "low"}},
        {"tools": TOOLS},
        {"tools": [{"strict": False, "function": {"strict": None}}, 3]},
        {"tools": TOOLS, "tool_choice": "auto"},
        {"tools": TOOLS, "tool_choice": {"type": "auto"}},
        {"tool_choice": "required"},
        {"text": 5, "tools": 7, "response_format": None},
    ],
)
def test_a_conversation_with_tools_that_may_be_called_is_read_as_any_other(
    body: dict[str, Any],
) -> None:
    assert not may_have_grammar(body)
