"""The grammar of a whole answer: reasoning, calls of tools, and what the client asked for."""

import time

from services.gateway.structured import AskedGrammar
from services.gateway.tools import ToolUse
from winnow.answers import AnswerFormat
from winnow.answers.formats.base import parameters_grammar
from winnow.grammar import Grammar
from winnow.grammar.compiler import GrammarCompiler
from winnow.grammar.compose import compose
from winnow.grammar.threads import TIMEOUT_S
from winnow.tokenizer import Tokenizer

_NO_TOOLS = ToolUse()
_TOOLS = "tools"


def enforced(
    asked: AskedGrammar | None,
    use: ToolUse = _NO_TOOLS,
    answer: AnswerFormat | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    grammars: GrammarCompiler,
) -> Grammar | None:
    """What every answer must match, compiled once to see that it can be; None if anything may come.

    answer, tokenizer: of a chat.
    All of its parts together take as long as one grammar may.
    Raises InvalidGrammar, naming the place, or Overloaded.
    """
    end_s = time.monotonic() + TIMEOUT_S
    if asked is not None:
        grammars.check(asked.grammar, asked.param, end_s)
    if answer is None or tokenizer is None:
        return None if asked is None else asked.grammar
    calls = None
    if answer.tool_format is not None and _are_enforced(use, has_body=asked is not None):
        _check_parameters(use, grammars, end_s)
        tools = use.callable_tools
        calls = answer.tool_format.grammar(tools, use.parallel, tokenizer.added_token_id)
    whole = compose(
        None if asked is None else asked.grammar,
        calls,
        must_call=use.mode in ("required", "named"),
        reasoning=answer.reasoning,
        tags=answer.frame.tags,
        token_id=tokenizer.added_token_id,
    )
    if whole is not None:
        # What was asked for is known to be right by itself.
        param = _TOOLS if asked is None or calls is not None else asked.param
        grammars.check(whole, param, end_s)
    return whole


def _are_enforced(use: ToolUse, *, has_body: bool) -> bool:
    """Whether calls must match; a model that may call or not is left to itself."""
    return bool(use.tools) and (use.mode != "auto" or has_body)


def _check_parameters(use: ToolUse, grammars: GrammarCompiler, end_s: float) -> None:
    for idx, tool in enumerate(use.tools):
        own = parameters_grammar(tool["function"])
        grammars.check(own, f"tools[{idx}].function.parameters", end_s)
