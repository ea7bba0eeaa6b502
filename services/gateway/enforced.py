"""The grammar of a whole answer: reasoning, calls of tools, and what the client asked for."""

import time
from dataclasses import replace

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
    calls, form = None, answer.tool_format
    may_talk = use.mode == "auto" and asked is None
    if may_talk and form is not None:
        use = _strict_alone(use) if form.begins_by_token(tokenizer.added_token_id) else _NO_TOOLS
    if form is not None and use.tools:
        _check_parameters(use, grammars, end_s)
        calls = form.grammar(use.callable_tools, use.parallel, tokenizer.added_token_id)
    whole = compose(
        None if asked is None else asked.grammar,
        calls,
        must_call=use.must_call,
        may_talk=may_talk,
        reasoning=answer.reasoning,
        tags=answer.frame.tags,
        token_id=tokenizer.added_token_id,
    )
    if whole is not None:
        # What was asked for is known to be right by itself.
        param = _TOOLS if asked is None or calls is not None else asked.param
        grammars.check(whole, param, end_s)
    return whole


def _strict_alone(use: ToolUse) -> ToolUse:
    """What of the calls must match if the model may call or not: of other tools any object will do.

    Nothing if no tool is strict.
    """
    functions = [tool["function"] for tool in use.tools]
    if not any(one.get("strict") for one in functions):
        return _NO_TOOLS
    enforced = [one if one.get("strict") else {**one, "parameters": {}} for one in functions]
    return replace(use, tools=tuple({"type": "function", "function": one} for one in enforced))


def _check_parameters(use: ToolUse, grammars: GrammarCompiler, end_s: float) -> None:
    for idx, tool in enumerate(use.tools):
        own = parameters_grammar(tool["function"])
        grammars.check(own, f"tools[{idx}].function.parameters", end_s)
