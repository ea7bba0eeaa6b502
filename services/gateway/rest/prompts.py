"""Parses the `prompt` of a completions request, in any of its four forms, into tokens."""

from typing import TypeGuard

from services.gateway.access.request_limits import RequestLimits
from services.gateway.request.request import Prompt
from winnow.errors import InvalidRequest, InvalidSetting

_FORMS = "a text, a list of token ids, or a list of either"


def read_prompts(prompt: object, limits: RequestLimits, max_prompts: int) -> list[Prompt]:
    """Every prompt, in order.

    prompt: text, token IDs, or a list of texts or of lists of token IDs.
    Raises InvalidRequest or InvalidSetting for any other value, PromptTooLong.
    """
    if isinstance(prompt, str) or _are_token_ids(prompt):
        return [_read_prompt(prompt, "prompt", limits)]
    if not isinstance(prompt, list):
        raise InvalidRequest(f"prompt must be {_FORMS}", param="prompt")
    if not prompt:
        limits.require_prompt(0, "prompt")
    if len(prompt) > max_prompts:
        raise InvalidSetting(
            f"prompt has {len(prompt):,} prompts; the limit is {max_prompts}", param="prompt"
        )
    named = ((f"prompt[{idx}]", one) for idx, one in enumerate(prompt))
    return [_read_prompt(one, name, limits) for name, one in named]


def _read_prompt(prompt: object, name: str, limits: RequestLimits) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(limits.encode(prompt, name), prompt)
    if prompt != [] and not _are_token_ids(prompt):
        raise InvalidRequest(f"{name} is neither a text nor a list of token ids", param=name)
    limits.require_prompt(len(prompt), name)
    limits.require_token_ids(prompt, name)
    return Prompt(prompt)


def _are_token_ids(prompt: object) -> TypeGuard[list[int]]:
    return isinstance(prompt, list) and set(map(type, prompt)) == {int}
