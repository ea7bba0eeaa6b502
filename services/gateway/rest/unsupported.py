"""Parameters of OpenAI's and vLLM's APIs that Winnow does not support: refused, never ignored.

A value that has no effect (the API's default) is accepted, since many clients send it.
"""

from collections.abc import Mapping
from typing import Any

from winnow.errors import UnsupportedParameter

_COMMON: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "moderation": (),
    # vLLM's
    "allowed_token_ids": (),
    "bad_words": ([],),
    "early_stopping": (False,),
    "guided_whitespace_pattern": ("",),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}

COMPLETION_PARAMETERS: Mapping[str, tuple[Any, ...]] = {
    **_COMMON,
    "suffix": ("",),
    "add_special_tokens": (True,),
    "prompt_embeds": (),
}

CHAT_PARAMETERS: Mapping[str, tuple[Any, ...]] = {
    **_COMMON,
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    # vLLM's
    "add_special_tokens": (False,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "mm_processor_kwargs": ({},),
}

RESPONSES_PARAMETERS: Mapping[str, tuple[Any, ...]] = {
    "access_programs": ({},),
    "background": (False,),
    "context_management": ([],),
    "conversation": ("",),
    "image": ({},),
    "max_tool_calls": (),
    "moderation": (),
    "previous_response_id": ("",),
    "prompt": ({},),
    "truncation": ("disabled", ""),
    # vLLM's
    "enable_response_messages": (False,),
    "mm_processor_kwargs": ({},),
    "previous_input_messages": ([],),
    "request_id": ("",),
    "vllm_xargs": ({},),
}

MESSAGES_PARAMETERS: Mapping[str, tuple[Any, ...]] = {
    "billing_policy": ({},),
    "compaction": ({},),
    "container": ({}, ""),
    # Claude Code's value says that nothing is to be cleared.
    "context_management": (
        *({}, {"edits": []}),
        {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    ),
    "fallback_credit_token": ("",),
    "fallbacks": ([],),
    "mcp_servers": ([],),
    "thread": ({},),
}


def without_unsupported(
    body: Mapping[str, Any], parameters: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """`body` without unsupported parameters whose value has no effect.

    parameters: for each, the values besides null that have no effect.
    Raises UnsupportedParameter for any other value.
    """
    for name, harmless in parameters.items():
        value = body.get(name)
        if value is not None and not any(_same(value, one) for one in harmless):
            raise UnsupportedParameter(f"{name} is not supported by Winnow", param=name)
    return {name: value for name, value in body.items() if name not in parameters}


def _same(value: object, other: object) -> bool:
    """Equal, with True and 1 distinguished."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
