"""Which form of calls a model was trained for, by its chat template."""

import re

from winnow.answers import channels
from winnow.answers.formats import hermes, llama3_json, mistral
from winnow.answers.formats.base import ToolFormat
from winnow.answers.formats.generic_json import GenericJson
from winnow.answers.formats.harmony import Harmony
from winnow.tool_support import CALLED, ToolSupport

# A call as a JSON object, as templates write it.
_CALL = re.compile(rf'\{{\s*"name"\s*:\s*"{CALLED}"\s*,\s*"(arguments|parameters)"\s*:')
_TO_FUNCTION = f"to=functions.{CALLED}"
# Tags of forms that are none of ours; some of them use <tool_call> as well.
_FOREIGN = ("<function=", "<arg_key>", "<parameter")
_LLAMA = (llama3_json.PYTHON_TAG, "ipython")


def detect(support: ToolSupport, source: str) -> ToolFormat | None:
    """The form in which the template shows calls, or else the one that it speaks of.

    None if it is none of ours.  source: the template's.
    """
    return _shown(support.call) if support.calls else _told(source)


def named(name: str, source: str) -> ToolFormat:
    """The form with this name, as the template's source has it."""
    if name == mistral.Mistral.name:
        return _mistral(source)
    known = (hermes.Hermes, llama3_json.Llama3Json, Harmony, GenericJson)
    return next(form() for form in known if form.name == name)


def _shown(call: str) -> ToolFormat | None:
    if channels.CHANNEL in call and _TO_FUNCTION in call:
        return Harmony()
    found = _CALL.search(call)
    if mistral.OPEN in call and (found or mistral.ARGS in call):
        return _mistral(call)
    if found is None:
        return None
    if hermes.OPEN in call[: found.start()]:
        return hermes.Hermes()
    is_llama = found[1] == llama3_json.Llama3Json.arguments_key
    return llama3_json.Llama3Json() if is_llama else GenericJson()


def _told(source: str) -> ToolFormat | None:
    if any(tag in source for tag in _FOREIGN):
        return None
    if channels.FINAL_HEADER in source:
        return Harmony()
    if hermes.OPEN in source:
        return hermes.Hermes()
    if mistral.OPEN in source:
        return _mistral(source)
    return llama3_json.Llama3Json() if any(tag in source for tag in _LLAMA) else GenericJson()


def _mistral(text: str) -> ToolFormat:
    return mistral.Mistral(named=mistral.ARGS in text, has_id=mistral.CALL_ID in text)
