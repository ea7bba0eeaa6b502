"""Rendering a conversation to text with the model's chat template."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError

from winnow.errors import InvalidRequest, InvalidSetting
from winnow.marked_text import CLIENT, FINAL, MarkedText, joined, mark
from winnow.template_environment import TemplateEnvironment, bounded_time
from winnow.tool_support import Message, Tool, ToolSupport, probe

# Names that chat_template_kwargs may not set.
RESERVED = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("chat_template", "conversation", "tokenize", "raise_exception", "strftime_now"),
    }
)
_MAX_REASON_CHARS = 300
_DEFAULT, _TOOL_USE = "default", "tool_use"
# Messages that probe which roles and content forms a template renders, and what it adds to them.
_PROBE = "winnowprobe"
_PROBED: Mapping[str, Sequence[str]] = {
    "user": ("user",),
    "system": ("system", "user"),
    "assistant": ("user", "assistant", "user"),
}
_NO_EFFORT = "none"
_WITH_RESULT = ("user", "assistant", "tool")
_OWN: Mapping[str, Mapping[str, str]] = {"tool": {"tool_call_id": "winnowid1"}}


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation is rendered to a prompt.

    add_generation_prompt: end the prompt with the start of an assistant turn; None: unless
    `continue_final_message`.  continue_final_message: end it with the last message's text.
    template_kwargs: template variables of the request.  reasoning_effort: how much the model is to
    reason, for a template that knows of it; any other ignores it.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    reasoning_effort: str | None = None

    def __post_init__(self) -> None:
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequest(
                "add_generation_prompt and continue_final_message are both true; an answer either "
                "begins a message or goes on with one",
                param="continue_final_message",
            )
        require_template_kwargs(self.template_kwargs)

    @property
    def begins_answer(self) -> bool:
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


def require_template_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raise InvalidSetting for a reserved name."""
    for name in kwargs:
        if name in RESERVED:
            raise InvalidSetting(
                f"chat_template_kwargs has {name!r}, a name that has a meaning of its own",
                param="chat_template_kwargs",
            )


class ChatTemplate:
    """A model's chat template. Thread-safe.

    sources: Jinja sources by name; the one named tool_use is for conversations with tools.
    variables: the tokenizer's, such as bos_token.
    kwargs: the operator's chat_template_kwargs; a request's override them.
    allow_special_tokens: treat text that clients write as the template's own.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        variables: Mapping[str, str],
        kwargs: Mapping[str, Any],
        *,
        allow_special_tokens: bool,
    ) -> None:
        require_template_kwargs(kwargs)
        self._sources = sources
        self._variables = {**variables, **kwargs}
        self._client = 0 if allow_special_tokens else CLIENT
        self._templates: dict[str, Template] = {}
        self._supports: dict[bool, ToolSupport] = {}

    def render(
        self, messages: Sequence[Message], options: ChatOptions, tools: Sequence[Tool] = ()
    ) -> str:
        """Render a conversation; the text that a client wrote is marked.

        messages: each with `role`, and `content` as a string or a list of parts; an assistant's may
        have `tool_calls`.  tools: as in OpenAI's API.
        Raises InvalidRequest if the template cannot be used, or refuses the messages.
        """
        marks = [self._client] * len(messages)
        if options.continue_final_message and messages:
            marks[-1] |= FINAL
        with _refusals():
            shown = list(map(self._message, messages, marks))
        rendered = self._render(
            shown,
            begins_answer=options.begins_answer,
            kwargs={**self._effort(options.reasoning_effort), **options.template_kwargs},
            tools=tools,
        )
        return _up_to_final(rendered) if options.continue_final_message else rendered

    def samples(self) -> Iterator[str]:
        """Simple conversations as rendered by the template, without a generation prompt."""
        for roles in (*_PROBED.values(), _WITH_RESULT):
            messages = [{"role": role, "content": _PROBE, **_OWN.get(role, {})} for role in roles]
            with contextlib.suppress(InvalidRequest):  # no such role, or not in this order
                yield self.render(messages, ChatOptions(add_generation_prompt=False))

    def tool_support(self, *, with_tools: bool) -> ToolSupport:
        """What is shown of a conversation with or without tools."""
        if with_tools not in self._supports:
            options = ChatOptions(add_generation_prompt=False)
            self._supports[with_tools] = probe(
                lambda messages, tools: self.render(messages, options, tools),
                with_tools=with_tools,
            )
        return self._supports[with_tools]

    def _effort(self, effort: str | None) -> Mapping[str, Any]:
        """Template variables that say it; none if the template refuses this one."""
        if not effort:
            return {}
        kwargs: dict[str, Any] = {"reasoning_effort": effort}
        if effort == _NO_EFFORT:
            kwargs["enable_thinking"] = False
        try:
            self._render([{"role": "user", "content": _PROBE}], begins_answer=True, kwargs=kwargs)
        except InvalidRequest:
            return {}
        return kwargs

    def _render(
        self,
        messages: Sequence[Message],
        *,
        begins_answer: bool,
        kwargs: Mapping[str, Any],
        tools: Sequence[Tool] = (),
    ) -> str:
        template = self._template(with_tools=bool(tools))
        with _refusals():
            own = {"messages": messages, "tools": self._marked(tools) or None, "documents": None}
            context = {**self._variables, **self._marked(kwargs), **own}
            with bounded_time():
                return template.render(context, add_generation_prompt=begins_answer)

    def _template(self, *, with_tools: bool) -> Template:
        source = self.source(with_tools=with_tools)
        if source not in self._templates:
            try:
                self._templates[source] = TemplateEnvironment().from_string(source)
            except TemplateSyntaxError as error:
                raise InvalidRequest(
                    f"the model's chat template is broken: line {error.lineno}: {error.message}",
                    param="messages",
                ) from error
        return self._templates[source]

    def source(self, *, with_tools: bool = False) -> str:
        """The template named tool_use for tools, else the one named default, or the only one.

        Raises InvalidRequest if there is none of these.
        """
        if with_tools and _TOOL_USE in self._sources:
            return self._sources[_TOOL_USE]
        if len(self._sources) == 1:
            return next(iter(self._sources.values()))
        if _DEFAULT not in self._sources:
            raise InvalidRequest(
                f"the model has chat templates {', '.join(sorted(self._sources))}, but none is "
                f"its {_DEFAULT}",
                param="messages",
            )
        return self._sources[_DEFAULT]

    def _message(self, message: Message, marks: int) -> Message:
        """The message as the template reads it, without null fields; all but the role is marked."""
        own = {name: value for name, value in message.items() if value is not None}
        role, content = own.pop("role"), own.pop("content")
        parts = [content] if isinstance(content, str) else [part["text"] for part in content]
        texts = [mark(text, marks) if marks else text for text in parts]
        return {
            "role": role,
            "content": _as_parts(texts) if role in self._roles_of_parts else joined(texts),
            **{name: self._marked(value) for name, value in own.items()},
        }

    def _marked(self, value: Any) -> Any:  # noqa: ANN401 - what JSON can hold
        return mark(value, self._client) if self._client else value

    @cached_property
    def _roles_of_parts(self) -> frozenset[str]:
        """The roles whose content the template reads as a list of parts, not as a string."""
        found: set[str] = set()
        for role in _PROBED:
            if not self._shows(role, found) and self._shows(role, found | {role}):
                found.add(role)
        return frozenset(found)

    def _shows(self, role: str, roles_of_parts: Set[str]) -> bool:
        """Whether the template renders the text of a message with this role."""
        messages = []
        for one in _PROBED[role]:
            text = _PROBE if one == role else "x"
            content = _as_parts([text]) if one in roles_of_parts else text
            messages.append({"role": one, "content": content})
        try:
            return _PROBE in self._render(messages, begins_answer=True, kwargs={}).lower()
        except InvalidRequest:  # no such role, or another order of roles is required
            return False


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Context manager: raises InvalidRequest for any error, since a template is a program."""
    try:
        yield
        return
    except InvalidRequest:
        raise
    except TemplateError as error:
        reason = error.message or type(error).__name__
    except Exception as error:  # also of messages that are nested too deep to be marked
        reason = f"{type(error).__name__}: {error}"
    reason = " ".join(reason.split())[:_MAX_REASON_CHARS]
    raise InvalidRequest(
        f"the model's chat template refuses the messages: {reason}", param="messages"
    )


def _as_parts(texts: Iterable[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _up_to_final(rendered: str) -> str:
    """The text up to the end of the last message's own text."""
    marks = rendered.marks if isinstance(rendered, MarkedText) else b""
    end = max(marks.rfind(bytes([one])) for one in (FINAL, CLIENT | FINAL)) + 1
    if not end:
        raise InvalidRequest(
            "continue_final_message is true, but the chat template shows no text of the last "
            "message",
            param="continue_final_message",
        )
    return rendered[:end]
